"""One training on two devices, here two processes of a CPU that speak by gloo: the same as on one, no image twice, one process that writes."""
import json
import os

import pandas as pd
import pytest

from conftest import run

SCRIPT = '''
"A training on one process, then the same on several; Lightning runs this file again for each of the others. Arguments: images, results, accelerator, how many."
import json, os, sys
import torch
from cxr_nbdev.augment import make_policy
from cxr_nbdev.config import TrainConfig
from cxr_nbdev.data import load_tables
from cxr_nbdev.dataset import CXRDataset, load_pixels
from cxr_nbdev.model import create_detector
from cxr_nbdev.module import DetectionData, DetectionModule, make_trainer, quiet_lightning
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

def go(devices):
    cfg = TrainConfig(image_size=64, epochs=2, batch_size=batch, lr=1e-3, accelerator=accelerator, devices=devices, augment="cxr", scheduler="none", freeze_bn=True)
    torch.manual_seed(0)
    det = create_detector(cfg.architecture, tables.classes, 64)
    det.frozen_norms = cfg.freeze_bn
    det.train()
    for m in det.modules():
        if type(m).__name__ == "DropPath": m.drop_prob = 0.                                           # what is dropped depends on the place in the batch
    module = Seen(det, cfg)
    with quiet_lightning():
        trainer = make_trainer(cfg, f"{results}/{devices}", show=lambda line: None)
        trainer.fit(module, datamodule=DetectionData(train, val, batch, 0, 1))
        backend = torch.distributed.get_backend() if devices > 1 else ""
    out = dict(backend=backend, steps=module.seen, predicted=sorted(module.preds), map=module.val_metrics["map_plain_50"], weights=sum(p.double().abs().sum().item() for p in det.parameters()))
    json.dump(out, open(f"{results}/{devices}_{trainer.global_rank}.json", "w"))

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
