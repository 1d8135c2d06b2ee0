"""README, its commands, and the site."""
import re
import shlex

import pytest
from conftest import ROOT, copy_project, run

README = ROOT/"README.md"
FAST = "-p epochs 1 -p image_size 128 -p limit 16 -p num_workers 0"


def blocks(language): return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S) if README.exists() else []


COMMANDS = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def test_readme_is_up_to_date(): run(["python", "tools/readme.py", "--check"])


def test_reference_is_up_to_date(): run(["python", "tools/reference.py", "--check"])


def test_readme_pictures_exist():
    for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (ROOT/link).stat().st_size < 500*1024, f"{link} is large"
        assert run(["git", "check-ignore", link], ok=None).returncode, f"git ignores {link}"


def test_site(): run(["python", "tools/build_docs.py"])


def test_quarto_settings(project):
    "nbdev's own refresh of the settings leaves them as they are."
    before = [(ROOT/"nbs"/o).read_text(encoding="utf-8") for o in ("nbdev.yml", "_quarto.yml")]
    run(["python", "-c", "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()"], cwd=project)
    assert [(project/"nbs"/o).read_text(encoding="utf-8") for o in ("nbdev.yml", "_quarto.yml")] == before
    assert (ROOT/"nbs/_quarto.yml").is_symlink() and (ROOT/"nbs/_quarto.yml").resolve() == ROOT/"_quarto.yml"


def tried(command):
    "The line that is run for a command of the README: the same, or made short, or a look at whether it exists. An unknown command is an error."
    words = shlex.split(command)
    if words[0] == "git": return None  # needs the network
    if words[0] == "make": return "make -n "+shlex.join(words[1:])  # tests/test_setup.py runs it
    if words[0] == "jupyter": return "jupyter lab --version"
    if words[0] == "cxr_compare" or "runs/first_eval.ipynb" in words: return None  # tests/test_compare.py does it
    if words[0] == "nbdev_test": return "nbdev_test --path nbs/index.ipynb"  # tests/test_notebooks.py runs them all
    if words[0] == "papermill": return command if "--help-notebook" in words or "05_eval" in command else f"{command} {FAST}"
    return command + {"cxr_train": " epochs=1 image_size=128 limit=16 architecture=tf_efficientdet_lite0 backbone=", "cxr_eval": " --n_boot 20 --no_figures", "cxr_card": ""}[words[0]]


@pytest.fixture(scope="module")
def readme_project(tmp_path_factory, small_set):
    return copy_project(tmp_path_factory.mktemp("readme")/"project")


def test_readme_commands(readme_project, small_set):
    "Line by line in one copy of the project, as a reader would do it, on a small set."
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        line = tried(command)
        if line: run(line.replace("/path/to/nih", str(small_set)), cwd=readme_project, env={"CXR_SYNTHETIC_ROOT": str(small_set), "CXR_NIH_ROOT": ""})
    for made in ("runs/exp1.ipynb", "runs/exp1/best.ckpt", "runs/exp1/eval.json", "runs/exp1/report.html", "runs/first/metrics.json", "runs/first/card.md"):
        assert (readme_project/made).exists(), f"README's commands made no {made}"


def test_readme_python(start):
    "The five lines."
    [code] = blocks("python")
    assert len(code.strip().splitlines()) == 5
    (start.folder/"five_lines.py").write_text(code.replace("limit=60", "limit=16, image_size=128"), encoding="utf-8")
    assert "blind floor" in start(["python", "five_lines.py"]).stdout
    assert (start.folder/"runs/first_look/metrics.json").exists()


def test_tools():
    "What turns notebooks into pages, on literal cases."
    import sys
    sys.path.insert(0, str(ROOT/"tools"))
    from build_docs import pandoc_id
    from nb2md import callouts, fence, split_options, unlinked_code
    assert [pandoc_id(o) for o in ("TrainConfig", "Tables.subset", "What goes in?", "2. x_y z")] == ["trainconfig", "tables.subset", "what-goes-in", "x_y-z"]
    assert fence("a ``` b\n", "python") == "````python\na ``` b\n````"
    assert split_options('#| echo: false\n#| code-summary: "Source"\n\nx = 1') == ({"echo": "false", "code-summary": "Source"}, "x = 1")
    assert callouts("::: {.callout-note}\n## Read\ntwo\n\nlines\n:::") == '!!! note "Read"\n\n    two\n\n    lines'
    assert unlinked_code("[`f`](f.md#f)\n```python\nx, # from [`f`](f.md#f)\n```\n") == "[`f`](f.md#f)\n```python\nx, # from `f`\n```\n"
