"""Two sources in one run: the README's line, what its record says, and the evaluation of what it made."""
import json
import re
import shutil

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
