"""The ablation, as papermill runs it; and that a kill changes nothing."""
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ENV

LINE = ("papermill nbs/04a_ablation.ipynb runs/tiny.ipynb -p data synthetic -p folds 0 -p n_folds 2 -p seeds 1,2 -p limit 16 -p image_size 64 -p epochs 1 -p batch_size 4 "
        "-p accelerator cpu -p n_boot 20 -p n_perm 20 -p lr 0.003")
ARMS = ["-p", "arms", "none: augment=none; light: augment=light"]


def load(path): return json.loads(path.read_text(encoding="utf-8"))


def test_ablation(start):
    "Two arms, two seeds: the values are in the record, the runs are ordinary ones, pairs begin alike, and what is finished is not trained again."
    here = start.folder
    start([*LINE.split(), *ARMS])
    r, book = load(here/"runs/tiny/ablation.json"), load(here/"runs/tiny.ipynb")
    text = "\n".join("".join(o.get("text", "")) for c in book["cells"] for o in c.get("outputs", []))
    assert any("lr = 0.003" in "".join(c["source"]) for c in book["cells"] if "injected-parameters" in c["metadata"].get("tags", []))
    assert (r["config"]["lr"], r["reference"], r["arms"], r["seeds"], r["n_perm"]) == (0.003, "none", ["none", "light"], [1, 2], 20)
    assert "`light`: " in text and "by a program" in text and str(here) not in json.dumps(book) + json.dumps(r)
    runs = {o.parent.name: load(o) for o in sorted((here/"runs/tiny").glob("*/config.json"))}
    assert sorted(runs) == ["light_f0_s1", "light_f0_s2", "none_f0_s1", "none_f0_s2"]
    assert all((c["lr"], c["limit"], c["epochs"]) == (0.003, 16, 1) for c in runs.values()) and runs["light_f0_s1"]["augment"] == "light"
    for s in (1, 2): assert len({runs[f"{a}_f0_s{s}"]["manifest_hash"] for a in ("none", "light")}) == 1      # an arm's pair has the same split
    assert len(r["differences"]["light"]["map_50_seeds"]) == 2 and r["n_images"] == sum(o["n"] for o in held_out(here/"runs/tiny"))
    before = {o: o.stat().st_mtime_ns for o in (here/"runs/tiny").rglob("*.ckpt")}
    from cxr_nbdev import ablation
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ablation, "fit", None)
        m.setenv("CXR_SYNTHETIC_ROOT", os.environ.get("CXR_SYNTHETIC_ROOT", ""))
        c = ablation.parse_config({k: v for k, v in r["config"].items() if k in {f.name for f in ablation.fields(ablation.AblationConfig)}}, ablation.AblationConfig)
        todo = ablation.plan(c, here/"runs/tiny/folds.csv")
        with ablation.runs_in(here/"runs/tiny"):
            for tc in todo.values(): ablation.run_once(tc)
            with pytest.raises(ValueError, match="`epochs` was 1 and is 2 now"): ablation.run_once(ablation.replace(tc, epochs=2))
        again = ablation.compare_arms(ablation.collect(todo, here/"runs/tiny"), 20, 20, c.seed)
    assert again["results"] == r["results"] and before == {o: o.stat().st_mtime_ns for o in (here/"runs/tiny").rglob("*.ckpt")}


def held_out(home):
    "The validation images of each seed, as far as another seed has not got them."
    import pandas as pd
    seen = set()
    for s in (1, 2):
        t = pd.read_csv(home/f"none_f0_s{s}/split.csv")
        mine = set(t.image_id[t.subset == "val"])
        yield dict(n=len(mine-seen))
        seen |= mine


def test_wrong_values(tmp_path, small_set, monkeypatch):
    "What is wrong in an arm is said before anything is trained, with the arm's name."
    from cxr_nbdev.ablation import AblationConfig, prepare
    monkeypatch.setenv("CXR_RUNS", str(tmp_path/"runs"))
    base = dict(data="synthetic", data_root=str(small_set), image_size=64, accelerator="cpu")
    for arms, says in (("a: augment=light; b: augment=ligth", "the arm `b`.*did you mean `light`"), ("a: start_from=nobody", "nobody.*no such run"), ("a: lr=x", "the arm `a`: 1 problem")):
        with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){says}"): prepare(AblationConfig(arms=arms, **base), tmp_path/"home")
    assert not (tmp_path/"home").exists()


@pytest.mark.slow
def test_killed(start, small_env):
    "Killed in the middle of the second training and started again with the same line: the same numbers as undisturbed."
    here, command = start.folder, [*LINE.replace("-p epochs 1", "-p epochs 3").split(), *ARMS]
    start(command)
    whole = load(here/"runs/tiny/ablation.json")
    shutil.rmtree(here/"runs/tiny")
    p = subprocess.Popen(command, cwd=here, env={**os.environ, **ENV, **small_env}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (here/"runs/tiny/light_f0_s1/last.ckpt").exists() and p.poll() is None: time.sleep(0.05)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    assert not (here/"runs/tiny/ablation.json").exists() and (here/"runs/tiny/none_f0_s1/last/predictions.json").exists()
    start(command)
    again = load(here/"runs/tiny/ablation.json")
    assert {k: again[k] for k in ("results", "differences", "blind_floor")} == {k: whole[k] for k in ("results", "differences", "blind_floor")}
