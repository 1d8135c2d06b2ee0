"""How many images a second are searched for findings: effdet's DetBenchPredict against this project's `predict`, and the network alone.

Same network, weights and images for all, each in a process of its own, in turns. Prints markdown tables. Runs on a CPU or a GPU, whichever is there.

    python benchmarks/inference.py                                                # lite0 at 320 px, lite3 at 512, D0 at 512, 1 and 16 images at a time
    python benchmarks/inference.py --only lite0@320 --batch 1 --rounds 5 --threads 1
"""
import os
import statistics

import torch
from effdet import DetBenchPredict, EfficientDet as EffDetNet

from cxr_nbdev.efficientdet import efficientdet_config
from cxr_nbdev.fast import keep_memory
from training import CONFIGS, in_turns, machine, parser, ratio, spread, timed_steps, title, verdict


class Effdet:
    says = "effdet's DetBenchPredict"
    def __init__(self, case):
        det = case.detector()
        net = EffDetNet(efficientdet_config(case.arch, len(case.tables.classes), case.size), pretrained_backbone=False)
        net.load_state_dict(det.net.state_dict())
        self.case, self.bench = case, DetBenchPredict(net).to(case.device).eval()
        self.mean, self.std = (255*o.to(case.device) for o in (det.mean, det.std))
        self.images = case.images.repeat(1, 3, 1, 1)
    @torch.no_grad()
    def step(self):
        x = self.images.to(self.case.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        with self.case.autocast(): return self.bench(x).cpu()
    def run(self, n): return timed_steps(self.step, n, self.case.device)


class EffdetKept(Effdet):
    says = "the same with freed memory kept, as this project does"
    def __init__(self, case):
        keep_memory()
        super().__init__(case)


class Ours(Effdet):
    says = "this project, as an evaluation does it"
    def __init__(self, case):
        if case.device == "cpu": keep_memory()
        self.case, self.det = case, case.detector().to(case.device).eval()
        self.held = self.det.predicting()
        self.held.__enter__()
    def step(self):
        with self.case.autocast(): out = self.det.predict(self.case.images.to(self.case.device, non_blocking=True))
        return [{k: v.cpu() for k, v in p.items()} for p in out]


class Network(Ours):
    says = "its network alone, on images that are there already"
    def __init__(self, case):
        super().__init__(case)
        self.x = self.det.normalise(case.images.to(case.device))
    @torch.no_grad()
    def step(self):
        with self.case.autocast(): return self.det.net_out(self.x)


VARIANTS = dict(effdet=Effdet, kept=EffdetKept, ours=Ours, network=Network)


def table(case, rounds):
    "The comparison for one network and batch, as markdown."
    s, memory = in_turns({k: v for k, v in VARIANTS.items() if k != "kept" or case["device"] == "cpu"}, case, rounds, case["steps"])
    n = case["steps"]*case["batch"]
    rows = [f"| {VARIANTS[k].says} | {spread([n/o for o in t])} | {spread(ratio(s['effdet'], t))} | {memory[k]:,.0f} |" for k, t in s.items()]
    return "\n".join([title(case), "", "| what | images a second | to effdet | peak memory, MiB |", "|---|---|---|---|", *rows, "",
                      f"Aim: at least 1.5 times effdet: **{verdict(statistics.median(ratio(s['effdet'], s['ours'])) >= 1.5)}**.", ""])


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--batch", type=int, action="append", help="images at a time; may be given several times (default: 1 and 16)")
    a = p.parse_args()
    torch.set_num_threads(a.threads or os.cpu_count())
    print(machine(a.device), "\n", sep="")
    for name in a.only or CONFIGS:
        for batch in a.batch or (1, 16): print(table(dict(name=name, batch=batch, steps=a.steps, device=a.device, precision=a.precision), a.rounds), flush=True)
