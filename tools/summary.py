"""Says in a terminal what a recorded run found and where it lies: `python tools/summary.py runs/demo`."""
import json
import sys
from pathlib import Path


def number(x): return "not defined" if x is None else f"{x:.3f}"


def summary(run):
    "The lines to print for a run's folder."
    run = Path(run)
    record = json.loads((run/"metrics.json").read_text(encoding="utf-8"))
    val, floor = record["val"], record["val"]["blind_floor"]
    there = [(what, path) for what, path in [("training record", run.with_suffix(".html")), ("evaluation", Path(f"{run}_eval.html")),
             ("the same as notebooks", run.with_suffix(".ipynb")), ("numbers", run/"metrics.json"), ("checkpoint", run/"best.ckpt")] if path.exists()]
    return [f"validation mAP@0.5  {number(val['map_50'])}   blind floor (one fixed box a class)  {number(floor['map_50'])}",
            f"sensitivity         {number(val['sensitivity'])}   specificity  {number(val['specificity'])}",
            f"images              {record['n_train_images']} to train, {record['n_val_images']} to validate; {record['seconds']:.0f} s",
            *(f"{what+':':<24}{path}" for what, path in there), "Research only, not for clinical use."]


if __name__ == "__main__": print("\n" + "\n".join(summary(sys.argv[1])))
