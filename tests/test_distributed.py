"""One training on two devices, here two processes of a CPU that speak by gloo: the same as on one, no image twice, one process that writes."""
import json
import os
import time
from contextlib import suppress

import pandas as pd
import psutil
import pytest
import torch

from conftest import run

SCRIPT = '''
"A training on one process, then the same on several, in double precision (Adam divides by the size of the gradient and makes whole steps of rounding); Lightning runs this file again for each of the others. Arguments: images, results, accelerator, how many, and a way of averaging for those alone."
import json, os, sys
import torch
from cxr_nbdev.augment import make_policy
from cxr_nbdev.averaging import measure_norms
from cxr_nbdev.config import TrainConfig
from cxr_nbdev.data import load_tables
from cxr_nbdev.dataset import CXRDataset, load_pixels
from cxr_nbdev.model import create_detector, open_checkpoint
from cxr_nbdev.module import DetectionData, DetectionModule, SafeCheckpoints, make_trainer, quiet_lightning
from cxr_nbdev.ranks import is_first

torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False
images, results, accelerator, several = *sys.argv[1:4], int(sys.argv[4])
batch = several*max(1, 4//several)
tables = load_tables("synthetic", images)
pixels, tables = load_pixels(tables, 64)
side = lambda at, policy: CXRDataset(tables.subset(list(tables.images.image_id[at])), 64, policy, 1, pixels[at])
train, val = side(slice(0, 11), make_policy("cxr", 64)), side(slice(11, 19), None)

class Seen(DetectionModule):
    "Keeps what each step had and what it logged."
    def training_step(self, batch, i):
        loss = super().training_step(batch, i)
        self.seen = getattr(self, "seen", []) + [([t["image_id"] for t in batch[1]], loss.item())]
        return loss

wrote, write = [], SafeCheckpoints.save_checkpoint
SafeCheckpoints.save_checkpoint = lambda self, ckpt, path, **kw: (wrote.append(os.path.basename(path)), write(self, ckpt, path, **kw))
same = lambda a, b: all(torch.equal(v.cpu(), b["detector."+k]) for k, v in a.items())

def go(devices, average="ema", freeze_bn=True):
    cfg = TrainConfig(image_size=64, epochs=2, batch_size=batch, lr=1e-3, accelerator=accelerator, devices=devices, augment="cxr", scheduler="none", average=average, freeze_bn=freeze_bn)
    torch.manual_seed(0)
    det = create_detector(cfg.architecture, tables.classes, 64)
    det.frozen_norms = cfg.freeze_bn; det.double()
    det.train()
    for m in det.modules():
        if type(m).__name__ == "DropPath": m.drop_prob = 0.                                           # what is dropped depends on the place in the batch
    module = Seen(det, cfg)
    with quiet_lightning():
        trainer = make_trainer(cfg, f"{results}/{devices}", show=lambda line: None)
        trainer.fit(module, datamodule=DetectionData(train, val, batch, 0, 1))
        backend = torch.distributed.get_backend() if devices > 1 else ""
    now, last = det.state_dict(), open_checkpoint(f"{results}/{devices}/last.ckpt")
    out = dict(backend=backend, steps=module.seen, predicted=sorted(module.preds), map=module.val_metrics["map_plain_50"], weights=sum(p.double().abs().sum().item() for p in det.parameters()),
               wrote=list(wrote), saved=[same(now, last["state_dict"]), same(now, last["current_model_state"])])
    wrote.clear()
    norms = lambda: [v.double().abs().sum().item() for k, v in det.state_dict().items() if "running" in k]
    out["kept"] = norms()
    det.frozen_norms = False
    measure_norms(det.train(), train, 4)
    out["norms"] = norms()
    json.dump(out, open(f"{results}/{devices}_{trainer.global_rank}.json", "w"))

if len(sys.argv) > 5: go(several, sys.argv[5], freeze_bn=False)
else:
    if is_first(): go(1)
    go(several)
'''


@pytest.fixture(scope="module")
def both(tmp_path_factory, small_set):
    "The folder of a training on one process and on two."
    d = tmp_path_factory.mktemp("ranks")
    (d/"script.py").write_text(SCRIPT, encoding="utf-8")
    run(["python", d/"script.py", small_set, d, "cpu", 2], env={"MASTER_ADDR": "127.0.0.1"})
    return d


def result(d, name): return json.loads((d/f"{name}.json").read_text())


def same_losses(d, several, most=1e-4):
    "One process and several, with the same global batches: the same losses, step by step, and the same validation."
    one, ranks = result(d, "1_0"), [result(d, f"{several}_{r}") for r in range(several)]
    steps = [r["steps"] for r in ranks]
    assert one["steps"] and {len(s) for s in steps} == {len(one["steps"])}
    for (ids, loss), *shares in zip(one["steps"], *steps):
        assert ids == [i for together in zip(*(s[0] for s in shares)) for i in together]
        assert abs(sum(s[1] for s in shares)/several-loss) < most*loss
    h = [pd.read_csv(d/f"{n}/history.csv").drop(columns=["seconds", "images_per_second"]) for n in (1, several)]
    assert list(h[0].epoch) == [0, 1] and {"val_loss", "train_box_loss"} <= set(h[0])
    pd.testing.assert_frame_equal(h[0].sort_index(axis=1), h[1].sort_index(axis=1), rtol=most, atol=most/10)
    assert all(abs(r["weights"]/one["weights"]-1) < most/10 and r["weights"] == ranks[0]["weights"] for r in ranks)


def test_same_losses(both):
    same_losses(both, 2)
    assert len(result(both, "1_0")["steps"]) == 4 and result(both, "2_1")["backend"] == "gloo"


def test_average(both):
    "The weights compared above are the EMA's: they, not the last step's, are in the checkpoint, which one process wrote, once an epoch. Batch norm measured by two is that of one."
    from cxr_nbdev.model import open_checkpoint
    one, ranks = result(both, "1_0"), [result(both, f"2_{r}") for r in (0, 1)]
    assert all(r["saved"] == [True, False] for r in (one, *ranks))
    assert ranks[0]["wrote"].count("last.ckpt") == 2 and sorted(ranks[0]["wrote"]) == sorted(one["wrote"]) and ranks[1]["wrote"] == []
    flat = lambda n, kind: torch.cat([v.flatten().double() for k, v in open_checkpoint(both/f"{n}/last.ckpt")[kind].items() if v.is_floating_point()])
    a, b, current = flat(1, "state_dict"), flat(2, "state_dict"), flat(1, "current_model_state")
    assert (a-b).abs().max() < 1e-9 and (a-b).norm() < 1e-3*(a-current).norm()
    assert one["norms"] == pytest.approx(ranks[0]["norms"], rel=2e-3) and ranks[0]["norms"] == ranks[1]["norms"]


@pytest.mark.slow
def test_swa(tmp_path, small_set):
    "SWA with batch norm that learns: no average is there after the first epoch, one after the second; both processes end with the same, and its batch norm is what the training images give."
    (tmp_path/"script.py").write_text(SCRIPT, encoding="utf-8")
    run(["python", tmp_path/"script.py", small_set, tmp_path, "cpu", 2, "swa"], env={"MASTER_ADDR": "127.0.0.1"})
    a, b = (result(tmp_path, f"2_{r}") for r in (0, 1))
    assert all(a[k] == b[k] for k in ("weights", "kept", "map", "saved")) and a["saved"] == [True, False]
    assert a["kept"] == pytest.approx(a["norms"], rel=1e-4) and b["wrote"] == []


def test_nothing_twice(both):
    "Every validation image once, on all ranks alike; the first process alone wrote."
    one, ranks = result(both, "1_0"), [result(both, f"2_{r}") for r in (0, 1)]
    assert len(one["predicted"]) == 8 and all(r["predicted"] == one["predicted"] and r["map"] == ranks[0]["map"] for r in ranks)
    assert sorted(os.listdir(both/"2")) == sorted(os.listdir(both/"1"))


@pytest.mark.slow
def test_cxr_train(start):
    "The command trains on two processes, and the record is written from the finished run."
    start("cxr_train run=two devices=2 accelerator=cpu epochs=1 batch_size=4 image_size=128 limit=16 architecture=tf_efficientdet_lite0 backbone='' pretrained=false")
    folder = start.folder/"runs/two"
    assert json.loads((folder/"config.json").read_text())["devices"] == 2 and len(pd.read_csv(folder/"history.csv")) == 1
    assert {"best.ckpt", "last.ckpt", "metrics.json"} <= set(os.listdir(folder)) and (start.folder/"runs/two.ipynb").exists()
    assert "nothing left to do" in (start.folder/"runs/two.ipynb").read_text()


@pytest.mark.slow
def test_torchrun(start):
    "The same by torchrun, without a notebook."
    start("torchrun --nproc-per-node 2 --master-port 29571 $(which cxr_train) run=two devices=2 notebook=false accelerator=cpu epochs=1 batch_size=4 image_size=128 limit=16 "
          "architecture=tf_efficientdet_lite0 backbone='' pretrained=false")
    assert (start.folder/"runs/two/metrics.json").exists()


def test_notebook_names_the_command(start):
    "A notebook can't start processes, and says what can."
    o = start("papermill nbs/04_train.ipynb runs/x.ipynb -p devices 2 -p accelerator cpu", ok=False)
    assert "cxr_train devices=2" in o.text and not (start.folder/"runs/x").exists()


FAILS = '''
"cxr_train, but one process fails in its second step, and the other waits from there on, as in an all_reduce that nobody answers."
import os, sys, time
from pathlib import Path
import torch
from cxr_nbdev.cli import train_main
from cxr_nbdev.module import DetectionModule
from cxr_nbdev.ranks import world

torch.set_num_threads(1)
folder, who, error = Path(sys.argv[1]), int(sys.argv[2]), {"memory": torch.OutOfMemoryError("CUDA out of memory"), "image": ValueError("`a.png` is a truncated PNG")}[sys.argv[3]]
step = DetectionModule.training_step

def training_step(self, batch, i):
    rank, size = world()
    if i == 0: return step(self, batch, i)
    (folder/f"pid{rank}").write_text(str(os.getpid()))
    if rank != who: time.sleep(600)
    (folder/"failed").write_text(str(time.time()))
    raise error

DetectionModule.training_step = training_step
if __name__ == "__main__":
    sys.exit(train_main("run=x devices=2 notebook=false accelerator=cpu data=synthetic epochs=1 batch_size=4 image_size=64 limit=16 architecture=tf_efficientdet_lite0 backbone=\'\' pretrained=false".split()))
'''


@pytest.mark.slow
@pytest.mark.parametrize("command,says", [
    ("python fails.py . 0 image", "cxr: ValueError: `a.png` is a truncated PNG"),
    ("python fails.py . 1 memory", "What fits here is 2. Next step: a new run with `batch_size` 2 and `accumulate` 2"),
    ("torchrun --nproc-per-node 2 --master-port 29573 fails.py . 1 image", "cxr: ValueError: `a.png` is a truncated PNG")], ids=["first", "other", "torchrun"])
def test_one_fails(tmp_path, small_env, command, says):
    "Whichever process fails and whoever started them: its message is there, and within a minute no process is left, though the other one waits."
    (tmp_path/"fails.py").write_text(FAILS, encoding="utf-8")
    o = run(command, cwd=tmp_path, env={**small_env, "CXR_RUNS": str(tmp_path/"runs"), "MASTER_ADDR": "127.0.0.1"}, ok=False, timeout=300)
    took = time.time()-float((tmp_path/"failed").read_text())
    assert says in o.text and took < 60
    for p in [int(f.read_text()) for f in tmp_path.glob("pid*")]:
        with suppress(psutil.NoSuchProcess): assert psutil.Process(p).status() == psutil.STATUS_ZOMBIE
