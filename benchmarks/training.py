"""How many images a second are trained: effdet's own bench as its train script drives it, this project under Lightning, and the bound.

Same network, weights, images, boxes, batch and device for all. Each has a process of its own, with its own settings and memory; they work in turns, one at a time,
so that a machine that slows down slows all of them. Prints markdown tables. Runs on a CPU or a GPU, whichever is there.

    python benchmarks/training.py                                                  # lite0 at 320 px, lite3 at 512, D0 at 512
    python benchmarks/training.py --only lite0@320 --batch 4 --rounds 5 --threads 1
    python benchmarks/training.py --only lite0@320 --profile                       # where this project's time goes beyond the bound
    python benchmarks/training.py --only lite0@320 --loaders                       # the whole pipeline with 0, 1, 2 worker processes
    python benchmarks/training.py --batch 32 --steps 30 --precision bf16           # for a GPU
"""
import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import torch
from effdet import DetBenchTrain, EfficientDet as EffDetNet
from pytorch_lightning import Callback, LightningDataModule
from timm.optim import create_optimizer_v2
from torch.utils.data import Dataset

from cxr_nbdev.augment import make_policy
from cxr_nbdev.config import TrainConfig
from cxr_nbdev.data import load_tables
from cxr_nbdev.dataset import CXRDataset, collate, load_pixels
from cxr_nbdev.efficientdet import efficientdet_config, to_effdet_targets
from cxr_nbdev.fast import keep_memory
from cxr_nbdev.model import create_detector
from cxr_nbdev.module import PRECISION, DetectionData, DetectionModule, make_trainer, quiet_lightning
from cxr_nbdev.synth import make_synthetic
from evaluation import cpu, installed, peak_mib

CONFIGS = {"lite0@320": ("tf_efficientdet_lite0", 320), "lite3@512": ("tf_efficientdet_lite3", 512), "d0@512": ("tf_efficientdet_d0", 512)}
TYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


class Case:
    "One network and one set of images, on which all variants work."
    def __init__(self, name, batch, steps, device, precision, augment="cxr", n_images=32):
        self.name, (self.arch, self.size), self.batch, self.steps, self.device, self.precision = name, CONFIGS[name], batch, steps, device, precision
        self.folder = tempfile.TemporaryDirectory()
        make_synthetic(self.folder.name+"/cxr", n=n_images, size=self.size, seed=1)
        tables = load_tables("synthetic", self.folder.name+"/cxr")
        pixels, self.tables = load_pixels(tables, self.size)
        self.data = CXRDataset(self.tables, self.size, make_policy(augment, self.size), 0, pixels)
        self.images, self.targets = collate([self.data[0, i % len(self.data)] for i in range(batch)])
        self.cfg = TrainConfig(architecture=self.arch, image_size=self.size, batch_size=batch, epochs=1, augment=augment, precision=precision,
                               accelerator={"cuda": "gpu"}.get(device, device))
    def detector(self):
        torch.manual_seed(0)
        return create_detector(self.arch, self.tables.classes, self.size)
    def autocast(self): return torch.autocast(self.device, TYPES[self.precision]) if self.precision != "32" else nullcontext()


def wait(device):
    "Until the device has done what it was told; a CPU always has."
    if device == "cuda": torch.cuda.synchronize()


def timed_steps(step, n, device):
    "Seconds of `n` steps after one that is not counted."
    step(); wait(device)
    start = time.perf_counter()
    for _ in range(n): step()
    wait(device)
    return time.perf_counter()-start


class Effdet:
    says = "(a) effdet's bench, as its train script drives it"
    def __init__(self, case):
        self.case, dev = case, case.device
        det = case.detector()
        net = EffDetNet(efficientdet_config(case.arch, len(case.tables.classes), case.size), pretrained_backbone=False)
        net.load_state_dict(det.net.state_dict())
        self.bench = DetBenchTrain(net).to(dev).train()
        self.mean, self.std = (255*o.to(dev) for o in (det.mean, det.std))
        self.images = case.images.repeat(1, 3, 1, 1)                                 # its datasets give RGB
        self.targets = {k: v.float() for k, v in to_effdet_targets(case.targets).items()}  # its loader fills up to 100 rows
        self.targets = {k: torch.nn.functional.pad(v, (0, 0)*(v.ndim-2)+(0, 100-v.shape[1]), value=-1.) for k, v in self.targets.items()}
        self.opt = create_optimizer_v2(self.bench, opt="momentum", lr=.01, weight_decay=4e-5, momentum=.9) # its defaults
        self.scaler = torch.amp.GradScaler(dev, enabled=case.precision == "16")
        self.seen = 0.
    def step(self):
        dev = self.case.device
        x = self.images.to(dev, non_blocking=True).float().sub_(self.mean).div_(self.std)
        t = {k: v.to(dev, non_blocking=True) for k, v in self.targets.items()}
        with self.case.autocast(): loss = self.bench(x, t)["loss"]
        self.seen += loss.item()
        self.opt.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.opt)
        torch.nn.utils.clip_grad_norm_(self.bench.parameters(), 10.)
        self.scaler.step(self.opt); self.scaler.update()
        wait(dev)                                                                    # its script synchronises after every step
    def run(self, n): return timed_steps(self.step, n, self.case.device)


class EffdetKept(Effdet):
    says = "(a) with freed memory kept, as this project does"
    def __init__(self, case):
        keep_memory()
        super().__init__(case)


class Same:
    "A loader that gives one batch `n` times."
    def __init__(self, batch, n): self.batch, self.n = batch, n
    def __len__(self): return self.n
    def __iter__(self): return iter([self.batch]*self.n)


class Resident(LightningDataModule):
    "The same batch again and again."
    def __init__(self, case, n):
        super().__init__()
        self.batch_size, self.loader = case.batch, Same((case.images, case.targets), n)
    def train_dataloader(self): return self.loader


class Repeated(Dataset):
    "A data set that goes round `n` images; in each round as in an epoch of its own."
    def __init__(self, ds, n): self.ds, self.n = ds, n
    def __len__(self): return self.n
    def __getitem__(self, at): return self.__getitems__([at])[0]
    def __getitems__(self, at): return self.ds.__getitems__([(e+i//len(self.ds), i % len(self.ds)) for e, i in at])


class Clock(Callback):
    "Seconds from the end of the first step to the end of the last."
    def __init__(self, n, device): self.n, self.device, self.seconds = n, device, 0.
    def on_train_batch_end(self, trainer, module, outputs, batch, i):
        if i not in (0, self.n): return
        wait(self.device)
        self.seconds = time.perf_counter() if i == 0 else time.perf_counter()-self.seconds


class Ours:
    says = "(b) this project under Lightning, the same batch again and again"
    def __init__(self, case): self.case, self.det, self.cfg = case, case.detector(), case.cfg
    def loaders(self, n): return Resident(self.case, n)
    def run(self, n):
        clock, cfg = Clock(n, self.case.device), self.cfg
        with quiet_lightning(), tempfile.TemporaryDirectory() as d:
            trainer = make_trainer(cfg, d, False, "train_loss", lambda line: None, [clock])
            trainer.limit_val_batches = 0
            trainer.fit(DetectionModule(self.det, cfg, monitor="train_loss"), datamodule=self.loaders(n+1))
        return clock.seconds


class Pipeline(Ours):
    says = "(b) with its data pipeline: cached pixels, augmentation, loader"
    def loaders(self, n): return DetectionData(Repeated(self.case.data, n*self.case.batch), self.case.data, self.case.batch, self.cfg.num_workers, self.cfg.seed)


class Bound:
    says = "(c) forward and backward alone, channels last, on a batch that is there already"
    def __init__(self, case):
        if case.device == "cpu": keep_memory()
        self.case, self.det = case, case.detector().to(case.device).train()
        self.x = self.det.normalise(case.images.to(case.device))
    def step(self):
        with self.case.autocast(): cls, box = self.det.net(self.x)
        for p in self.det.parameters(): p.grad = None
        sum(o.float().mean() for o in (*cls, *box)).backward()
    def run(self, n): return timed_steps(self.step, n, self.case.device)


class Loader:
    says = "the data pipeline alone, in the training process"
    def __init__(self, case): self.case = case
    def run(self, n):
        batches = iter(DetectionData(Repeated(self.case.data, (n+1)*self.case.batch), self.case.data, self.case.batch, 0, 0).train_dataloader())
        return timed_steps(lambda: next(batches), n, "cpu")


VARIANTS = dict(effdet=Effdet, kept=EffdetKept, ours=Ours, pipeline=Pipeline, bound=Bound, loader=Loader)


def work(pipe, make, case, threads, kind):
    "A process with one variant: `n` from the pipe runs n steps, None ends it; answers with seconds, at the end with the most memory it held, MiB."
    torch.set_num_threads(threads)
    try:
        variant = make(kind(**case))
        while (n := pipe.recv()) is not None: pipe.send(variant.run(n))
        pipe.send(torch.cuda.max_memory_allocated()/2**20 if case["device"] == "cuda" else peak_mib())
    except BaseException as e: pipe.send(e)


def ask(pipe, n):
    "What a variant's process answers; its error is ours."
    try:
        pipe.send(n)
        answer = pipe.recv()
    except (EOFError, BrokenPipeError): raise SystemExit("the process of a variant was ended from outside, by custom for want of memory: all variants are held at once; take a smaller --batch") from None
    if isinstance(answer, BaseException): raise answer
    return answer


def in_turns(variants, case, rounds, n, kind=Case):
    "(seconds of `n` steps: dict of name -> list, a value a round; peak memory: dict of name -> MiB). Every round goes through all variants."
    spawn, pipes, processes, out = multiprocessing.get_context("spawn"), {}, [], {k: [] for k in variants}
    try:
        for k, v in variants.items():
            pipes[k], theirs = spawn.Pipe()
            processes.append(spawn.Process(target=work, args=(theirs, v, case, torch.get_num_threads(), kind)))
            processes[-1].start()
            theirs.close()
        for _ in range(rounds):
            for k in variants: out[k].append(ask(pipes[k], n))
        return out, {k: ask(p, None) for k, p in pipes.items()}
    finally:
        for p in processes:
            p.terminate()
            p.join()


def spread(xs, form="{:.2f}"):
    "Median, and from where to where."
    return f"{form.format(statistics.median(xs))} ({form.format(min(xs))} to {form.format(max(xs))})"


def ratio(slow, fast):
    "How many times `fast` is as fast, by round."
    return [a/b for a, b in zip(slow, fast)]


def table(case, rounds):
    "The comparison for one network, as markdown."
    cuda, n = case["device"] == "cuda", case["steps"]*case["batch"]
    s, memory = in_turns({k: v for k, v in VARIANTS.items() if k != "kept" or not cuda}, case, rounds, case["steps"])
    rows = [f"| {VARIANTS[k].says} | {spread([n/o for o in t])} | " + (f"{spread(ratio(s['effdet'], t))} | {spread(ratio(s['bound'], t))} | {memory[k]:,.0f} |" if k != "loader" else "| | |")
            for k, t in s.items()]
    alone, whole = statistics.median(s["loader"])/n, statistics.median(s["pipeline"])/n
    room = statistics.median(s["bound"])/n*1.05 + (0 if cuda else alone)
    return "\n".join([title(case), "",
                      f"| what | images a second | to effdet | to the bound | peak memory, MiB |", "|---|---|---|---|---|", *rows, "",
                      f"Aims: at least {2 if cuda else 1.3} times effdet: **{verdict(statistics.median(ratio(s['effdet'], s['ours'])) >= (2 if cuda else 1.3))}**. "
                      f"With the pipeline an image takes {whole*1e3:.0f} ms; 5% over the bound{'' if cuda else ' plus the pipeline itself'} are {room*1e3:.0f} ms: **{verdict(whole <= room)}**. "
                      f"No more memory than effdet, {memory['effdet']:,.0f} MiB: **{verdict(memory['pipeline'] <= memory['effdet'])}**.", ""])


def title(case): return f"### {CONFIGS[case['name']][0]} at {CONFIGS[case['name']][1]} px, batches of {case['batch']}, precision {case['precision']}"


def verdict(yes): return "met" if yes else "not met"


class With(Pipeline):
    "The pipeline with a number of worker processes."
    def __init__(self, workers, case):
        super().__init__(case)
        self.cfg = replace(case.cfg, num_workers=workers)


def loaders(case, rounds, workers=(0, 1, 2)):
    "The whole pipeline with several numbers of worker processes, as markdown."
    s, _ = in_turns({w: partial(With, w) for w in workers}, case, rounds, case["steps"])
    n, first = case["steps"]*case["batch"], s[workers[0]]
    return "\n".join([title(case), "", "| worker processes | images a second | to none |", "|---|---|---|",
                      *(f"| {w} | {spread([n/o for o in t])} | {spread(ratio(first, t))} |" for w, t in s.items()), ""])


def operations(variant, n, device):
    "Milliseconds an operation spends itself in a step: dict of name -> ms, by torch.profiler."
    from torch.profiler import ProfilerActivity, profile
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*(device == "cuda")
    variant.run(1)
    with profile(activities=kinds) as p: variant.run(n)
    own = lambda e: e.self_device_time_total if device == "cuda" else e.self_cpu_time_total
    return {e.key: own(e)/1e3/(n+1) for e in p.key_averages()}


def profile_table(case, n=3, top=25):
    "What this project's step does beyond the bound, the most costly first, as markdown."
    ours, bound = (operations(v(Case(**case)), n, case["device"]) for v in (Ours, Bound))
    more = {k: ours.get(k, 0.)-bound.get(k, 0.) for k in ours | bound}
    rows = [f"| `{k}` | {ours.get(k, 0.):.1f} | {bound.get(k, 0.):.1f} | {more[k]:+.1f} |" for k in sorted(more, key=lambda k: -abs(more[k]))[:top]]
    total = lambda d: sum(d.values())
    return "\n".join([f"{title(case)}: milliseconds a step, by operation", "", "| operation | ours | bound | more |", "|---|---|---|---|",
                      *rows, f"| all | {total(ours):.0f} | {total(bound):.0f} | {total(ours)-total(bound):+.0f} |", ""])


def machine(device) -> str:
    "What computes, and with which versions."
    what = f"{torch.cuda.get_device_name()}, CPU {cpu()}" if device == "cuda" else f"{cpu()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"{what}; Python {platform.python_version()}, {installed('torch', 'effdet', 'timm', 'pytorch-lightning', 'albumentations')}"


def parser(doc):
    "What both benchmarks of the network understand."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", action="append", choices=CONFIGS, help="one of the networks; may be given several times (default: all)")
    p.add_argument("--rounds", type=int, default=5, help="turns of every variant (default: 5)")
    p.add_argument("--steps", type=int, default=3, help="steps that are timed in each turn (default: 3)")
    p.add_argument("--threads", type=int, default=0, help="threads of PyTorch (default: its own choice)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"), help="(default: a GPU where there is one)")
    p.add_argument("--precision", default="32", choices=TYPES, help="for all variants (default: 32)")
    return p


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--batch", type=int, default=4, help="images a step (default: 4)")
    p.add_argument("--augment", default="cxr", help="policy of the pipeline (default: cxr)")
    p.add_argument("--profile", action="store_true", help="instead: where this project's time goes beyond the bound")
    p.add_argument("--loaders", action="store_true", help="instead: 0, 1 and 2 worker processes")
    a = p.parse_args()
    torch.set_num_threads(a.threads or os.cpu_count())
    print(machine(a.device), "\n", sep="")
    for name in a.only or CONFIGS:
        case = dict(name=name, batch=a.batch, steps=a.steps, device=a.device, precision=a.precision, augment=a.augment)
        print(profile_table(case) if a.profile else loaders(case, a.rounds) if a.loaders else table(case, a.rounds), flush=True)
