"""cxr_predict as a newcomer uses it: good files and bad ones, names that collide, and mistakes on the command line."""
import csv
import json
import shutil
import sys

import cv2
import numpy as np
import pytest
from conftest import SHARED, run

RULE = "fp_per_image<=0.5"
CLASSES = ("Cardiomegaly", "Effusion")


class Halves:
    "Builds a detector that finds the left and the right half, and the more surely the brighter they are; its class is made on first use."
    made = None

    def __call__(self, name, classes, image_size, backbone="", pretrained=False, anchor_scale=4., mean=(.5,), std=(.25,)):
        if not Halves.made:
            import torch
            from cxr_nbdev.model import Detector

            class Two(Detector):
                def __init__(self, classes, image_size):
                    super().__init__(classes, image_size, (.5,), (.25,))
                    self.name = "halves"

                def detect(self, x):
                    s, w = self.image_size, self.image_size/2
                    score = torch.sigmoid(torch.stack([x[..., :s//2].mean((1, 2, 3)), x[..., s//2:].mean((1, 2, 3))], 1))
                    boxes, order = torch.tensor([[0, 0, w, s], [w, 0, s, s]]).float(), score.argsort(1, descending=True)
                    return [dict(boxes=boxes[o], scores=v[o], labels=o) for v, o in zip(score, order)]
            Halves.made = Two
        return Halves.made(classes, image_size)


def points(thresholds, rule=RULE):
    return {rule: dict(format=1, rule=rule, score="max", floor=None, classes=list(CLASSES), points={c: dict(threshold=t) for c, t in zip((*CLASSES, "any_finding"), thresholds)})}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "Checkpoint files: one with operating points and calibration, one with neither."
    from cxr_nbdev import model
    monkeypatch.setitem(model.DETECTORS, "halves", Halves())
    det = Halves()("halves", CLASSES, 64)
    cal = dict(format=1, kind="detections", method="platt", classes=list(CLASSES),
               fits={"Cardiomegaly": dict(method="platt", a=1., b=-1.), "Effusion": dict(method="none", reason="few"), "all_classes": dict(method="none")})
    return dict(full=model.save_detector(tmp_path/"full.safetensors", det, extra=dict(operating_points=points((.5, None, .5)), calibration=cal)),
                bare=model.save_detector(tmp_path/"bare.ckpt", det, extra=dict(score_threshold=.4)))


@pytest.fixture
def folder(tmp_path):
    "Two images, of which one is bright on the left, and four files that are none."
    at = tmp_path/"in"
    at.mkdir()
    im = np.random.default_rng(0).integers(0, 60, (120, 90)).astype(np.uint8)
    cv2.imwrite(str(at/"dark.png"), im)
    im[:, :45] += 190
    cv2.imwrite(str(at/"left.jpg"), im)
    (at/"empty.png").write_bytes(b"")
    (at/"text.png").write_text("Dear doctor")
    (at/"cut.png").write_bytes((at/"dark.png").read_bytes()[:-40])
    (at/"scan.dcm").write_bytes(b"\0"*128+b"DICM"+b"\1"*50)
    return at


def predict(*args):
    from cxr_nbdev.predict import predict_main
    return predict_main([str(a) for a in args])


def test_end_to_end(folder, weights, tmp_path, capsys):
    out = tmp_path/"out"
    assert predict(folder, "--weights", weights["full"], "--output", out) == 1
    says, errors = capsys.readouterr()
    assert "Research only, not for clinical use." in says and "nothing called; the strongest" in says and "Traceback" not in errors
    for name, why in (("empty.png", "is empty"), ("text.png", "is not an image"), ("cut.png", "truncated PNG"), ("scan.dcm", "")):
        assert [o for o in errors.splitlines() if name in o and why in o], f"{name} is not explained:\n{errors}"
    r, rows = json.loads((out/"findings.json").read_text()), list(csv.DictReader((out/"findings.csv").open()))
    assert [o["file"].rsplit("/")[-1] for o in r["images"]] == ["dark.png", "left.jpg"] and len(r["failed"]) == 4
    assert r["rule"] == RULE and r["thresholds"] == {"Cardiomegaly": .5, "Effusion": None, "any_finding": .5} and len(r["weights"]["sha256"]) == 64
    assert [(o["finding"], o["called"], o["x1"], o["x2"], o["y2"]) for o in rows] == [("Cardiomegaly", "1", "0.0", "45.0", "120.0")] and 0 < float(rows[0]["probability"]) < 1
    left = r["images"][1]
    assert (left["width"], left["height"]) == (90, 120) and left["findings"]["Cardiomegaly"]["called"] and not left["findings"]["Effusion"]["called"]
    assert [o["probability"] is None for o in left["boxes"]] == [False, True], "no calibration, no probability"
    h, w = cv2.imread(str(out/left["picture"])).shape[:2]
    assert h > w and not list(out.rglob("*.tmp"))


def test_all_good_is_status_0(folder, weights, tmp_path, capsys):
    assert predict(folder/"left.jpg", folder/"dark.png", "--weights", weights["full"], "--output", tmp_path/"o", "--all", "--no_pictures") == 0
    assert len((tmp_path/"o/findings.csv").read_text().splitlines()) == 5 and not (tmp_path/"o/pictures").exists()
    assert not capsys.readouterr().err


def test_same_names(folder, weights, tmp_path, capsys):
    (tmp_path/"b").mkdir()
    shutil.copy(folder/"dark.png", tmp_path/"b/left.jpg")
    shutil.copy(folder/"dark.png", tmp_path/"b/left_2.png")
    assert predict(folder/"left.jpg", tmp_path/"b/left.jpg", tmp_path/"b/left_2.png", "--weights", weights["full"], "--output", tmp_path/"o") == 0
    pictures = [o["picture"] for o in json.loads((tmp_path/"o/findings.json").read_text())["images"]]
    assert len(set(pictures)) == 3 and all((tmp_path/"o"/o).is_file() for o in pictures)


def test_a_second_run_replaces_the_first(folder, weights, tmp_path):
    common = ("--weights", weights["full"], "--output", tmp_path/"o")
    predict(folder/"left.jpg", *common)
    (tmp_path/"o/pictures/mine.png").write_bytes(b"x")
    predict(folder/"dark.png", *common)
    assert sorted(o.name for o in (tmp_path/"o/pictures").iterdir()) == ["dark.png", "mine.png"]


@pytest.mark.parametrize("args, says", [(["gone.png"], "is not there"), (["void"], "there is no image in"), (["in/dark.png", "--rule", "fp_per_image<=0.4"], f"did you mean `{RULE}`"),
                                        (["in/dark.png", "--threshold", "7"], "from 0 to 1"), (["in/dark.png", "--threshold", ".5", "--rule", RULE], "not both"),
                                        (["in/dark.png", "--weights", "nowhere.ckpt"], "nowhere.ckpt is not there"), (["in/dark.png", "--output", "in/dark.png"], "is a file")])
def test_mistakes(folder, weights, tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"void").mkdir()
    assert predict(*args, *([] if "--weights" in args else ["--weights", weights["full"]])) == 1
    err = capsys.readouterr().err
    assert err.startswith("cxr: ") and says in err and "Traceback" not in err and not (tmp_path/"predictions").exists()


def test_no_weights_at_all(folder, monkeypatch, capsys):
    from cxr_nbdev import predict as module
    monkeypatch.setattr(module, "list_weights", lambda: [])
    assert predict(folder/"dark.png") == 1 and "--weights runs/NAME/best.ckpt" in capsys.readouterr().err
    monkeypatch.setattr(module, "list_weights", lambda: ["a", "nih7_lite0"])
    assert module.default_weights() == "nih7_lite0"


def test_without_operating_points(folder, weights, tmp_path, capsys):
    assert predict(folder/"left.jpg", "--weights", weights["bare"], "--output", tmp_path/"o") == 0
    r = json.loads((tmp_path/"o/findings.json").read_text())
    assert r["rule"] == "score>=0.4" and not r["calibrated"] and "simple facts only" in r["look_checked"] and r["images"][0]["boxes"][0]["probability"] is None
    assert predict(folder/"left.jpg", "--weights", weights["bare"], "--rule", RULE) == 1
    assert "has no operating points" in capsys.readouterr().err


def test_warnings(folder, weights, tmp_path, capsys):
    a = np.zeros((40, 200, 3), np.uint8)
    a[:, :100, 0] = 255
    cv2.imwrite(str(folder/"flag.png"), a)
    assert predict(folder/"flag.png", "--weights", weights["full"], "--output", tmp_path/"o") == 0
    [im] = json.loads((tmp_path/"o/findings.json").read_text())["images"]
    assert len(im["warnings"]) == 2 and "WARNING: has colours" in capsys.readouterr().out


def test_dicom(weights, tmp_path):
    pytest.importorskip("pydicom", reason="DICOM readers are an extra: pip install cxr_nbdev[dicom]")
    from cxr_nbdev.predict import predict_images
    from test_dicom import film, write
    write(tmp_path/"scan.dcm", film(0)[0])
    [im] = predict_images(tmp_path/"scan.dcm", weights["full"])["images"]
    assert (im["width"], im["height"]) == (96, 96) and len(im["boxes"]) == 2


@pytest.mark.skipif(not (SHARED/"dicom").is_dir(), reason="needs the shared folder with real images")
def test_real_dicom(weights):
    pytest.importorskip("pydicom", reason="DICOM readers are an extra: pip install cxr_nbdev[dicom]")
    from cxr_nbdev.predict import predict_images
    r = predict_images(SHARED/"dicom", weights["full"])
    assert len(r["images"]) == 2 and not r["failed"] and not any(o["warnings"] for o in r["images"])


def test_command_and_what_it_imports(folder, tmp_path):
    "An EfficientDet in a process of its own, which must not wait for what only training needs."
    from cxr_nbdev.model import create_detector, save_detector
    save_detector(tmp_path/"lite0.ckpt", create_detector("tf_efficientdet_lite0", CLASSES, 64))
    code = ("import sys; from cxr_nbdev.predict import predict_main; s = predict_main(sys.argv[1:]); "
            "print(*(m for m in ('pytorch_lightning', 'lightning', 'mlflow', 'papermill', 'sklearn', 'albumentations', 'seaborn', 'torchmetrics', 'scipy.stats') if m in sys.modules)); sys.exit(s)")
    o = run([sys.executable, "-W", "error", "-c", code, folder/"left.jpg", "--weights", tmp_path/"lite0.ckpt", "--output", tmp_path/"o"], cwd=tmp_path)
    assert o.stdout.splitlines()[-1] == "" and not o.stderr, o.text[-2000:]
