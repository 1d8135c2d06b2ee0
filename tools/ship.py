"""Makes the weights of a finished run part of the package: `python tools/ship.py RUN NAME`.

What is taken is the end of the training (last.ckpt), not the epoch that did best on the validation patients. The file gets what a user needs beside the weights: operating points and calibration, chosen on
the run's validation patients with the rounded weights, and how the detector's features look on training images. The card beside it is written from an evaluation of the very file that ships."""
import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import pandas as pd

from cxr_nbdev.calibrate import fit_calibration, scored_detections
from cxr_nbdev.card import write_card
from cxr_nbdev.data import shipped_file
from cxr_nbdev.evaluate import evaluate, load_subject, predict
from cxr_nbdev.fullreport import RULES
from cxr_nbdev.model import load_detector, read_checkpoint, save_detector
from cxr_nbdev.module import predict_dataset
from cxr_nbdev.operate import choose_points, operating
from cxr_nbdev.predict import fit_look
from cxr_nbdev.run import Run, read_json, runs_dir, write_json
from cxr_nbdev.rundata import get_data
from cxr_nbdev.config import TrainConfig, parse_config

LIMIT = 15e6  # bytes: what a repository bears


def write_record(run, name):
    "Settings, epochs and evaluation of the run, and of the one that it began with, in one file that is no run of that name."
    def one(folder): return dict(config={k: v for k, v in Run("", folder).config.items() if k != "data_root"}, history=pd.read_csv(folder/"history.csv").to_dict("list"))
    began = Run("", runs_dir()/run).config["started_from"]
    before = {"started_from": one(runs_dir()/began["run"])} if began and (runs_dir()/began["run"]).is_dir() else {}
    write_json(runs_dir()/f"{name}.json", dict(one(runs_dir()/run), **before, eval=read_json(runs_dir()/run/"eval.json")))


FREE = ("history", "confusion")  # figures of a run that show no film


def write_notebook(run, name):
    """The notebook that recorded the training, less all its pictures but the run's own figures that are free of films, and without the folder of the images.
    It has another name than the run's own record, which is not to be committed."""
    path, folder = runs_dir()/f"{run}.ipynb", runs_dir()/run
    if not path.is_file(): return print(f"{path} is not there, so {name}_record.ipynb stays as it is: was the run trained without a notebook?")
    book, root = read_json(path), Run("", folder).config.get("data_root")
    for c in book["cells"]:
        for o in c.get("outputs", []):
            if "<img" in "".join(o.get("data", {}).get("text/html", "")): sys.exit(f"{path}: an output holds a picture within HTML, which this can't look into")
            if any(k.startswith("image/") for k in o.get("data", {})): o["data"] = {"text/plain": ["(a picture, left out: it may show real films)"]}
        if "figures = make_figures(" in "".join(c["source"]):
            c["outputs"] = [dict(output_type="display_data", metadata={}, data={"image/png": b64encode((folder/f"figures/{k}.png").read_bytes()).decode(), "text/plain": [f"<{k}>"]}) for k in FREE]
    for k in ("input_path", "output_path"): book["metadata"].get("papermill", {}).pop(k, None)
    text = json.dumps(book, indent=1, ensure_ascii=False)
    (runs_dir()/f"{name}_record.ipynb").write_text((text.replace(root, "/path/to/nih") if root else text)+"\n", encoding="utf-8")


def ship(run, name):
    folder, path = runs_dir()/run, shipped_file("weights", f"{name}.safetensors")
    record = Run(run, folder).config
    cfg = parse_config({k: v for k, v in record.items() if k in TrainConfig.__dataclass_fields__})
    data = get_data(replace(cfg, resume=False), "cpu")
    if data.split.hash != record["manifest_hash"]: sys.exit(f"these images are split into {data.split.hash}, the run was trained on {record['manifest_hash']}")
    header, _ = read_checkpoint(folder/"last.ckpt")
    facts = dict(header["extra"], name=name, epochs=record["epochs"], recipe=f"configs/{name}.yaml", started_from=record["started_from"], licence="Apache-2.0",
                 images="NIH ChestX-ray14, NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC; Wang et al., CVPR 2017")
    save_detector(path, load_detector(folder/"last.ckpt"), facts)
    detector = load_detector(path)                                               # rounded, as everybody will have it
    preds = predict_dataset(detector, data.val, cfg.batch_size)
    facts |= dict(operating_points={rule: choose_points(operating(preds, data.val.tables), rule) for rule in RULES},
                  calibration=fit_calibration(scored_detections(preds, data.val.tables)), look=fit_look(detector, data.train))
    save_detector(path, detector, facts)
    if path.stat().st_size > LIMIT: sys.exit(f"{path} has {path.stat().st_size/1e6:.1f} MB, more than {LIMIT/1e6:.0f}")
    subject = load_subject(path)
    m, _ = evaluate(subject, predict(subject, data.val.tables))
    with tempfile.TemporaryDirectory() as d:
        here = Path(d)/name
        here.mkdir()
        for o in ("config.json", "history.csv", "split.csv"): shutil.copyfile(folder/o, here/o)
        write_json(here/"eval.json", dict(m, subset="val"))
        write_card(here, path.with_suffix(".md"))
        shutil.copyfile(here/"eval.json", folder/"eval.json")
    write_record(run, name)
    write_notebook(run, name)
    card, path = path.with_suffix(".md"), path.chmod(0o644) or path
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    card.write_text(card.read_text(encoding="utf-8").replace("**checkpoint:** not in the run's folder", f"**checkpoint:** {path.name}, the weights after the last epoch in half precision, sha256 {digest}"), encoding="utf-8")
    print(f"{path}: {path.stat().st_size/1e6:.1f} MB; card: {path.with_suffix('.md').name}")
    return m


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run")
    p.add_argument("name")
    a = p.parse_args()
    m = ship(a.run, a.name)
    print({k: (round(m["val"][k], 3), m["val"][f"{k}_ci"]) for k in ("map_30", "map_50")})
