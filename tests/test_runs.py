"""What a user types to train and to evaluate: papermill and the two commands, on a small set and on real images where there are some."""
import collections
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENV, ROOT, SHARED, run
from test_docs import COMMANDS, SMALL, run_of

TINY = "-p image_size 128 -p epochs 1 -p batch_size 6"
real = pytest.mark.skipif(not (SHARED/"nih/images").is_dir(), reason=f"no real images in {SHARED}/nih (CXR_SHARED names another folder)")


def load(path): return json.loads(Path(path).read_text(encoding="utf-8"))


def outputs(path):
    "All text that a recorded notebook shows, and how many pictures."
    outs = [o for c in load(path)["cells"] for o in c.get("outputs", [])]
    return "\n".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outs), sum("image/png" in o.get("data", {}) for o in outs)


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory):
    "Sixteen synthetic images: one or two steps an epoch."
    from cxr_nbdev.synth import make_synthetic
    return make_synthetic(tmp_path_factory.mktemp("tiny")/"synthetic", n=16, size=256, seed=3)


def test_the_line(start, tiny_set):
    "Exactly the two lines of the README; the injected value is found in the run, in its record and in MLflow, whose file the run makes itself."
    line, evaluation = [o for o in COMMANDS if run_of(o) == "exp1"]
    here, env = start.folder, {"CXR_SYNTHETIC_ROOT": str(tiny_set)}
    (here/"runs/mlflow.db").unlink()
    start(line, env)
    config, metrics = load(here/"runs/exp1/config.json"), load(here/"runs/exp1/metrics.json")
    assert (config["lr"], config["run"], config["data"], config["data_resolved"], config["labels"]) == (1e-4, "exp1", "auto", "synthetic", "report")
    for k in ("class_names", "manifest_hash", "git_commit", "versions", "device"): assert k in config
    assert {"map", "map_50", "map_30", "map_plain_50", "sensitivity", "specificity", "any_finding", "per_class", "blind_floor"} == set(metrics["val"])
    assert set(metrics["val"]["blind_floor"]) == set(metrics["val"])-{"blind_floor"}
    assert all({"ap_50", "ap_30", "sensitivity", "specificity", "n_boxes", "n_images"} == set(o) for o in metrics["val"]["per_class"].values())
    assert {"n_train_images", "n_val_images", "n_train_patients", "n_val_patients", "seconds", "images_per_second"} <= set(metrics)
    assert (here/"runs/exp1/history.csv").read_text().count("\n") == config["epochs"]+1
    text, pictures = outputs(here/"runs/exp1.ipynb")
    assert "drawn by a program" in text.split("\n")[0] and "blind floor" in text and pictures >= 3
    assert "16 images" in text and {o.stem for o in (here/"runs/exp1/figures").iterdir()} == {"history", "cases", "confusion"}
    assert any(re.search(r"^lr = 0.0001$", "".join(c["source"]), re.M) for c in load(here/"runs/exp1.ipynb")["cells"] if "injected-parameters" in c["metadata"].get("tags", []))
    import mlflow
    [logged] = mlflow.MlflowClient(f"sqlite:///{here/'runs/mlflow.db'}").search_runs(["1"])
    assert (logged.data.params["lr"], logged.info.run_name, logged.info.status) == ("0.0001", "exp1", "FINISHED")

    start(f"{evaluation} -p n_boot 50", env)
    result = load(here/"runs/exp1/eval.json")
    assert result["val"]["map_50"] == metrics["val"]["map_50"] and len(result["val"]["sensitivity_ci"]) == 2 and result["subset"] == "val"
    assert result["val"]["blind_floor"]["map_50"] == metrics["val"]["blind_floor"]["map_50"]
    assert {"localization", "image_level", "operating_points", "calibration", "errors", "subgroups"} <= set(result)
    page = (here/"runs/exp1/report.html").read_text()
    words = re.sub(r"base64,[\w+/=]+", "", page).replace("http://www.w3.org", "") # the letters of a picture may spell anything
    assert "not for clinical use" in page and "http" not in words and page.count("<img") > 10
    assert start(line, env, ok=False).text.count("-p resume True")
    assert sorted(o.name for o in here.iterdir() if o.name in ("outputs", "multirun", "mlruns", "lightning_logs", "1")) == []


WRONG = {  # what is typed -> what must be said
    "-p lrr 1e-4 -p scheduler cosin -p epochs 0": "3 problems",
    "-p architecture tf_efficientdet_lite00 -p data nih -p data_root nowhere": "did you mean",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_parameters(start, words):
    "One message, a non-zero exit, and no folder left behind."
    o = start(f"papermill nbs/04_train.ipynb runs/x.ipynb {words}", ok=False)
    assert WRONG[words] in o.text and ("nowhere" in o.text or "did you mean `lr`" in o.text)
    assert not (start.folder/"runs/x").exists()


WRONG_VALUES = {  # the same in this process, where it costs no start of a kernel
    "did you mean `lr`": dict(lrr=1e-4), "3 problems": dict(lr="fast", epochs=0, scheduler="cosin"), "nowhere": dict(data="nih", data_root="nowhere"),
    "250": dict(image_size=250), "did you mean `tf_eff": dict(architecture="tf_efficientdet_lite00"), "no run `x` to resume": dict(resume=True),
    "2 problems": dict(augment="cxrr", freeze="head"), "a score lies from 0 to 1": dict(score_threshold=-1), "`folds` is 1": dict(folds=1), "cxr_train devices=2": dict(devices=2)}


@pytest.mark.parametrize("says", WRONG_VALUES)
def test_wrong_values(tmp_path, monkeypatch, small_set, says):
    from cxr_nbdev.config import parse_config
    from cxr_nbdev.train import train
    monkeypatch.setenv("CXR_RUNS", str(tmp_path))
    with pytest.raises((ValueError, OSError)) as e: train(parse_config({"run": "x", "data": "synthetic", "data_root": str(small_set), "accelerator": "cpu"} | WRONG_VALUES[says]))
    assert says in str(e.value) and not (tmp_path/"x").exists()


def test_eval_without_a_run(start):
    assert "papermill nbs/04_train.ipynb runs/exp1.ipynb" in start("papermill nbs/05_eval.ipynb runs/e.ipynb", ok=False).text


@pytest.mark.parametrize("name", ["04_train", "04a_ablation", "04b_ladder", "05_eval", "05c_compare"])
def test_help_and_defaults(name):
    "papermill explains every parameter, in the words of the config, and the cell holds the config's own defaults."
    from papermill.inspection import inspect_notebook
    from cxr_nbdev.config import EvalConfig, TrainConfig, docments, fields, parse_config
    from cxr_nbdev.ablation import AblationConfig
    from cxr_nbdev.compare import CompareConfig
    from cxr_nbdev.ladder import LadderConfig
    cls = {"04_train": TrainConfig, "04a_ablation": AblationConfig, "04b_ladder": LadderConfig, "05_eval": EvalConfig, "05c_compare": CompareConfig}[name]
    found, docs = inspect_notebook(str(ROOT/f"nbs/{name}.ipynb")), docments(cls)
    assert {k: v["help"] for k, v in found.items()} == {f.name: docs[f.name] for f in fields(cls)}
    assert parse_config({k: v["default"].strip('"') for k, v in found.items()}, cls) == cls()


@pytest.mark.parametrize("command", ["cxr_train", "cxr_eval"])
def test_help_is_quick(command):
    def once():
        t = time.perf_counter()
        assert "not for clinical use" in run([command, "--help"]).stdout
        return time.perf_counter()-t
    assert min(once() for _ in range(3)) < 2


@pytest.mark.slow
def test_finders(start):
    "Batch size and rate looked for by a run from the command line: what was found is what trains, and what the record shows; not on several devices."
    line = "cxr_train find_batch_size=true find_lr=true accelerator=cpu epochs=1 image_size=64 limit=40 architecture=tf_efficientdet_lite0 backbone='' pretrained=false"
    start(line+" run=found")
    folder = start.folder/"runs/found"
    config, (text, _) = load(folder/"config.json"), outputs(start.folder/"runs/found.ipynb")
    assert config["batch_size"] >= 4 and config["find_batch_size"] and f"batch size found: {config['batch_size']}, " in text and "learning rate found: " in text
    assert str(config["batch_size"]) in [o.split(",")[0] for o in (folder/"find_batch_size.csv").read_text().split()] and {"find_batch_size.png", "find_lr.png"} <= set(os.listdir(folder/"figures"))
    assert "times the number of devices" in start(line.replace("find_lr=true", "devices=2")+" run=two", ok=False).text


def test_sweep(start):
    "Two runs of one command, the README's, each with its record; Hydra leaves nothing of its own."
    [line] = [o for o in COMMANDS if " -m " in o]
    before = {o.name for o in start.folder.iterdir()}
    start(f"{line} run=s {SMALL}")
    assert all((start.folder/f"runs/s-{i}.ipynb").exists() for i in (0, 1))
    assert [load(start.folder/f"runs/s-{i}/config.json")["lr"] for i in (0, 1)] == [1e-4, 3e-4]
    assert {o.name for o in start.folder.iterdir()} == before
    assert "did you mean `lr`" in start("cxr_train --config-name config lrr=1e-4", ok=False).text
    assert "did you mean `config`" in start("cxr_train --config-name confog", ok=False).text


def test_predecessors_command(start, small_set, monkeypatch, capsys):
    "cxr_eval, flag by flag, the first time as it is typed; contradictions name both values, seen patients are counted and can be left out."
    from cxr_nbdev.cli import eval_main
    from cxr_nbdev.config import TrainConfig
    from cxr_nbdev.train import train
    here, [typed] = start.folder, [o for o in COMMANDS if o.startswith("cxr_eval")]
    monkeypatch.chdir(here)
    def again(line, ok=True):
        capsys.readouterr()
        assert (eval_main(shlex.split(line)[1:]) == 0) == ok
        return capsys.readouterr()
    os.environ["CXR_RUNS"] = str(here/"runs")
    try: train(TrainConfig(run="first", data="synthetic", data_root=str(small_set), image_size=128, epochs=1, backbone="efficientnet_b0", accelerator="cpu"))
    finally: del os.environ["CXR_RUNS"]
    line = typed.replace("/path/to/nih", str(small_set)) + " --num_classes 7 --image_size 128 --architecture tf_efficientdet_lite0 --backbone efficientnet_b0 --n_boot 20"
    o = start(line)
    assert "sensitivity" in o.stdout and "mAP@0.5" in o.stdout and "were in the training" in o.stderr
    [f] = (here/"runs/first").glob("eval_*.json")
    assert load(f)["labels"] == "boxes" and load(f)["n_seen_patients"] > 0
    made = f.with_suffix("")
    assert {"report.html", "predictions.json", "truth.json"} <= {o.name for o in made.iterdir()} and (made/"report/findings.csv").exists()
    point = load(f)["operating_points"]["youden"]
    assert "chosen on" in o.stdout, "the warning is shown, not only kept"
    assert point["chosen_on"] and point["warning"] and str(load(f)["n_val_patients"]-load(f)["n_seen_patients"]) in point["warning"]
    scored = again(f"cxr_eval --predictions {made}/predictions.json --annotations_file {made}/truth.json --output again.json --n_boot 20")
    assert (here/"again/report.html").exists() and (here/"again/report/findings.csv").exists()
    assert (here/"again/report/froc.png").exists() and not (here/"again/report/worst.png").exists(), "figures, but no gallery: there are no images"
    assert load(here/"again.json")["val"]["map_50"] == load(f)["val"]["map_50"] and "mAP@0.5" in scored.out
    assert "one of the two" in again(f"cxr_eval --annotations_file {made}/truth.json", ok=False).err
    o = again(line+" --only_unseen --output unseen.json --no_figures --nms soft_gaussian --soft_sigma 0.3 --max_candidates 50 --max_det 2")
    assert load(here/"unseen.json")["n_seen_patients"] == 0 and "were in the training" not in o.err
    assert load(here/"unseen.json")["postprocessing"] == dict(nms="soft_gaussian", nms_iou=0.5, soft_sigma=0.3, max_candidates=50, max_det=2, score_floor=0.0)
    boxes = lambda folder: collections.Counter(p["image_id"] for p in load(folder/"predictions.json"))
    assert max(boxes(made).values()) > 2 == max(boxes(here/"unseen").values())
    assert (here/"unseen/report/findings.csv").exists() and not list((here/"unseen/report").glob("*.png"))
    o = again(line.replace("--num_classes 7", "--num_classes 8"), ok=False)
    assert "8" in o.err and "7" in o.err and "Traceback" not in o.err
    (here/"bad.ckpt").write_bytes((here/"runs/first/best.ckpt").read_bytes()[:20000])
    assert "damaged" in again(line.replace("runs/first/best.ckpt", "bad.ckpt"), ok=False).err


def test_killed_and_resumed(start, small_set):
    "SIGKILL in the middle of an epoch; the run is taken up where its last checkpoint is."
    here = start.folder
    line = f"papermill nbs/04_train.ipynb runs/k.ipynb -p data_root {small_set} -p image_size 128 -p epochs 4 -p batch_size 6"
    p = subprocess.Popen(line.split(), cwd=here, env={**os.environ, **ENV, "CXR_NIH_ROOT": ""}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic()+300
        while not (here/"runs/k/last.ckpt").exists():
            assert p.poll() is None and time.monotonic() < until, "the run ended, or never wrote a checkpoint"
            time.sleep(.2)
    finally:
        import psutil
        for o in psutil.Process(p.pid).children(recursive=True): o.send_signal(signal.SIGKILL)
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
    assert not (here/"runs/k/metrics.json").exists()
    start("papermill nbs/04_train.ipynb runs/k.ipynb -p resume True")  # what is not given stays as it was
    assert load(here/"runs/k/config.json")["epochs"] == 4
    epochs = [int(float(row.split(",")[0])) for row in (here/"runs/k/history.csv").read_text().splitlines()[1:]]
    assert epochs == [0, 1, 2, 3] and (here/"runs/k/metrics.json").exists()
    assert "resumed after" in outputs(here/"runs/k.ipynb")[0]


def test_bad_image(tmp_path, small_set, runs):
    "A truncated image is named; with skip_bad the run goes on and counts it."
    from dataclasses import replace
    from cxr_nbdev.config import TrainConfig
    from cxr_nbdev.train import train
    root = shutil.copytree(small_set, tmp_path/"set")
    f = sorted((root/"images").iterdir())[3]
    f.write_bytes(f.read_bytes()[:2000])
    cfg = TrainConfig(run="bad", data="synthetic", data_root=str(root), image_size=128, epochs=1, accelerator="cpu")
    with pytest.raises(ValueError, match=f.name): train(cfg)
    assert not (runs/"bad").exists()
    said = []
    train(replace(cfg, skip_bad=True), show=said.append)
    assert "39 images" in said[0] and f.name in said[0] and "1 bad" in said[0]
    assert list(load(runs/"bad/config.json")["skipped"]) == [f.name]


SETTINGS = {
    "frozen": dict(image_size=96, find_batch_size=True, find_lr=True, freeze="backbone", optimizer="adam", scheduler="plateau", thaw_epoch=1, epochs=2, backbone_lr=0.1, warmup=1,
                   average="ema", accumulate=2),
    "folds": dict(folds=2, fold=1, classes="nih8", optimizer="sgd", lr=1e-3, scheduler="step", anchor_scale=0, monitor="val_loss", freeze_bn=True),
    "bf16": dict(precision="bf16", num_workers=1),
    "stops": dict(early_stop=1, monitor="map", scheduler="none", epochs=12, lr=1e-9, weight_decay=0),
}


@pytest.mark.parametrize("name", [pytest.param(o, marks=pytest.mark.slow) if o == "bf16" else o for o in SETTINGS])  # bf16 crawls on most CPUs
def test_settings(runs, tiny_set, monkeypatch, name):
    "Whole runs with the parameters that no other test turns."
    from cxr_nbdev.config import TrainConfig
    from cxr_nbdev.train import train
    from functools import partial
    import torch
    from cxr_nbdev.finders import find_batch_size, find_lr
    monkeypatch.setattr("cxr_nbdev.train.lr_range_test", partial(find_lr, steps=30))
    monkeypatch.setattr("cxr_nbdev.train.try_batch_sizes", partial(find_batch_size, largest=4))
    train(TrainConfig(**{"run": name, "data": "synthetic", "data_root": str(tiny_set), "image_size": 128, "epochs": 1, "batch_size": 4, "accelerator": "cpu", **SETTINGS[name]}))
    config, n = load(runs/name/"config.json"), (runs/name/"history.csv").read_text().count("\n")-1
    if name == "frozen":
        assert 1e-6 < config["lr"] < .3 and config["lr"] != TrainConfig().lr and not list((runs/name).glob(".lr_find*"))
        assert config["batch_size"] == 4 and [o.split(",")[0] for o in (runs/name/"find_batch_size.csv").read_text().split()] == ["batch_size", "1", "2", "4"]
        assert {"find_batch_size.png", "find_lr.png"} <= set(os.listdir(runs/name/"figures"))
    if name == "folds": assert len(config["class_names"]) == 8 and set(load(runs/name/"metrics.json")["val"]["per_class"]) == set(config["class_names"])
    ck = torch.load(runs/name/"last.ckpt", weights_only=True)
    assert all(bool(v.any()) == (name != "folds") for k, v in ck["state_dict"].items() if k.endswith("running_mean")), "frozen batch norm stands still, any other moves"
    if name == "frozen":
        opt, now, averaged = ck["optimizer_states"][0], ck["current_model_state"], ck["state_dict"]
        assert {int(o["step"]) for o in opt["state"].values()} == {1, 2} and len(opt["state"]) == sum(len(o["params"]) for o in opt["param_groups"]), "the backbone trains from the second epoch on"
        assert opt["param_groups"][2]["lr"] == pytest.approx(opt["param_groups"][0]["lr"]/10) and opt["param_groups"][2]["name"] == "backbone kernels"
        assert not all(torch.equal(now[k], averaged[k]) for k in now if "backbone" in k)
    if name == "stops": assert n < 12, "at a learning rate of 1e-9 nothing gets better for long"


def test_folds_in_one_report(runs, tiny_set):
    "Every patient is predicted once, by the run that did not train on him."
    from cxr_nbdev.config import EvalConfig, TrainConfig
    from cxr_nbdev.evaluate import eval_tables, evaluate, load_subjects, pool, predict, subject_tables
    from cxr_nbdev.train import train
    for k in range(2): train(TrainConfig(run=f"f{k}", data="synthetic", data_root=str(tiny_set), image_size=128, epochs=1, batch_size=4, folds=2, fold=k, accelerator="cpu"))
    subjects = load_subjects("f0+f1")
    t, subset, _ = eval_tables(EvalConfig(run="f0+f1"), *subjects)
    a = pool([predict(s, subject_tables(t, s, subset)) for s in subjects], t)
    assert (len(a.preds), a.n_seen, set(a.folds)) == (16, 0, {0, 1})
    m, _ = evaluate(subjects[0], a, n_boot=20)
    assert m["n_val_images"] == 16 and m["operating_points"]["youden"]["chosen_on"] == "other folds"


def test_taken_name(start, tiny_set):
    "papermill from Python, which names the record by a parameter; a second start under that name is refused and leaves the first one's record."
    here = start.folder
    (here/"go.py").write_text("import papermill\npapermill.execute_notebook('nbs/04_train.ipynb', 'runs/mine.ipynb', kernel_name='python3', parameters=dict("
                              f"PAPERMILL_OUTPUT_PATH='runs/mine.ipynb', data_root={str(tiny_set)!r}, image_size=128, epochs=1, batch_size=6))\n")
    start("python go.py")
    before = (here/"runs/mine.ipynb").read_bytes()
    assert (here/"runs/mine/record.ipynb").exists() and load(here/"runs/mine/config.json")["data_resolved"] == "synthetic"
    o = start("cxr_train --config-name config run=mine", ok=False)
    assert "resume" in o.stderr and "Traceback" not in o.stderr and (here/"runs/mine.ipynb").read_bytes() == before


def test_archives_without_a_label_table(tmp_path, small_set, monkeypatch):
    "Two patients in the archives' layout, a zipped box list, an RGBA picture of another size: everything that item 7 of a user's folder can be."
    import cv2
    from cxr_nbdev.config import TrainConfig
    from cxr_nbdev.train import get_data
    rows = (small_set/"BBox_List_2017.csv").read_text().splitlines(keepends=True)
    boxed = sorted({r.split(",")[0] for r in rows[1:]})
    two = [boxed[0], next(f for f in boxed if f[:8] != boxed[0][:8])]
    for i, f in enumerate(two):
        d = tmp_path/f"nih/images_{i*11+1:03}/images"
        d.mkdir(parents=True)
        im = cv2.imread(str(small_set/"images"/f), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(d/f), cv2.cvtColor(cv2.resize(im, (160, 160)), cv2.COLOR_GRAY2BGRA) if i else im)
    with gzip.open(tmp_path/"nih/BBox_List_2017.csv.gz", "wt") as out: out.writelines([rows[0], *(r for r in rows[1:] if r.split(",")[0] in two)])
    data = get_data(TrainConfig(data="nih", data_root=str(tmp_path/"nih"), image_size=128))
    assert (data.n_patients("train"), data.n_patients("val")) == (1, 1) and "absent" in data.says
    t = data.tables
    assert sorted(t.images.width) == [128, 160] and t.info["labels"] == "boxes"
    drawn = next(r for r in rows[1:] if r.startswith(two[1]))
    box = t.boxes[t.boxes.image_id == two[1]].iloc[0]
    assert abs(box.x1 - float(drawn.split(",")[2])*160/1024) < 1e-3


@real
def test_real_images(start, monkeypatch):
    "The shared NIH images, as a user types it, and one evaluation."
    from cxr_nbdev.config import EvalConfig
    from cxr_nbdev.evaluate import eval_tables, evaluate, load_subjects, predict
    root = SHARED/"nih"
    start(f"papermill nbs/04_train.ipynb runs/real.ipynb -p data nih -p data_root {root} -p limit 40 {TINY}")
    config = load(start.folder/"runs/real/config.json")
    assert (config["data_resolved"], config["labels"]) == ("nih", "report")
    text, _ = outputs(start.folder/"runs/real.ipynb")
    assert "source `nih`" in text.split("\n")[0]
    monkeypatch.setenv("CXR_RUNS", str(start.folder/"runs"))
    [subject], metrics = load_subjects("real"), load(start.folder/"runs/real/metrics.json")
    tables, subset, _ = eval_tables(EvalConfig(run="real"), subject)
    m, report = evaluate(subject, predict(subject, tables), n_boot=20)
    assert (subset, m["n_val_images"], m["val"]["map_50"]) == ("val", metrics["n_val_images"], metrics["val"]["map_50"])
    assert report.draw("worst"), "a gallery of real images"


@real
def test_archive_layout(tmp_path, runs):
    "images_001/images to images_012/images, gzipped tables, 1024 px PNGs (four of them RGBA): boxes scale from the 1024 frame."
    from cxr_nbdev.config import TrainConfig
    from cxr_nbdev.data import load_tables
    from cxr_nbdev.train import train
    root, there = tmp_path/"nih", sorted((SHARED/"nih/originals").glob("*.png"))
    for i, f in enumerate(there):
        d = root/f"images_{i%12+1:03}"/"images"
        d.mkdir(parents=True, exist_ok=True)
        (d/f.name).symlink_to(f)
    names = {f.name for f in there}
    rows = (SHARED/"nih/BBox_List_2017.csv").read_text().splitlines(keepends=True)
    with gzip.open(root/"BBox_List_2017.csv.gz", "wt") as out: out.writelines([rows[0], *(r for r in rows[1:] if r.split(",")[0] in names)])
    for f in ("Data_Entry_2017_v2020.csv.gz", "train_val_list.txt.gz", "test_list.txt.gz"): shutil.copy(SHARED/"nih"/f, root/f)
    t, half = load_tables("nih", root), load_tables("nih", SHARED/"nih")
    assert len(t) == len(there) and t.info["labels"] == "report"
    both = t.boxes.merge(half.boxes, on=["image_id", "label"], suffixes=("", "_512"))
    size = t.images.set_index("image_id").width[both.image_id].to_numpy()
    assert len(both) and (abs(both.x1/size - both.x1_512/512) < 1e-6).all()
    m = train(TrainConfig(run="a", data="nih", data_root=str(root), image_size=128, epochs=1, accelerator="cpu"))
    assert load(runs/"a/config.json")["data_resolved"] == "nih" and m["n_train_images"]+m["n_val_images"] == len(there)


@real
def test_boxes_alone(tmp_path, runs):
    "Two patients, `images/` and the box list: enough, and it is said that unboxed counts as absent."
    from cxr_nbdev.config import TrainConfig
    from cxr_nbdev.train import train
    root, there = tmp_path/"two", sorted((SHARED/"nih/images").glob("*.png"))
    (root/"images").mkdir(parents=True)
    two = [there[0], next(f for f in there if f.name[:8] != there[0].name[:8])]
    for f in two: (root/"images"/f.name).symlink_to(f)
    rows = (SHARED/"nih/BBox_List_2017.csv").read_text().splitlines(keepends=True)
    (root/"BBox_List_2017.csv").write_text("".join([rows[0], *(r for r in rows[1:] if r.split(",")[0] in {f.name for f in two})]))
    said = []
    metrics = train(TrainConfig(run="two", data_root=str(root), image_size=128, epochs=1, batch_size=6, accelerator="cpu"), show=said.append)
    assert load(runs/"two/config.json")["labels"] == "boxes" and (metrics["n_train_patients"], metrics["n_val_patients"]) == (1, 1)
    assert "absent" in said[0]


@pytest.mark.slow
def test_runs_that_start_at_once(tmp_path):
    "Three first runs of a folder make one MLflow file, and all are in it."
    code = """
import sys, time
from pathlib import Path
from cxr_nbdev.run import Run, mlflow_logger
import mlflow.store.tracking.sqlalchemy_store, pytorch_lightning.loggers
home, name = Path(sys.argv[1]), sys.argv[2]
(home/name).mkdir()
while sum(o.is_dir() for o in home.iterdir()) < 3: time.sleep(.005) # until all of them are ready
mlflow_logger(Run(name, home/name))
"""
    env = {**os.environ, "CXR_RUNS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), n], env=env, stderr=subprocess.PIPE, text=True) for n in "abc"]
    said = [p.communicate(timeout=600)[1] for p in started]
    assert not any(p.returncode for p in started), "\n".join(said)
    import mlflow
    logged = mlflow.MlflowClient(f"sqlite:///{tmp_path/'mlflow.db'}").search_runs(["1"])
    assert {o.info.run_name for o in logged} == set("abc")


@pytest.mark.slow
def test_make_run(project):
    "The main job: within its time, and it has visibly learnt."
    (project/".venv").symlink_to(ROOT/".venv")
    t = time.perf_counter()
    o = run(["make", "-o", ".venv/installed", "run"], cwd=project, env={"OMP_NUM_THREADS": "2", "CXR_NIH_ROOT": "", "CXR_SYNTHETIC_ROOT": ""}, timeout=1500)
    took = time.perf_counter()-t
    val = load(project/"runs/demo/metrics.json")["val"]
    floor = val["blind_floor"]["map_50"]
    assert val["map_50"] >= floor+0.10 and val["map_50"] >= 2*floor, f"{val['map_50']} against a floor of {floor}"
    assert "blind floor" in o.stdout and (project/"runs/demo.html").exists() and (project/"runs/demo_eval.html").exists()
    assert took < 600, f"make run took {took:.0f} s"
