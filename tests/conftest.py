"""What the tests share: a copy of the project to run things in, a small synthetic set, and the record of slow tests."""
import datetime
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CXR_SHARED") or ROOT.parent/"shared")  # real images, where there are any
NOTEBOOKS = sorted(o for o in (ROOT/"nbs").rglob("*.ipynb") if not any(p[0] in "_." for p in o.relative_to(ROOT).parts))
COPIED = ("nbs", "configs", "cxr_nbdev", "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "_quarto.yml", "Makefile", "tools",
          "constraints.txt")
# One thread a process: the tests run side by side, and threads that wait for each other cost more than they bring.
ENV = {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1",
       "JUPYTER_PREFER_ENV_PATH": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
os.environ["OMP_NUM_THREADS"] = "1"  # of what is computed in these processes too; torch reads it when it is imported


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also what is marked slow, and the notebooks' slow and data cells")


def pytest_collection_modifyitems(config, items):
    skip, alone = pytest.mark.skip(reason="slow: run by make test-slow"), pytest.mark.skip(reason="times a whole run, so make test-slow runs it alone, at the end")
    for o in items:
        if "slow" in o.keywords and not config.getoption("--slow"): o.add_marker(skip)
        elif o.nodeid.endswith("test_runs.py::test_make_run") and config.option.keyword != "make_run": o.add_marker(alone)
    items.sort(key=lambda o: "test_notebooks" in o.nodeid)  # the longest first


class Result(subprocess.CompletedProcess):
    "A finished command; `text` is all it printed."
    @property
    def text(self): return self.stdout+self.stderr


def run(command, cwd=ROOT, env=None, ok=True, timeout=900):
    "Runs a command (a list, or a line for bash). With ok=True it must succeed, with ok=False fail, with ok=None either."
    args = command if isinstance(command, list) else ["bash", "-c", command]
    o = subprocess.run([str(a) for a in args], cwd=cwd, env={**os.environ, **ENV, **(env or {})}, capture_output=True, text=True, timeout=timeout,
                       stdin=subprocess.DEVNULL)
    o = Result(o.args, o.returncode, o.stdout, o.stderr)
    if ok is not None and (o.returncode == 0) != ok:
        pytest.fail(f"{command}\nended with {o.returncode} in {cwd}:\n{o.text[-6000:]}", pytrace=False)
    return o


def copy_project(target):
    "The project's files, without what was built or run."
    target.mkdir(parents=True)
    skip = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", ".*")
    for name in COPIED:
        source = ROOT/name
        if source.is_dir(): shutil.copytree(source, target/name, symlinks=True, ignore=skip)
        elif source.exists(): shutil.copy(source, target/name)
    (target/"runs").mkdir()
    return target


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    "MLflow's file with its tables, still empty. A first run makes it in seconds; the tests that don't look at that take this one, made once for all workers."
    from filelock import FileLock
    here = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: here = here.parent
    with FileLock(here/"mlflow.lock"):
        if not (here/"mlflow.db").exists():
            run(["python", "-c", "import mlflow; mlflow.MlflowClient('sqlite:///new.db').search_experiments()"], cwd=here)
            (here/"new.db").rename(here/"mlflow.db")
    return here/"mlflow.db"


@pytest.fixture
def project(tmp_path, empty_store):
    "A fresh copy of the whole project; run things there with `cwd=project`."
    here = copy_project(tmp_path/"project")
    shutil.copy(empty_store, here/"runs/mlflow.db")
    return here


@pytest.fixture
def runs(tmp_path, empty_store, monkeypatch):
    "A folder of runs for what trains in this process."
    (tmp_path/"runs").mkdir()
    shutil.copy(empty_store, tmp_path/"runs/mlflow.db")
    monkeypatch.setenv("CXR_RUNS", str(tmp_path/"runs"))
    return tmp_path/"runs"


@pytest.fixture(scope="session")
def small_set(tmp_path_factory):
    "The folder of a small synthetic set in NIH's layout."
    from cxr_nbdev.synth import make_synthetic
    return make_synthetic(tmp_path_factory.mktemp("small")/"synthetic", n=40, size=128, seed=1)


@pytest.fixture
def small_env(small_set):
    "Environment in which `data=synthetic` (and `auto`) is that small set."
    return {"CXR_SYNTHETIC_ROOT": str(small_set), "CXR_NIH_ROOT": ""}


@pytest.fixture
def start(project, small_env):
    "start('papermill nbs/04_train.ipynb ...'): runs a line in a copy of the project on the small set; `start.folder` is that copy."
    def go(command, env=None, **kw): return run(command, cwd=project, env={**small_env, **(env or {})}, **kw)
    go.folder = project
    return go


def pytest_terminal_summary(terminalreporter, config):
    "After `--slow`: the result becomes a page of the docs."
    last = config.option.keyword == "make_run" # the second half of make test-slow
    everything = [Path(o).name for o in config.args] == ["tests"] and (last or not config.option.keyword) and not config.option.markexpr
    if not config.getoption("--slow") or not everything or hasattr(config, "workerinput"): return
    stats = {k: terminalreporter.stats.get(k, []) for k in ("passed", "failed", "error", "skipped")}
    seconds = {o.nodeid: o.duration for k in ("passed", "failed") for o in stats[k]}
    skipped = {o.nodeid: (o.longrepr[2] if isinstance(o.longrepr, tuple) else str(o.longrepr)).removeprefix("Skipped: ") for o in stats["skipped"]}
    failed = {o.nodeid for k in ("failed", "error") for o in stats[k]}
    says = lambda name: "skipped: "+skipped[name] if name in skipped else "FAILED" if name in failed else "passed"
    page = ROOT/"nbs/last_slow_test.qmd"
    rows = {o.split(" | ")[0]: o for o in page.read_text(encoding="utf-8").splitlines() if o.startswith("| test_")} if last else {}
    rows |= {f"| {name.split('/')[-1]}": f"| {name.split('/')[-1]} | {says(name)} | {seconds.get(name, 0):.0f} |" for name in sorted(seconds | skipped)}
    page.write_text(slow_page(list(rows.values())), encoding="utf-8")


def slow_page(rows):
    "The page of the docs, from a line for each test: `| name | result | seconds |`."
    import torch
    cells = [[c.strip() for c in o.strip("| ").split(" | ")] for o in rows]
    counts = {k: sum(c[1].startswith(k) for c in cells) for k in ("passed", "FAILED", "skipped")}
    minutes = sum(float(c[2]) for c in cells)/60
    return "\n".join(["---", "title: Last slow test", "description: The last run of `make test-slow`, with the cells and tests that take long or need real images.", "---", "",
                      f"{datetime.date.today()}: **{', '.join(f'{n} {k.lower()}' for k, n in counts.items() if n)}** in {minutes:.1f} minutes of work on {os.cpu_count()} cores "
                      f"({platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
                      f"{'a GPU' if torch.cuda.is_available() else 'no GPU'}).", "", "| test | result | seconds |", "|:--|:--|--:|", *rows])+"\n"
