"""Every notebook: its own tests, how it is kept, and that the library is what it exports."""
import ast
import json
import multiprocessing
import os
import re

import pytest
from conftest import ENV, NOTEBOOKS, ROOT, SHARED, run

LIMIT_KB, LONGEST_CELL = 500, 40
FIELD = re.compile(r"    \w+:\w+ = [^#]+# ")  # a parameter of a config with its meaning: a line of a table
PERSONAL = re.compile(r"/home/\w|/Users/\w|/root/|[A-Z]:\\\\?Users|/tmp/|/work/")
MODULES = {}  # module -> file name of its notebook


def read(path): return json.loads(path.read_text(encoding="utf-8"))


def source(cell): return "".join(cell["source"])


def directives(cell): return {m.split(":")[0] for m in re.findall(r"^#\|\s*(\S+)", source(cell), re.M)} if cell["cell_type"] == "code" else set()


def exported(book): return [c for c in book["cells"] if directives(c) & {"export", "exports", "exporti"}]


def tags(cell): return cell["metadata"].get("tags", [])


for path in NOTEBOOKS:
    module = re.search(r"^#\|\s*default_exp (\S+)", "\n".join(map(source, read(path)["cells"])), re.M)
    if module:
        assert module[1] not in MODULES, f"{path.name} and {MODULES[module[1]]} both export {module[1]}"
        MODULES[module[1]] = path.name

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda o: o.stem)
exporting = pytest.mark.parametrize("path", [o for o in NOTEBOOKS if o.name in MODULES.values()], ids=lambda o: o.stem)


# Each notebook gets a process of its own, forked from one that has made the slow imports already: eight seconds a notebook.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["nbdev.test", "torch", "pytorch_lightning", "effdet", "albumentations", "seaborn"])


def nbdev_test_one(path, flags, env, log):
    "`nbdev_test --path PATH`, in this process; what it prints goes to a file."
    with open(log, "wb") as f:
        for stream in (1, 2): os.dup2(f.fileno(), stream)
    os.environ.update(env)
    os.chdir(ROOT)
    from nbdev.test import nbdev_test
    nbdev_test(path=str(path), flags=flags)  # exits with 1 where a cell fails


@every
def test_runs(path, request, tmp_path, monkeypatch):
    "The notebook's own cells, as `nbdev_test` runs them."
    flags, env = ("slow data", {"CXR_NIH_ROOT": str(SHARED/"nih")}) if request.config.getoption("--slow") else ("", {})
    for k, v in ENV.items(): monkeypatch.setenv(k, v)  # for the process that is forked from, which starts at the first call
    p = FORK.Process(target=nbdev_test_one, args=(path, flags, ENV | env, tmp_path/"log"))
    p.start()
    p.join(3000 if flags else 300)
    if p.exitcode is None: p.kill()
    text = (tmp_path/"log").read_text()
    assert p.exitcode == 0 and "Success." in text, f"{path.name} ended with {p.exitcode}:\n{text[-6000:]}"


@every
def test_outputs(path):
    "Small, anonymous, without errors, warnings or progress bars."
    assert path.stat().st_size < LIMIT_KB*1024, f"{path.name} has {path.stat().st_size//1024} KB: draw fewer or smaller figures"
    for c in read(path)["cells"]:
        for o in c.get("outputs", []):
            text = json.dumps({k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")})+"".join(o.get("text", ""))
            at = f"{path.name}, cell {c['id']}:"
            assert o["output_type"] != "error", f"{at} ended in {o.get('ename')}: {o.get('evalue')}"
            assert not PERSONAL.search(text), f"{at} shows a folder of this machine: {PERSONAL.search(text)[0]}"
            assert "\r" not in text and "it/s" not in text and "%|" not in text, f"{at} holds a progress bar"
            assert not (o.get("name") == "stderr" and "Warning" in text), f"{at} holds a warning"


@every
def test_form(path):
    "Title and sentence first, kernel named, imports apart from work, cells short enough to show."
    book = read(path)
    assert book["metadata"]["kernelspec"].items() >= {"name": "python3", "language": "python"}.items()
    top = "\n".join(source(c) for c in book["cells"][:2])
    assert re.match(r"# [^#\s].*\n+> \S", top), f"{path.name} starts with neither '# Title' nor '> a sentence': {top[:80]!r}"
    for c in book["cells"]:
        if c["cell_type"] != "code" or re.search(r"^\s*[%!]", source(c), re.M): continue
        body = ast.parse(source(c)).body
        imports = [isinstance(o, (ast.Import, ast.ImportFrom)) or isinstance(o, ast.With) and any(isinstance(i, ast.ImportFrom) for i in o.body) for o in body]
        assert not any(imports) or all(imports) or "nbdev_export" in source(c), f"{path.name}: a cell imports and works:\n{source(c)}"


@exporting
def test_exported_cells(path):
    "Short, and importing only from notebooks that sort before this one; the last cell exports."
    book = read(path)
    for c in exported(book):
        code = [line for line in source(c).splitlines() if line.strip() and not line.startswith("#|") and not FIELD.match(line)]
        assert len(code) <= LONGEST_CELL, f"{path.name}: an exported cell has {len(code)} lines:\n{code[0]}"
        for node in ast.walk(ast.parse(source(c))):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cxr_nbdev")): continue
            assert all(o.name != "*" for o in node.names), f"{path.name}: import names, not *, from {node.module}"
            at_top = node.col_offset == 0
            comes_from = MODULES.get(node.module.removeprefix("cxr_nbdev."))
            assert comes_from, f"{path.name} imports {node.module}, which no notebook exports"
            assert not at_top or comes_from < path.name, f"{path.name} imports from {comes_from}, which comes after it"
    last = book["cells"][-1]
    assert "nbdev_export()" in source(last) and "skip-execution" in tags(last) and "hide" in directives(last), f"{path.name} doesn't end by exporting"


@pytest.mark.parametrize("name", ["04_train", "04a_ablation", "04b_ladder", "05_eval"])
def test_parameters_cell(name):
    "One cell has the tag that papermill looks for, and holds only commented assignments."
    cells = [c for c in read(ROOT/f"nbs/{name}.ipynb")["cells"] if "parameters" in tags(c)]
    assert len(cells) == 1
    assert all(isinstance(o, (ast.Assign, ast.AnnAssign)) for o in ast.parse(source(cells[0])).body)
    assert all("#" in line for line in source(cells[0]).splitlines() if "=" in line), "a parameter has no comment"


def snapshot(folder): return {o.relative_to(folder): o.read_bytes() for part in ("nbs", "cxr_nbdev") for o in (folder/part).rglob("*") if o.is_file() and o.suffix in (".py", ".ipynb", ".yml")}


def test_export_and_clean_change_nothing(project):
    "The library is what the notebooks export, the notebooks are clean, and doing it again changes nothing."
    before = snapshot(project)
    for i in range(2):
        run("nbdev_export && nbdev_clean", cwd=project)
        after = snapshot(project)
        changed = sorted(str(o) for o in before.keys() | after.keys() if before.get(o) != after.get(o))
        assert not changed, f"nbdev_export and nbdev_clean change {', '.join(changed)}: run `make prepare`"


def test_library_belongs_to_notebooks():
    "No module without its notebook."
    there = {o.stem for o in (ROOT/"cxr_nbdev").glob("*.py") if o.stem not in ("__init__", "_modidx")}
    assert there == set(MODULES), f"modules and notebooks differ: {there ^ set(MODULES)}"
