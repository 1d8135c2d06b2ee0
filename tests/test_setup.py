"""make: which Python it takes, what it says otherwise, and what `make run` calls."""
import json
import stat
import sys

import pytest
from conftest import ROOT, run


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def fake_python(path, version):
    "A Python that says it is of some version."
    major, minor = version.split(".")[:2]
    script(path, f'#!/bin/sh\ncase "$2" in *version_info\\[:3\\]*) echo {version};; *"< (3, 11)"*) exit {int((int(major), int(minor)) < (3, 11))};; esac\n')


def find(folder, **env): return run(["/bin/sh", ROOT/"tools/find_python.sh"], env={"PATH": str(folder), "PYTHON": "", **env}, ok=None)


def test_takes_the_first_python_that_fits(tmp_path):
    fake_python(tmp_path/"python3", "3.9.2")
    fake_python(tmp_path/"python3.12", "3.12.1")
    assert find(tmp_path).stdout.strip() == "python3.12"
    fake_python(tmp_path/"my python", "3.13.0")
    assert find(tmp_path, PYTHON=str(tmp_path/"my python")).stdout.strip() == str(tmp_path/"my python")


def test_says_what_is_missing(tmp_path):
    fake_python(tmp_path/"python3", "3.9.2")
    o = find(tmp_path)
    assert o.returncode == 1 and "needs Python 3.11 or newer" in o.stderr and "python3 is 3.9.2" in o.stderr
    assert "Python at all" in find(tmp_path/"nothing").stderr
    assert "no-such-python" in find(tmp_path, PYTHON="no-such-python").stderr


def test_names_the_missing_venv(tmp_path):
    script(tmp_path/"python3", '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *:3*) echo 3.11.2;; esac\n')
    assert "python3.11-venv" in find(tmp_path).stderr


def test_make_says_so_too(project, tmp_path):
    fake_python(tmp_path/"old", "3.8.1")
    o = run(["make", "setup", f"PYTHON={tmp_path/'old'}"], cwd=project, ok=False)
    assert "needs Python 3.11 or newer" in o.text and not (project/".venv").exists()


@pytest.fixture
def fake_tools(project):
    "A project whose papermill, jupyter and python only write down how they were called, and make a metrics.json."
    number = {"map_50": 0.31, "sensitivity": 0.5, "specificity": None}
    metrics = {"val": {**number, "blind_floor": {"map_50": 0.05}}, "n_train_images": 8, "n_val_images": 2, "seconds": 3.2}
    (project/"fake.py").write_text(
        "import json, os, sys\n"
        "print(json.dumps(sys.argv[1:]), file=open('calls.txt', 'a'))\n"
        "if 'nbs/04_train.ipynb' in sys.argv:\n"
        "    os.makedirs('runs/demo')\n"
        f"    open('runs/demo/metrics.json', 'w').write({json.dumps(metrics)!r})\n"
        "    for name in ('demo.ipynb', 'demo.html'): open(f'runs/{name}', 'w').close()\n")
    for name in ("papermill", "jupyter"): script(project/f".venv/bin/{name}", f'#!/bin/sh\nexec "{sys.executable}" fake.py "$@"\n')
    script(project/".venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    script(project/".venv/installed", "")
    return project


def calls(folder): return [json.loads(line) for line in (folder/"calls.txt").read_text().splitlines()]


def test_make_run(fake_tools):
    "The two lines that the README promises, and where the results are."
    out = run(["make", "run"], cwd=fake_tools).stdout
    assert calls(fake_tools)[:2] == ["nbs/04_train.ipynb runs/demo.ipynb -p data synthetic -p data_options n=800+size=128 -p image_size 128 -p anchor_scale 2 -p augment light -p lr 6e-3 -p epochs 9".split(), "nbs/05_eval.ipynb runs/demo_eval.ipynb -p run demo".split()]
    assert "mAP@0.5  0.310" in out and "0.050" in out and "not defined" in out and "runs/demo.html" in out and "not for clinical use" in out


def test_make_run_on_own_images(fake_tools):
    run(["make", "run", "DATA=nih", "DATA_ROOT=/my images/it's here", "ARGS=-p epochs 2"], cwd=fake_tools)
    assert calls(fake_tools)[0][2:] == ["-p", "data", "nih", "-r", "data_root", "/my images/it's here", "-p", "epochs", "2"]


def test_make_run_on_a_drawn_folder(fake_tools):
    "How many films of which size there are, the folder says."
    run(["make", "run", "DATA_ROOT=/my films"], cwd=fake_tools)
    assert calls(fake_tools)[0][2:] == "-p data synthetic -p image_size 128 -p anchor_scale 2 -p augment light -p lr 6e-3 -p epochs 9 -r data_root".split()+["/my films"]
    run(["make", "run"], cwd=fake_tools, env={"CXR_SYNTHETIC_ROOT": "/elsewhere"})
    *_, second = (o for o in calls(fake_tools) if o[0] == "nbs/04_train.ipynb")
    assert second == "nbs/04_train.ipynb runs/demo.ipynb -p data synthetic -p image_size 128 -p anchor_scale 2 -p augment light -p lr 6e-3 -p epochs 9".split()


def test_make_run_replaces_only_its_own(fake_tools):
    for name in ("demo", "demo2"):
        (fake_tools/"runs"/name).mkdir()
        (fake_tools/f"runs/{name}/old.txt").touch()
        (fake_tools/f"runs/{name}.ipynb").touch()
    run(["make", "run"], cwd=fake_tools, env={"DATA_ROOT": "/elsewhere", "DATA": "other"})
    assert not (fake_tools/"runs/demo/old.txt").exists() and (fake_tools/"runs/demo2/old.txt").exists() and (fake_tools/"runs/demo2.ipynb").exists()
    assert calls(fake_tools)[0][2:5] == ["-p", "data", "synthetic"] and "/elsewhere" not in calls(fake_tools)[0], "variables of the environment are not the user's wish"


def test_second_make_installs_nothing(fake_tools):
    assert "Nothing to be done" in run(["make", "setup"], cwd=fake_tools).stdout


def test_pins_are_exact():
    "Every line of constraints.txt pins one version, and what settings.ini asks for is among them."
    from configparser import ConfigParser
    from packaging.requirements import Requirement
    pins = [Requirement(o) for o in (ROOT/"constraints.txt").read_text().splitlines() if o and o[0] != "#"]
    assert all(len(o.specifier) == 1 and next(iter(o.specifier)).operator == "==" for o in pins)
    have = {o.name.lower().replace("_", "-"): next(iter(o.specifier)).version for o in pins}
    assert not [o for o in have if o.startswith(("nvidia", "cuda", "triton"))]
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini")
    for o in map(Requirement, (ini["DEFAULT"]["requirements"]+" "+ini["DEFAULT"]["dev_requirements"]).split()):
        assert have.get(o.name.lower()) in o.specifier, f"constraints.txt does not fit {o} of settings.ini: run `make pins`"
