"""Comparing runs and writing cards, on made-up runs: no training."""
import json

import pytest
from conftest import run


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


def test_compare_notebook(two_runs):
    run("papermill nbs/05c_compare.ipynb runs/c.ipynb -p runs weak+strong -p n_boot 50 -p n_perm 50 -p pictures 0", cwd=two_runs)
    assert (two_runs/"runs/compare_weak_strong/compare.json").exists()
    assert "did you mean `runs`" in run("papermill nbs/05c_compare.ipynb runs/c.ipynb -p rnus weak+strong", cwd=two_runs, ok=False).text
    (two_runs/"runs/weak/predictions.json").unlink()
    assert "-p run weak" in run("cxr_compare weak strong", cwd=two_runs, ok=False).stderr
