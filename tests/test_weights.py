"""The weights that come with the package: small, described, loaded by name, and worth what the record says."""
import json

import pytest
from conftest import ROOT, SHARED

from cxr_nbdev.data import shipped_file
from cxr_nbdev.model import list_weights, load_detector, read_checkpoint


@pytest.mark.parametrize("name", list_weights())
def test_shipped(name):
    "Under 15 MB, with operating points, calibration, the look of the training images, who was trained on, and a card that names this very file."
    import hashlib
    path = shipped_file("weights", f"{name}.safetensors")
    header, _ = read_checkpoint(name)
    assert path.stat().st_size < 15e6
    assert {"operating_points", "calibration", "look", "train_patients", "blind_floor", "manifest_hash", "licence", "images", "recipe"} <= set(header["extra"])
    assert (ROOT/header["extra"]["recipe"]).is_file() or not (ROOT/"configs").is_dir()
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] in card and "not for clinical use" in card


def test_by_name(monkeypatch, tmp_path):
    "A drawn film is predicted by the name alone; a training can start from it, and an evaluation writes to runs/, not into the package."
    import torch
    from cxr_nbdev.synth import synth_image
    det = load_detector("nih7_lite0")
    film = torch.from_numpy(synth_image(3, size=det.image_size)[0])[None, None]
    [p] = det.predict(film)
    monkeypatch.setenv("CXR_RUNS", str(tmp_path))
    from cxr_nbdev.evaluate import find_checkpoint, load_subject
    from cxr_nbdev.startfrom import find_start
    assert find_start("nih7_lite0") == find_checkpoint(checkpoint="nih7_lite0")[0] == shipped_file("weights", "nih7_lite0.safetensors")
    assert load_subject("nih7_lite0").folder == tmp_path/"nih7_lite0"
    assert len(p["scores"]) and det.classes[4] == "Nodule/Mass" and 0 < float(p["scores"][0]) < 1


def test_record_without_films():
    "The notebook that recorded the training keeps its curves and its confusion matrix, and no picture of a real film."
    book = json.loads((ROOT/"runs/nih7_lite0_record.ipynb").read_text(encoding="utf-8"))
    kept = [(c["id"], k) for c in book["cells"] for o in c.get("outputs", []) for k in o.get("data", {}) if k.startswith("image/")]
    [maker] = [c["id"] for c in book["cells"] if "figures = make_figures(" in "".join(c["source"])]
    assert kept == [(maker, "image/png")]*2 and "a picture, left out" in json.dumps(book) and "<img" not in json.dumps(book)
    assert "fold = 0" in "".join("".join(c["source"]) for c in book["cells"] if "injected-parameters" in c["metadata"].get("tags", []))


@pytest.mark.skipif(not (SHARED/"nih/images").is_dir(), reason="needs the real images beside the repository")
def test_worth_what_the_record_says():
    "On the fold that it has not seen the numbers of runs/nih7_lite0.json come out again."
    from cxr_nbdev.data import load_tables
    from cxr_nbdev.evaluate import choose_subset, load_subject, predict
    from cxr_nbdev.metrics import evaluate_detections
    s = load_subject("nih7_lite0")
    t = choose_subset(load_tables("nih", SHARED/"nih", "nih7"), "unseen", s)
    was = json.loads((ROOT/"runs/nih7_lite0.json").read_text(encoding="utf-8"))["eval"]
    assert len(t) == was["n_val_images"] == 135 and t.images.patient_id.nunique() == was["n_val_patients"]
    now = evaluate_detections(predict(s, t).preds, t)
    assert [now[k] for k in ("map_50", "map_30")] == pytest.approx([was["val"][k] for k in ("map_50", "map_30")], abs=2e-3)
