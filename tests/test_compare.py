"""Comparing runs and writing cards, on made-up runs: no training."""
import json

import pytest
from conftest import ROOT, run


@pytest.fixture
def two_runs(project):
    "runs/weak and runs/strong in a copy of the project."
    from cxr_nbdev.compare import simulate_run
    from cxr_nbdev.metrics import simulate_case
    strong, t = simulate_case(n_images=40, n_detections=8, skill=.9, seed=1)
    weak = {i: {k: v[p["scores"] < .6] for k, v in p.items()} for i, p in strong.items()}
    simulate_run(project/"runs/weak", weak, t, lr=1e-3)
    simulate_run(project/"runs/strong", strong, t)
    return project


def test_compare_and_card(two_runs):
    o = run("cxr_compare runs/weak runs/strong --n_boot 50 --n_perm 50 --readme && cxr_card runs/strong", cwd=two_runs)
    r = json.loads((two_runs/"runs/compare_weak_strong/compare.json").read_text())
    assert r["differences"]["strong"]["map_50"] > 0 and "mAP@0.5" in o.stdout
    assert "[weak]" not in (two_runs/"runs/README.md").read_text() and "| weak | lr 0.001 |" in (two_runs/"runs/README.md").read_text()
    assert "not for clinical use" in (two_runs/"runs/strong/card.md").read_text()
    assert (two_runs/"runs/compare_weak_strong/figures/leaderboard.png").exists()


def test_compare_notebook(two_runs, monkeypatch, capsys):
    run("papermill nbs/05c_compare.ipynb runs/c.ipynb -p runs weak+strong -p n_boot 50 -p n_perm 50 -p pictures 0", cwd=two_runs)
    assert (two_runs/"runs/compare_weak_strong/compare.json").exists()
    from cxr_nbdev.compare import compare_main
    (two_runs/"runs/weak/predictions.json").unlink()
    monkeypatch.setenv("CXR_RUNS", str(two_runs/"runs"))
    monkeypatch.chdir(two_runs)
    assert compare_main(["weak", "strong"]) == 1 and "-p run weak" in capsys.readouterr().err


def test_unknown_parameter():
    "What papermill would do with `-p rnus weak+strong`: the notebook's check refuses it."
    from cxr_nbdev.compare import CompareConfig
    from cxr_nbdev.config import notebook_config
    cells = [c for c in json.loads((ROOT/"nbs/05c_compare.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    at = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    typed, injected = "".join(cells[at]["source"]), '# Parameters\nrnus = "weak+strong"\n'
    [check] = [source for c in cells[at+1:] if "notebook_config(In" in (source := "".join(c["source"]))]
    names = dict(In=["", typed, injected], notebook_config=notebook_config, CompareConfig=CompareConfig)
    for o in (typed, injected): exec(o, names)
    with pytest.raises(ValueError, match="did you mean `runs`"): exec(check, names)
    names["In"].pop()
    exec(check, names)
    assert names["cfg"] == CompareConfig()
