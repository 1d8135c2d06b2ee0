"""The ladder, as papermill runs it, on drawn films."""
import json

LINE = ("papermill nbs/04b_ladder.ipynb runs/rungs.ipynb -p data synthetic -p folds 0,1 -p limit 20 -p image_size 64 -p epochs 1 -p batch_size 4 "
        "-p accelerator cpu -p n_boot 20 -p n_perm 20 -p lr 0.003")
STEPS = ["-p", "steps", "core: anchor_scale=2; ema: average=ema; fused: nms=wbf nms_iou=0.3; vote: core+ema"]

ALONE = """
import json
from dataclasses import replace
from pathlib import Path
from cxr_nbdev.ablation import plan, run_once, runs_in
from cxr_nbdev.config import parse_config
from cxr_nbdev.ladder import LadderConfig, Origin, as_ablation, save_answers
home = Path("runs/rungs").resolve()
said = json.loads((home/"ladder.json").read_text())["config"]
cfg = parse_config({k: v for k, v in said.items() if k in LadderConfig.__dataclass_fields__}, LadderConfig)
tc = plan(as_ablation(cfg), home/"folds.csv")["ema", 0, 1]
with runs_in(home):
    run_once(replace(tc, run="alone", average="none"))
    try: save_answers(tc, Origin("ema", False, (("nms", "wbf"), ("nms_iou", "0.4")), "as_fused"))
    except ValueError as e: assert "was made with other post-processing" in str(e), e
    else: raise AssertionError("answers of other settings were taken for these")
"""


def load(path): return json.loads(path.read_text(encoding="utf-8"))


def test_ladder(start, request):
    "One training is looked at in three ways, a vote trains nothing; the record has floor, steps and differences."
    here = start.folder
    start([*LINE.split(), *STEPS])
    r, book = load(here/"runs/rungs/ladder.json"), load(here/"runs/rungs.ipynb")
    text = "\n".join("".join(o.get("text", "")) for c in book["cells"] for o in c.get("outputs", []))
    assert any("lr = 0.003" in "".join(c["source"]) for c in book["cells"] if "injected-parameters" in c["metadata"].get("tags", []))
    assert (r["config"]["lr"], r["steps"], r["changes"]["vote"]) == (0.003, ["core", "ema", "fused", "vote"], "core+ema")
    assert [r["differences"][k]["on"] for k in r["steps"]] == ["blind floor", "core", "ema", "core"]
    assert sorted(o.parent.name for o in (here/"runs/rungs").glob("*/config.json")) == ["ema_f0_s1", "ema_f1_s1"]
    looks = [(here/"runs/rungs/ema_f0_s1"/o/"predictions.json").read_text() for o in ("raw", "last", "as_fused")]
    assert len(set(looks)) == 3 and load(here/"runs/rungs/ema_f0_s1/as_fused/settings.json") == {"nms": "wbf", "nms_iou": "0.3"}
    assert all(len(r["results"][k]["ap_50"]) == len(r["classes"]) and r["results"][k]["map_30_ci"] for k in r["steps"])
    assert "`core`: " in text and str(here) not in json.dumps(book) + json.dumps(r)
    assert r["reader_ceiling"] == {}                                                         # nobody has read drawn films twice
    if not request.config.getoption("--slow"): return
    start(["python", "-c", ALONE])                                                            # a process like the notebook's: another number of threads gives other last digits
    assert load(here/"runs/rungs/alone/last/predictions.json") == load(here/"runs/rungs/ema_f0_s1/raw/predictions.json"), "averaging has touched the training"
