"""What a wheel holds, and that the installed library finds its recipes and notebooks."""
import sys
import zipfile

import pytest
from conftest import ROOT, copy_project, run


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "(names in the wheel, folder that it is installed into)"
    at = tmp_path_factory.mktemp("wheel")
    copy_project(at/"project")
    run(["python", "-m", "build", "--wheel", "--no-isolation", "--outdir", at, at/"project"])
    [wheel] = at.glob("*.whl")
    run(["uv", "pip", "install", "--python", sys.executable, "--no-deps", "--offline", "--target", at/"site", wheel])
    return zipfile.ZipFile(wheel).namelist(), at/"site"


def test_wheel_holds_recipes_and_notebooks(installed):
    names, _ = installed
    wanted = [f"cxr_nbdev/_recipes/{o.name}" for o in (ROOT/"configs").glob("*.yaml")] + [f"cxr_nbdev/_notebooks/{o}.ipynb" for o in ("04_train", "05_eval")]
    wanted += [f"cxr_nbdev/{o.name}" for o in (ROOT/"cxr_nbdev").glob("*.py")]
    assert set(wanted) <= set(names), f"the wheel lacks {sorted(set(wanted)-set(names))}"
    assert any(o.endswith("LICENSE") for o in names)
    assert not [o for o in names if o.startswith(("tests", "tools", "nbs", "build"))]


def test_installed_library_finds_them(installed, tmp_path):
    _, site = installed
    code = ("import cxr_nbdev.cli as c; from pathlib import Path; print(Path(c.__file__).parent); print(c.find_recipe('config')); "
            "print(sorted(o.name for o in c.shipped('notebooks').iterdir()))")
    out = run(["python", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}).stdout
    assert out.count(str(site)) == 2 and "_recipes" in out and "['04_train.ipynb', '05_eval.ipynb']" in out


def test_installed_commands(installed, tmp_path):
    _, site = installed
    for command, name in [("cxr_train", "train_main"), ("cxr_eval", "eval_main")]:
        assert (site/"bin"/command).exists()
        out = run(["python", "-c", f"import sys; from cxr_nbdev.cli import {name}; sys.exit({name}(['--help']))"], cwd=tmp_path,
                  env={"PYTHONPATH": str(site)}).stdout
        assert "usage: "+command in out and "not for clinical use" in out


def test_source_distribution_builds(project, tmp_path):
    run(["python", "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, project])
    [archive] = tmp_path.glob("*.tar.gz")
    run(["tar", "-xzf", archive, "-C", tmp_path])
    [folder] = [o for o in tmp_path.iterdir() if o.is_dir() and o.name != "project"]
    assert (folder/"settings.ini").exists() and (folder/"configs/config.yaml").exists() and (folder/"nbs/04_train.ipynb").exists()


def test_recipes_are_flat():
    "The same file serves papermill -f and Hydra."
    import yaml
    for path in (ROOT/"configs").glob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert not {"defaults", "hydra"} & set(values) and not any(isinstance(v, (dict, list)) for v in values.values()), path.name


def test_recipes_are_experiments():
    "Every value of every recipe is one that a training takes, and its detector can be built."
    import yaml
    from cxr_nbdev.config import parse_config
    from cxr_nbdev.efficientdet import check_image_size
    for path in (ROOT/"configs").glob("*.yaml"):
        c = parse_config(yaml.safe_load(path.read_text(encoding="utf-8")))
        check_image_size(c.architecture, c.image_size)
        assert "\n#   " in path.read_text(encoding="utf-8"), f"{path.name} does not say how it is run"


def test_ladder_recipe():
    "The steps of the recorded ladder, from the floor upwards; those that differ in the average or in post-processing alone are one training."
    import yaml
    from cxr_nbdev.config import parse_config
    from cxr_nbdev.ladder import LadderConfig, as_ablation, read_steps
    cfg = parse_config(yaml.safe_load((ROOT/"configs/ladders/nih.yaml").read_text(encoding="utf-8")), LadderConfig)
    steps = read_steps(cfg.steps)
    assert list(steps) == ["effdet", "core", "imagenet", "light", "ema", "mix", "drawn", "fused", "vote"] and (steps["drawn"].on, steps["fused"].on) == ("ema", "drawn")
    assert [a.split(":")[0].strip() for a in as_ablation(cfg).arms.split(";")] == ["effdet", "core", "imagenet", "ema", "mix", "drawn"]
