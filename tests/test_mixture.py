"""Two sources in one run: the README's line, what its record says, and the evaluation of what it made; implanted films beside their originals."""
import json
import re
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
from test_docs import COMMANDS

SHARED_IMAGES, OWN_IMAGES = 3, 4


@pytest.fixture
def chestxdet(small_set, tmp_path):
    "A folder in ChestX-Det's form: three of the small set's films under other names, and four of its own."
    from cxr_nbdev.synth import make_synthetic
    folder, other = tmp_path/"chestxdet", make_synthetic(tmp_path/"other", n=OWN_IMAGES, size=128, seed=9)
    (folder/"train_data").mkdir(parents=True)
    films = [*sorted((small_set/"images").glob("*.png"))[:SHARED_IMAGES], *sorted((other/"images").glob("*.png"))]
    entries = []
    for i, film in enumerate(films):
        name = f"{90001+i}.png"
        shutil.copy(film, folder/"train_data"/name)
        entries.append(dict(file_name=name, syms=["Effusion", "Fracture"], boxes=[[100, 600, 300, 900], [500, 100, 600, 200]], polygons=[[], []]))
    (folder/"ChestX_Det_train.json").write_text(json.dumps(entries))
    return folder


def test_mixture(runs, small_set, chestxdet):
    "The parameters of the README's line: what two sources share is trained on once, patients stay on one side, and the run can be evaluated."
    from cxr_nbdev.config import EvalConfig, parse_config
    from cxr_nbdev.evaluate import eval_tables, load_subjects
    from cxr_nbdev.train import train
    [line] = [o for o in COMMANDS if "runs/mixed.ipynb" in o]
    values = dict(re.findall(r"-p (\w+) (\S+)", line.replace("/path/to/nih", str(small_set)).replace("/path/to/chestxdet", str(chestxdet))))
    assert list(values) == ["data", "data_root"]
    train(parse_config({**values, "run": "mixed", "epochs": 1, "image_size": 64, "num_workers": 0, "classes": "nih8", "accelerator": "cpu"}), show=lambda line: None)
    run = runs/"mixed"
    config, split = json.loads((run/"config.json").read_text()), pd.read_csv(run/"split.csv")
    assert config["data_resolved"] == "nih+chestxdet" and config["overlap"] == "drop" and config["labels"] == "mixed"
    assert f"{SHARED_IMAGES} images of chestxdet" in config["data_says"]
    assert len(split) == 40+OWN_IMAGES and (split.groupby("patient").subset.nunique() == 1).all()
    assert set(split.image_id[split.image_id.str.startswith("9000")]) == {f"{90001+SHARED_IMAGES+i}.png" for i in range(OWN_IMAGES)}
    assert pd.read_csv(run/"overlap.csv").dropped.tolist() == [f"{90001+i}.png" for i in range(SHARED_IMAGES)]
    [subject] = load_subjects("mixed")
    tables, subset, _ = eval_tables(EvalConfig(run="mixed"), subject)
    assert subset == "val" and set(tables.images.image_id) == set(split.image_id[split.subset == "val"])


def test_unknown_is_not_absent(chestxdet, small_set):
    "A map that says `unknown` for a source keeps its images from teaching that class's absence."
    from cxr_nbdev.data import CLASS_SETS
    from cxr_nbdev.config import TrainConfig
    from cxr_nbdev.rundata import get_data
    CLASS_SETS["two"] = {"Effusion": {"nih": "Effusion", "chestxdet": "Effusion"}, "Nodule": {"nih": "Nodule", "chestxdet": "unknown"}}
    try: data = get_data(TrainConfig(data="nih+chestxdet", data_root=f"nih={small_set}+chestxdet={chestxdet}", classes="two", image_size=64, accelerator="cpu"))
    finally: del CLASS_SETS["two"]
    for side in (data.train, data.val):
        theirs = side.tables.images.source.eq("chestxdet").to_numpy()
        assert side.ignore[theirs, 1].all() and not side.ignore[theirs, 0].any()
        assert not side.ignore[~theirs, 1].all()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    "Thirty drawn films as if they were NIH's: the folder says no longer that they are drawn."
    from cxr_nbdev.synth import make_synthetic
    folder = make_synthetic(tmp_path_factory.mktemp("originals")/"nih", n=30, size=128, seed=1)
    (folder/"synthetic.json").unlink()
    return folder


@pytest.fixture(scope="module")
def implanted(originals):
    "Their normal films, most of them with a disc for a finding: how it is drawn (seconds a film) is tried in 00cb, here it is where such films go."
    from cxr_nbdev import implant

    def disc(im, name, rng):
        x, y = rng.integers(30, 98, 2)
        r = 12 if name == "Mass" else 8
        return cv2.circle(im.copy(), (int(x), int(y)), r, 230, -1), np.float32([x-r, y-r, x+r, y+r])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(implant, "implant", disc)
        return implant.implant_set(originals, originals.parent/"implanted", share=.8, seed=1)


@pytest.fixture
def asked(originals, implanted):
    "The parameters of a run on both, all films of both."
    from cxr_nbdev.config import TrainConfig
    return TrainConfig(data="nih+implanted", data_root=f"nih={originals}+implanted={implanted}", data_options="nih.keep=all", classes="nih8", image_size=64, batch_size=8, epochs=1,
                       num_workers=0, val_fraction=.3, accelerator="cpu")


def honest(data, plain):
    "Whatever was asked for: the validation is that of a run without them, and no patient is on both sides."
    im = data.tables.images
    assert data.split.val == plain.split.val and set(data.val.tables.images.source) == {"nih"}
    assert set(data.train.tables.images.patient_id).isdisjoint(data.val.tables.images.patient_id)
    assert len(im) == len(data.train.tables)+len(data.val.tables) and (im.source == "nih").sum() == len(plain.tables)
    assert data.implanted["trained_on"] == (im.source == "implanted").sum() > 0
    assert f"{data.implanted['trained_on']} implanted films are trained on; {data.implanted['left_out']} left out because their patients validate." in data.says
    return data


@pytest.mark.slow
def test_implanted_run(runs, asked, originals, implanted, monkeypatch):
    "Nothing but `data` and `data_root` as 00cb says them: the record counts, the split is found again, and both ways of evaluating take the same images."
    from cxr_nbdev.config import EvalConfig, TrainConfig
    from cxr_nbdev.data import load_tables
    from cxr_nbdev.evaluate import choose_subset, eval_tables, load_subjects, predict
    from cxr_nbdev.implant import load_implanted
    from cxr_nbdev.nih import load_image_folder
    from cxr_nbdev.train import train
    usual = replace(asked, run="implanted", data_options=TrainConfig.data_options, val_fraction=TrainConfig.val_fraction)
    monkeypatch.setattr("cxr_nbdev.train.make_figures", lambda *args: {})
    train(usual, show=lambda line: None)
    config, split = json.loads((runs/"implanted/config.json").read_text()), pd.read_csv(runs/"implanted/split.csv")
    made, counts = set(split.image_id)-set(load_tables("nih", originals).images.image_id), config["implanted"]
    assert counts["trained_on"] == len(made) > 5 and sum(counts.values()) == len(load_implanted(implanted)) and not (runs/"implanted/overlap.csv").exists()
    assert "implanted films are trained on" in config["data_says"] and "about drawn findings" not in config["data_says"]
    assert set(split.subset[split.image_id.isin(made)]) == {"train"} and (split.groupby("patient").subset.nunique() == 1).all()
    [subject], validated = load_subjects("implanted"), set(split.image_id[split.subset == "val"])
    for subset in ("auto", "unseen"):
        t, _, says = eval_tables(EvalConfig(run="implanted", subset=subset), subject)
        assert set(t.images.image_id) == validated and predict(subject, t).n_seen == 0
    t, _, says = eval_tables(EvalConfig(run="implanted", subset="all"), subject)
    assert set(t.images.source) == {"nih"} and f"{sum(counts.values())} implanted films are for training and are left out" in says
    folder = load_image_folder(originals/"images", originals/"BBox_List_2017.csv", classes="nih8")  # as cxr_eval --only_unseen does
    assert set(choose_subset(folder, "unseen", subject).images.image_id) == validated


def test_implanted_films_follow_their_patients(asked, originals, implanted, tmp_path):
    "Held-out patients by fraction, fold, manifest and official list: their implanted films are nowhere, and everybody else's are trained on."
    from cxr_nbdev.data import load_tables
    from cxr_nbdev.folds import write_folds
    from cxr_nbdev.rundata import get_data
    from cxr_nbdev.split import patient_hash
    made = load_tables("implanted", implanted, "nih8").images
    folder = shutil.copytree(originals, tmp_path/"listed")
    t = load_tables("nih", folder, "nih8", keep="all")
    tested = {p for p, n in t.images.patient_id.value_counts().items() if p in set(made.patient_id)} - set(made.patient_id[4:])
    for name, own in (("train_val_list.txt", ~t.images.patient_id.isin(tested)), ("test_list.txt", t.images.patient_id.isin(tested))):
        (folder/name).write_text("\n".join(t.images.image_id[own]))
    mine = write_folds(t, 3, 1, tmp_path/"mine.csv")
    asked = replace(asked, data_root=f"nih={folder}+implanted={implanted}")
    for more in (dict(), dict(folds=3, fold=1), dict(split="nih5"), dict(split=str(tmp_path/"mine.csv"), fold=2), dict(split="official"), dict(overlap="refuse"), dict(overlap="keep")):
        cfg = replace(asked, **more)
        data = honest(get_data(cfg), get_data(replace(cfg, data="nih", data_root=str(folder), data_options="keep=all")))
        assert len(data.dropped) == (0 if cfg.overlap == "keep" else (~made.implanted).sum()) and sum(data.implanted.values()) == len(made)-len(data.dropped)
        if cfg.split == "official": assert set(data.val.tables.images.patient_id) == tested
        if cfg.split.endswith("csv"): assert data.implanted["left_out"] == sum(mine.of(patient_hash(p)) == 2 for p in made.patient_id[made.implanted])
    few = get_data(replace(asked, limit=24))
    assert few.implanted["trained_on"] and set(few.val.tables.images.source) == {"nih"} and set(few.train.tables.images.patient_id).isdisjoint(few.val.tables.images.patient_id)


def renamed(implanted, folder, number, made_from):
    "The set again, where every patient has another number."
    shutil.copytree(implanted, folder)
    head, *rows = (folder/"Data_Entry_2017_v2020.csv").read_text().splitlines()
    cells = [row.split(",") for row in rows]
    for c in cells: c[3], c[-1] = number(c[3]), made_from(c[-1])
    (folder/"Data_Entry_2017_v2020.csv").write_text("\n".join([head, *map(",".join, cells)])+"\n")
    return folder


@pytest.mark.parametrize("lost", ["number", "number and original"])
def test_no_original_leaks_through_another_number(lost, asked, originals, implanted, tmp_path):
    "A set whose patients go by other numbers: `made_from` gives them away, and without it the pixels."
    from cxr_nbdev.rundata import get_data
    other = renamed(implanted, tmp_path/"other", lambda p: f"5{int(p):04}", str if lost == "number" else lambda name: f"x{name}")
    data = get_data(replace(asked, data_root=f"nih={originals}+implanted={other}"))
    same, plain = get_data(asked), get_data(replace(asked, data="nih", data_root=str(originals), data_options="keep=all"))
    if lost == "number": assert honest(data, plain).implanted == same.implanted and "patient ids joined" in data.says
    theirs = data.train.tables.images[data.train.tables.images.source == "implanted"]
    unknown = theirs[theirs.patient_id.str.len() == 5]                # whom neither name nor pixels gave away
    assert len(unknown) <= (0 if lost == "number" else 1)
    held = set(data.val.tables.images.patient_id)
    assert not held & set(theirs.patient_id) and set(data.val.tables.images.source) == {"nih"}


SAID = "about drawn findings, not about disease"


def test_implanted_alone(asked, implanted):
    "There is nothing else to validate on: it works, and says what its numbers are about."
    from cxr_nbdev.evaluate import Answers, evaluate_answers
    from cxr_nbdev.metrics import blind_floor, floor_predictions
    from cxr_nbdev.rundata import get_data
    data = get_data(replace(asked, data="implanted", data_root=str(implanted), data_options=""))
    assert SAID in data.says and data.implanted == {} and len(data.val) > 1
    guess = floor_predictions(blind_floor(data.train.tables), data.val.tables)
    assert any(SAID in w for w in evaluate_answers(Answers(guess, data.val.tables, guess), n_boot=10)[0]["warnings"])


@pytest.mark.slow
def test_implanted_alone_trains(runs, asked, implanted):
    "And so do the records of a training, its last line among them, and of cxr_eval, which knows whose films those are."
    from cxr_nbdev.cli import eval_main
    from cxr_nbdev.train import result_line, train
    m = train(replace(asked, run="alone", data="implanted", data_root=str(implanted), data_options="", anchor_scale=1.), show=lambda line: None)
    config = json.loads((runs/"alone/config.json").read_text())
    assert SAID in config["data_says"] and SAID in result_line(m) and config["implanted"] == {}
    assert not eval_main(["--checkpoint", str(runs/"alone/best.ckpt"), "--image_folder_path", str(implanted/"images"), "--annotations_file", str(implanted/"BBox_List_2017.csv"),
                          "--label_table", str(implanted/"Data_Entry_2017_v2020.csv"), "--only_unseen", "--n_boot", "20", "--output", str(runs/"cxr_eval.json")])
    result = json.loads((runs/"cxr_eval.json").read_text())
    assert result["n_val_images"] == m["n_val_images"] and result["n_seen_patients"] == 0 and any(SAID in w for w in result["warnings"])
