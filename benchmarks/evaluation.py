"""How long average precision takes, and 2,000 resamples of it: torchmetrics with pycocotools, faster-coco-eval, and this project.

One process, one core, the same made-up predictions for all. Prints a markdown table.

    python benchmarks/evaluation.py                       # 880 images, 8 classes, 100 detections an image
    python benchmarks/evaluation.py --images 200 --timed 1
    python benchmarks/evaluation.py --large               # this project alone on 25,596 images, with its peak memory
    python benchmarks/evaluation.py --report              # the whole report with all intervals, by part, with its peak memory

faster-coco-eval is optional (`pip install faster-coco-eval`); without it its rows are left out.
"""
import argparse
import os
import platform
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, "1")

import numpy as np

from cxr_nbdev.metrics import ap_numbers, match_all, simulate_case
from cxr_nbdev.stats import patient_weights, resampled_ap

CLASSES = tuple("ABCDEFGH")
# name -> number of images, and shares of the states absent, boxed, incomplete, ignore for `simulate_case` (None: its own, many boxes)
COLLECTIONS = {"boxed": (880, None), "nih": (25_596, (.925, .0042, .0008, .07)), "many": (25_596, None)}


def cpu() -> str:
    "Name of the processor."
    try: lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError: lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())


def installed(*names) -> str:
    "Versions, as `numpy 2.4`; a package that is not there is left out."
    out = []
    for n in names:
        try: out.append(f"{n} {version(n)}")
        except PackageNotFoundError: pass
    return ", ".join(out)


def timed(f, *args):
    "(seconds of processor time, result)"
    start = time.process_time()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()): out = f(*args)
    return time.process_time()-start, out


def drawn_rows(tables, n, seed=0):
    "Rows of the images in each of `n` draws of the patients, images of a patient who is drawn twice stand twice."
    return [np.repeat(np.arange(len(tables)), w.astype(int)) for w in patient_weights(tables.images.patient_id.to_numpy(), n, seed)]


def truth_of(tables):
    "Per image: boxes (n, 4) and labels (n,)."
    rows = {i: b for i, b in tables.boxes.groupby("image_id")}
    xyxy, cls = ["x1", "y1", "x2", "y2"], list(tables.classes)
    return [(rows[i][xyxy].to_numpy(float, copy=True), np.array([cls.index(c) for c in rows[i].label])) if i in rows else (np.zeros((0, 4)), np.zeros(0, int))
            for i in tables.images.image_id]


class Torchmetrics:
    name = "torchmetrics, pycocotools"

    def __init__(self, preds, tables):
        import torch
        from torchmetrics.detection import MeanAveragePrecision
        torch.set_num_threads(1)
        t = torch.as_tensor
        self.make = lambda: MeanAveragePrecision(box_format="xyxy", backend="pycocotools")
        self.preds = [dict(boxes=t(p["boxes"]).float(), scores=t(p["scores"]).float(), labels=t(p["labels"]).long()) for p in map(preds.get, tables.images.image_id)]
        self.truth = [dict(boxes=t(b).float(), labels=t(l).long()) for b, l in truth_of(tables)]

    def __call__(self, rows):
        m = self.make()
        m.update([self.preds[i] for i in rows], [self.truth[i] for i in rows])
        return float(m.compute()["map"])


class FasterCoco:
    name = "faster-coco-eval"

    def __init__(self, preds, tables):
        from faster_coco_eval import COCO, COCOeval_faster
        self.tools, self.classes = (COCO, COCOeval_faster), tables.classes
        box = lambda b: [float(b[0]), float(b[1]), float(b[2]-b[0]), float(b[3]-b[1])]
        self.truth = [[(box(b), int(c)) for b, c in zip(*t)] for t in truth_of(tables)]
        self.preds = [[(box(b), int(c), float(s)) for b, c, s in zip(p["boxes"].astype(float), p["labels"], p["scores"])] for p in map(preds.get, tables.images.image_id)]

    def __call__(self, rows):
        COCO, Eval = self.tools
        data = dict(info={}, images=[dict(id=n, width=512, height=512) for n in range(len(rows))], categories=[dict(id=c, name=k) for c, k in enumerate(self.classes)],
                    annotations=[dict(image_id=n, category_id=c, bbox=b, area=b[2]*b[3], iscrowd=0) for n, i in enumerate(rows) for b, c in self.truth[i]])
        for k, a in enumerate(data["annotations"]): a["id"] = k+1
        truth = COCO(data)
        e = Eval(truth, truth.loadRes([dict(image_id=n, category_id=c, bbox=b, score=s) for n, i in enumerate(rows) for b, c, s in self.preds[i]]), "bbox")
        e.evaluate(); e.accumulate(); e.summarize()
        return float(e.stats[0])


def others(preds, tables):
    "Those of the other tools that are installed, ready to be timed."
    out = []
    for tool in (Torchmetrics, FasterCoco):
        try: out.append(tool(preds, tables))
        except ImportError: pass
    return out


def table(n_images=880, n_detections=100, n_boot=2000, n_timed=3, n_once=3) -> str:
    "The comparison, as markdown."
    preds, tables = simulate_case(n_images=n_images, n_detections=n_detections, classes=CLASSES, seed=0)
    rows, everyone, ours = [], np.arange(len(tables)), lambda: ap_numbers(match_all(preds, tables))
    best = lambda f, *a: min((timed(f, *a) for _ in range(n_once)), key=lambda o: o[0])
    s, numbers = best(ours)
    mine, last = float(numbers["map_plain"][0]), []
    for tool in others(preds, tables):
        t, value = best(tool, everyone)
        if abs(value-mine) > 1e-5: raise SystemExit(f"{tool.name} gives {value}, ours is {mine}: not the same AP, so nothing to compare")
        rows.append(("AP once", tool.name, t, t/s, f"{value:.6f}"))
        each = sum(timed(tool, d)[0] for d in drawn_rows(tables, n_timed))/n_timed
        last.append((f"{n_boot:,} resamples", f"{tool.name}, each evaluated anew ({n_timed} timed, times {n_boot/n_timed:,.0f})", each*n_boot))
    t, _ = timed(lambda: resampled_ap(match_all(preds, tables), n_boot))
    rows += [("AP once", "this project", s, 1, f"{mine:.6f}")] + [(*r, r[2]/t, "") for r in last] + [(f"{n_boot:,} resamples", "this project, matched once, resampled as weights", t, 1, "")]
    show = lambda s: f"{s:.2f} s" if s < 60 else f"{s/60:.0f} min" if s < 7200 else f"{s/3600:.1f} h"
    lines = [f"| {a} | {b} | {show(c)} | {d:.0f} x | {e} |" for a, b, c, d, e in rows]
    return "\n".join([f"{n_images:,} images, {len(CLASSES)} classes, {n_detections} detections an image, {len(tables.boxes):,} boxes; processor time on one core of {os.cpu_count()} ({cpu()}); "
                      f"Python {platform.python_version()}, {installed('numpy', 'scipy', 'torch', 'torchmetrics', 'pycocotools', 'faster-coco-eval')}", "",
                      "| what | with | time | to ours | AP 0.5:0.95, plain |", "|---|---|---|---|---|", *lines])


def peak_mib() -> float:
    "Most memory this process has held, in MiB. Linux keeps it for this program alone; elsewhere the parent's may be counted in."
    try: return next(int(line.split()[1])/1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024/(1024 if sys.platform == "darwin" else 1)


def alone(n_images, n_detections=100, n_boot=2000):
    "Times this project in this process and prints a row of `large`."
    preds, tables = simulate_case(n_images=n_images, n_detections=n_detections, classes=CLASSES, seed=0)
    t, m = timed(match_all, preds, tables)
    boot, _ = timed(resampled_ap, m, n_boot)
    print(f"| {n_images:,} | {len(m.score):,} | {len(tables.boxes):,} | {t:.1f} s | {boot:.1f} s | {peak_mib():,.0f} MiB |")


def large(sizes=(880, 5000, 25_596)) -> str:
    "This project on larger collections, each in a fresh process, as markdown."
    run = lambda n: subprocess.run([sys.executable, os.path.abspath(__file__), "--alone", str(n)], capture_output=True, text=True, check=True).stdout.strip()
    return "\n".join(["| images | detections | boxes | matching | 2,000 resamples | peak memory, all in all |", "|---|---|---|---|---|---|", *map(run, sizes)])


def report_alone(name, n_detections=100, n_boot=2000):
    "Builds the whole report of one of `COLLECTIONS` in this process and prints a row of `report`."
    from cxr_nbdev import fullreport
    n, shares = COLLECTIONS[name]
    preds, tables = simulate_case(n_images=n, n_detections=n_detections, classes=CLASSES, seed=0, **({} if shares is None else {"shares": shares}))
    floor = fullreport.cross_floor(tables)
    before, (all_, r) = peak_mib(), timed(lambda: fullreport.build_report(preds, tables, floor, n_boot=n_boot))
    fewer = [r.blocks["errors"]["n_boot_cost"], r.blocks["subgroups"]["n_boot_ap"]]
    draws = f"{n_boot:,}" if min(fewer) == n_boot else f"{n_boot:,}; costs of errors {fewer[0]:,}, AP of subgroups {fewer[1]:,}"
    parts = " | ".join(f"{r.seconds[k]:.1f}" for k in r.seconds if k != "cases")
    print(f"| {n:,} | {len(tables.boxes):,} | {draws} | {parts} | **{all_:.1f} s** | {peak_mib():,.0f} ({before:,.0f}) MiB |")


def report(names=tuple(COLLECTIONS)) -> str:
    "The whole report with all intervals, each collection in a fresh process, as markdown."
    from cxr_nbdev.fullreport import PARTS
    run = lambda name: subprocess.run([sys.executable, os.path.abspath(__file__), "--report_alone", name], capture_output=True, text=True, check=True).stdout.strip()
    parts = [p.__name__.removeprefix("add_") for p in PARTS if p.__name__ != "add_cases"]
    return "\n".join([f"{len(CLASSES)} classes, 100 detections an image; seconds of processor time on one core ({cpu()}); memory is the peak of the whole process, in brackets before the report", "",
                      f"| images | boxes | resamples | {' | '.join(parts)} | all | peak memory |", "|---"*(len(parts)+5)+"|", *map(run, names)])


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=880, help="number of images (default: 880)")
    p.add_argument("--detections", type=int, default=100, help="detections an image (default: 100)")
    p.add_argument("--resamples", type=int, default=2000, help="resamples of the patients (default: 2000)")
    p.add_argument("--timed", type=int, default=3, help="resamples that are timed for the naive way (default: 3)")
    p.add_argument("--large", action="store_true", help="this project alone, on up to 25,596 images, with its peak memory")
    p.add_argument("--report", action="store_true", help="the whole report with all intervals on 880 and 25,596 images, by part, with its peak memory")
    p.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    p.add_argument("--report_alone", choices=COLLECTIONS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.alone: alone(a.alone)
    elif a.report_alone: report_alone(a.report_alone)
    elif a.large: print(large())
    elif a.report: print(report())
    else: print(table(a.images, a.detections, a.resamples, a.timed))
