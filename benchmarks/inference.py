"""How many images a second are searched for findings: effdet's DetBenchPredict against this project's `predict`, and the network alone.

Same network, weights and images for all, in turns within one process. Prints markdown tables. Runs on a CPU or a GPU, whichever is there.

    python benchmarks/inference.py                                                # lite0 at 320 px, lite3 at 512, D0 at 512, 1 and 16 images at a time
    python benchmarks/inference.py --only lite0@320 --batch 1 --rounds 5 --threads 1
"""
import os
import statistics

import torch
from effdet import DetBenchPredict, EfficientDet as EffDetNet

from cxr_nbdev.efficientdet import efficientdet_config
from training import CONFIGS, Case, machine, parser, ratio, spread, timed_steps, verdict


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


class Ours:
    says = "this project"
    def __init__(self, case): self.case, self.det = case, case.detector().to(case.device).eval()
    def step(self):
        with self.case.autocast(): out = self.det.predict(self.case.images.to(self.case.device, non_blocking=True))
        return [{k: v.cpu() for k, v in p.items()} for p in out]


class Network(Ours):
    says = "the network alone, channels last, on images that are there already"
    def __init__(self, case):
        super().__init__(case)
        self.x = self.det.normalise(case.images.to(case.device))
    @torch.no_grad()
    def step(self):
        with self.case.autocast(): return self.det.net(self.x)


def table(case, rounds):
    "The comparison for one network and batch, as markdown."
    variants = [v(case) for v in (Effdet, Ours, Network)]
    s = [[] for _ in variants]
    for _ in range(rounds):
        for v, t in zip(variants, s): t.append(timed_steps(v.step, case.steps, case.device))
    n = case.steps*case.batch
    rows = [f"| {v.says} | {spread([n/o for o in t])} | {spread(ratio(s[0], t))} |" for v, t in zip(variants, s)]
    return "\n".join([f"### {case.arch} at {case.size} px, {case.batch} at a time, precision {case.precision}", "", "| what | images a second | to effdet |", "|---|---|---|", *rows, "",
                      f"Aim: at least 1.5 times effdet: **{verdict(statistics.median(ratio(s[0], s[1])) >= 1.5)}**.", ""])


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--batch", type=int, action="append", help="images at a time; may be given several times (default: 1 and 16)")
    a = p.parse_args()
    torch.set_num_threads(a.threads or os.cpu_count())
    print(machine(a.device), "\n", sep="")
    for name in a.only or CONFIGS:
        for batch in a.batch or (1, 16): print(table(Case(name, batch, a.steps, a.device, a.precision), a.rounds), flush=True)
