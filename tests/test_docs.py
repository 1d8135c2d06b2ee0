"""README, its commands, and the site."""
import re
import shlex

import pytest
from conftest import ROOT, run

README = ROOT/"README.md"
FAST = "-p epochs 1 -p image_size 128 -p limit 16 -p num_workers 0"
SMALL = "epochs=1 image_size=128 limit=16 architecture=tf_efficientdet_lite0 backbone="


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
    if words[0] == "cxr_download" or "runs/mixed.ipynb" in words: return None  # tests/test_download.py, tests/test_mixture.py
    if words[0] == "cxr_predict": return "cxr_predict /path/to/nih/images"
    if words[0] == "cxr_compare" or "runs/first_eval.ipynb" in words: return None  # tests/test_compare.py does it
    if words[0] == "nbdev_test": return "nbdev_test --path nbs/index.ipynb"  # tests/test_notebooks.py runs them all
    if elsewhere(command): return None
    if words[0] == "papermill": return command if "--help-notebook" in words else f"{command} {FAST}"
    return command + {"cxr_train": f" notebook=false {SMALL}", "cxr_card": ""}[words[0]]


def elsewhere(command):
    "Does one of tests/test_runs.py start with this very line? (test_the_line, test_sweep, test_predecessors_command)"
    return run_of(command) == "exp1" or " -m " in command or command.startswith("cxr_eval")


def run_of(command):
    "The run that a command makes or uses, '' where there is none."
    return ["", *re.findall(r"(?:runs/|-p run |\brun=)(\w+)", command)][-1]


@pytest.mark.parametrize("name", dict.fromkeys(run_of(o) for o in COMMANDS if tried(o)))
def test_readme_commands(start, small_set, name):
    "Line by line as a reader would do it, on a small set; what belongs to one run in one copy of the project."
    for line in (tried(o) for o in COMMANDS if run_of(o) == name):
        if line: start(line.replace("/path/to/nih", str(small_set)))
    for made in {"first": ("metrics.json", "card.md"), "nih1": ("best.ckpt", "metrics.json", "record.ipynb")}.get(name, ()):
        assert (start.folder/"runs"/name/made).exists(), f"README's commands made no {made}"


def test_every_command_is_tried():
    "Here, or by the tests that `elsewhere` names."
    assert len(COMMANDS) > 10 and {run_of(o) for o in COMMANDS} == {"", "exp1", "first", "nih1", "mixed"}
    assert [o.split()[0] for o in COMMANDS if elsewhere(o)] == ["papermill", "papermill", "cxr_train", "cxr_eval"]


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
