"""How many images a second are read, augmented and collated on one core: the way of the earlier pipeline, torchvision's decoder, this project without and with its cache.

The same real X-rays for all, each variant in a process of its own with one thread, in turns. Prints a markdown table; with --page it goes into nbs/data_speed.qmd.

    python benchmarks/data.py                              # the shared folder lies beside the repository, or where CXR_SHARED says
    python benchmarks/data.py --rounds 9 --page
"""
import argparse
import datetime
import itertools
import os
import re
import shutil
import statistics
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.v2.functional import resize

from cxr_nbdev.augment import Policy, albumentations_module, light_transforms, make_policy
from cxr_nbdev.cache import cached_pixels, cores
from cxr_nbdev.data import load_tables
from cxr_nbdev.dataset import CXRDataset, EpochSampler, collate, read_square
from cxr_nbdev.fast import keep_memory
from training import in_turns, machine, ratio, spread, verdict

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CXR_SHARED") or ROOT.parent/"shared")
PAGE = ROOT/"nbs/data_speed.qmd"


class Case:
    "The images: the originals of 1024 px, and all of 512 px through the cache."
    def __init__(self, cache, size, batch, device):
        cv2.setNumThreads(1)
        keep_memory()
        self.cache, self.size, self.batch = cache, size, batch
        self.tables = load_tables("nih", str(SHARED/"nih"))
    def originals(self):
        files = {o.name: str(o) for o in (SHARED/"nih/originals").glob("*.png")}
        t = self.tables.subset(i for i in self.tables.images.image_id if i in files)
        scale = 1024/t.images.width.set_axis(t.images.image_id)
        b = t.boxes.copy()
        b[["x1", "y1", "x2", "y2"]] = b[["x1", "y1", "x2", "y2"]].mul(b.image_id.map(scale), axis=0).astype(np.float32)
        return replace(t, images=t.images.assign(path=t.images.image_id.map(files), width=1024, height=1024), boxes=b)
    def pixels(self): return cached_pixels(self.tables, self.size, self.cache)[0]


class Predecessor:
    "One item at a time, as a data set of the earlier pipeline had it: three channels, 1024 px decoded, then 512 px, augmented, floats."
    says, times = "the earlier pipeline's way: 1024 px PNG to RGB, to 512 px, albumentations (light), float tensor", 1
    def __init__(self, case):
        A = albumentations_module()
        self.case, t = case, case.originals()
        self.paths, ids = t.images.path.tolist(), t.images.image_id
        self.boxes = [t.boxes[t.boxes.image_id == i][["x1", "y1", "x2", "y2"]].to_numpy() for i in ids]
        self.chain = A.Compose([A.Resize(case.size, case.size), *light_transforms(case.size)], bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"], min_visibility=.3, clip=True))
    def item(self, i):
        im = cv2.cvtColor(cv2.imread(self.paths[i]), cv2.COLOR_BGR2RGB)
        o = self.chain(image=im, bboxes=self.boxes[i], labels=np.zeros(len(self.boxes[i])))
        return torch.from_numpy(o["image"]).permute(2, 0, 1).float().div_(255), torch.as_tensor(np.array(o["bboxes"]))
    def batches(self):
        for k in itertools.count():
            items = [self.item((k*self.case.batch+j) % len(self.paths)) for j in range(self.case.batch)]
            yield torch.stack([x for x, _ in items]), [b for _, b in items]
    def run(self, n): # seconds of a core for n batches; what else the machine does is not counted
        steps = self.batches() if not hasattr(self, "steps") else self.steps
        self.steps = steps
        next(steps)
        start = time.process_time()
        for _ in range(n*self.times): next(steps)
        return (time.process_time()-start)/self.times


class Torchvision(Predecessor):
    says, times = "torchvision's decoder, gray, and its resize; nothing else", 1
    def __init__(self, case): self.case, self.paths = case, case.originals().images.path.tolist()
    def item(self, i): return resize(decode_image(read_file(self.paths[i]), ImageReadMode.GRAY), [self.case.size]*2, antialias=True), None


class Ours(Predecessor):
    says, times, policy = "this project from the 1024 px files, not augmented", 1, None
    def __init__(self, case): self.case, self.ds = case, self.dataset(case)
    def dataset(self, case): return CXRDataset(case.originals(), case.size, self.policy and self.make(case.size))
    def make(self, size): return make_policy(self.policy, size)
    def batches(self):
        sampler = EpochSampler(len(self.ds))
        loader = DataLoader(self.ds, self.case.batch, sampler=sampler, collate_fn=collate, drop_last=True)
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from loader


class OursLight(Ours):
    says, policy = "this project from the 1024 px files, `light`", "light"


class Cached(Ours):
    says, times = "this project from its cache, not augmented", 60
    def dataset(self, case): return CXRDataset(case.tables, case.size, self.policy and self.make(case.size), 0, case.pixels())


class CachedLight(Cached):
    says, policy, times = "this project from its cache, `light`", "light", 6


class CachedAlbumentations(CachedLight):
    says = "this project from its cache, the transforms of `light` by albumentations"
    def make(self, size): return Policy("light", size, light_transforms(size))


class CachedFull(CachedLight):
    says, policy = "this project from its cache, `cxr`", "cxr"


class Copy(Cached):
    says, times = "memory-copy bound: `np.copyto` of the same batches into one array", 60
    def batches(self):
        px, b = self.ds.pixels.map, self.case.batch
        out = np.empty((b, *px.shape[1:]), np.uint8)
        for k in itertools.cycle(range(0, len(px)-b+1, b)):
            np.copyto(out, px[k:k+b])
            yield out


VARIANTS = dict(predecessor=Predecessor, torchvision=Torchvision, files=Ours, files_light=OursLight, albumentations=CachedAlbumentations, full=CachedFull,
                light=CachedLight, cached=Cached, copy=Copy)


def table(batch, rounds, steps, size=512):
    "The comparison, as markdown."
    two, shares = dict(cached=Cached, copy=Copy), {}
    with tempfile.TemporaryDirectory() as cache:
        case = dict(cache=cache, size=size, batch=batch, device="cpu")
        Case(**case).pixels()
        s, _ = in_turns(VARIANTS, case, rounds, steps, Case)
        for b in (16, 32, 64):
            c, _ = in_turns(two, case | dict(batch=b), 2*rounds, 2*steps, Case)
            shares[b] = ratio(c["copy"], c["cached"])
    n = steps*batch
    rows = [f"| {v.says} | {spread([n/o for o in s[k]], '{:,.0f}')} | {spread(ratio(s['predecessor'], s[k]), '{:.1f}')} | {spread(ratio(s['copy'], s[k]), '{:.3f}')} |" for k, v in VARIANTS.items()]
    light = statistics.median(ratio(s["predecessor"], s["light"]))
    return "\n".join([f"{machine('cpu')}; batches of {batch} at {size} px.", "", "| what | images a second and core | to the earlier way | share of the copy bound |", "|---|---|---|---|", *rows, "",
                      f"Aims: with the cache and `light` 20 times the earlier way: {light:.1f}, **{verdict(light >= 20)}**. Not augmented at least half of the memory-copy bound: " +
                      "; ".join(f"{spread(o, '{:.2f}')} in batches of {b}, **{verdict(statistics.median(o) >= .5)}**" for b, o in shares.items()) + "."])


def more(tables, folder, side):
    "The images and their three mirror images as PNG of `side` px: a build should last some seconds, or its start and end are all that is measured"
    parts, im = [], tables.images.head(500)
    for flip in (None, 0, 1, -1):
        paths = [f"{folder}/{side}-{flip}-{Path(o).name}" for o in im.path]
        for a, b in zip(im.path, paths):
            x = cv2.resize(cv2.imread(a, cv2.IMREAD_GRAYSCALE), (side, side), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(b, x if flip is None else cv2.flip(x, flip))
        parts.append(im.assign(path=paths, width=side, height=side))
    return SimpleNamespace(images=pd.concat(parts, ignore_index=True))


def building(rounds, size=512):
    "Files decoded and resized on all cores and forgotten, beside the same files into a new cache: seconds of the clock, in turns."
    rows, cpus = [], cores()
    with tempfile.TemporaryDirectory() as tmp:
        tables = load_tables("nih", str(SHARED/"nih"))
        for side in (1024, 512):
            t, says, bound, ours = more(tables, tmp, side), f"{side} px files", [], []
            im = t.images
            one = lambda o: read_square(o[0], size, o[1], o[2])
            for k in range(rounds+1):
                start = time.perf_counter()
                with ThreadPoolExecutor(cpus) as pool: deque(pool.map(one, zip(im.path, im.height, im.width)), maxlen=0)
                bound.append(time.perf_counter()-start)
                start = time.perf_counter()
                cached_pixels(t, size, f"{tmp}/{says}-{k}", show=lambda _: None)
                ours.append(time.perf_counter()-start)
                shutil.rmtree(f"{tmp}/{says}-{k}")
            bound, ours = bound[1:], ours[1:]  # the first round read the files into the system's memory
            rows.append(f"| {len(im):,} {says} | {spread([len(im)/o for o in bound], '{:,.0f}')} | {spread([len(im)/o for o in ours], '{:,.0f}')} | {spread(ratio(bound, ours))} | **{verdict(statistics.median(ratio(bound, ours)) >= .9)}** |")
    return "\n".join([f"Building the cache on {cpus} cores, with the hash of every file, fsync and the index; the bound decodes and resizes the same files on the same cores and keeps nothing.", "",
                      "| files | bound, images a second | the build | share | aim: .90 |", "|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=1, help="batches a round of what reads files; the faster variants do more")
    p.add_argument("--page", action="store_true", help="write the table into nbs/data_speed.qmd")
    a = p.parse_args()
    if not (SHARED/"nih").is_dir(): raise SystemExit(f"there are no real images in {SHARED}; say where they are by CXR_SHARED")
    torch.set_num_threads(1)
    text = table(a.batch, a.rounds, a.steps)+"\n\n"+building(a.rounds)
    print(text)
    if a.page:
        measured = f"{datetime.date.today()}, {text}"
        PAGE.write_text(re.sub(r"(<!-- measured -->\n).*(<!-- end -->)", lambda m: m[1]+"\n"+measured+"\n\n"+m[2], PAGE.read_text(encoding="utf-8"), flags=re.S), encoding="utf-8")
