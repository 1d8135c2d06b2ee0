"""A run that is killed at any moment and continued ends as if nothing had happened: the same weights, bit for bit, and the same history."""
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from functools import partial
from unittest import mock

import pandas as pd
import pytest
import torch
from conftest import ENV

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["nbdev.test", "torch", "pytorch_lightning", "effdet", "albumentations", "seaborn", "cxr_nbdev.train"])
RUN = dict(data="synthetic", limit=20, image_size=64, epochs=3, batch_size=4, accelerator="cpu", val_fraction=0.3, augment="cxr", lr=1e-3, monitor="val_loss")
MIX = dict(mixup=0.3, cutmix=0.2, mosaic=0.2, paste=0.3)
KINDS = {  # what a checkpoint has to carry
    "quick": dict(architecture="stub", average="ema", **MIX),
    "ema": dict(average="ema"),
    "swa": dict(average="swa", swa_start=0.4, scheduler="cosine", warmup=2, optimizer="sgd", accumulate=2),
    "plateau": dict(scheduler="plateau", average="ema", freeze="backbone", thaw_epoch=1, backbone_lr=0.3, num_workers=1, **MIX),
    "stops": dict(early_stop=1, lr=1e-12, scheduler="none", monitor="map", epochs=6),
    "begun": dict(architecture="stub", average="ema", start_from="quick"),
    "fitted": dict(limit=0, anchors="fit", class_weights="balanced", find_lr=True, average="ema"),
}
FITTED = ("lr", "anchors_used", "weights_by_class")  # what the record of such a run holds, found before the first epoch


def stub(name, classes, image_size, **kwargs):
    "A detector in milliseconds that has what makes resuming hard: batch norm and dropout."
    from cxr_nbdev.model import Detector

    class Stub(Detector):
        def __init__(self):
            super().__init__(classes, image_size)
            self.net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 8, 8), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Dropout())
            self.head = torch.nn.Linear(8*(image_size//8)**2, 5*len(classes))
        def out(self, x): return self.head(self.net(x)).view(len(x), -1, 5)
        def loss_terms(self, x, targets):
            there = torch.stack([torch.zeros(len(classes)).index_fill(0, t["labels"], 1.) for t in targets])
            out = self.out(x)
            return dict(class_loss=torch.nn.functional.binary_cross_entropy_with_logits(out[..., 0], there), box_loss=out[..., 1:].square().mean())
        def detect(self, x):
            boxes = lambda o: torch.cat([o[:, 1:3].sigmoid()*image_size/2, image_size/2+o[:, 3:].sigmoid()*image_size/2], 1)
            found = [(o, o[:, 0].sigmoid().sort(descending=True)) for o in self.out(x)]
            return [dict(boxes=boxes(o)[by.indices], scores=by.values, labels=by.indices) for o, by in found]
        def stages(self): return dict(backbone=[self.net], heads=[self.head])
    det = Stub()
    det.name = name
    return det


def dying(where, at):
    "Checkpoints of which the `at`-th write kills the process: half way through it, or right after it."
    from cxr_nbdev.module import SafeCheckpoints

    def half(checkpoint, path):
        whole = path.with_suffix(".whole")
        save(checkpoint, whole)
        data = whole.read_bytes()
        whole.unlink()
        path.write_bytes(data[:len(data)//2])
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying(SafeCheckpoints):
        n = 0

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            Dying.n += 1
            with mock.patch("torch.save", half if (where, Dying.n) == ("within", at) else save): super().save_checkpoint(checkpoint, path)
            if (where, Dying.n) == ("after", at): os.kill(os.getpid(), signal.SIGKILL)
    save = torch.save
    return Dying


def train(values, folder, started, where="", at=0):
    "What `cxr_train` does up to the end of the training, in a process of its own; `started` is set when the training begins."
    os.environ.update(ENV, CXR_RUNS=str(folder))
    torch.set_num_threads(1)
    from cxr_nbdev import module, train as t
    from cxr_nbdev.config import TrainConfig
    from cxr_nbdev.model import register_detector
    from cxr_nbdev.run import open_run
    register_detector("stub", stub)
    cfg = TrainConfig(**values, resume=(folder/values["run"]/"config.json").exists())
    run = open_run(cfg)
    if run.resumed: cfg = t.continued(cfg, run.config)
    device, detector = t.check_inputs(cfg)
    data, facts = t.get_data(cfg), {}
    if cfg.find_lr:
        never = {k: mock.Mock(side_effect=AssertionError(f"`{k}` is called on resuming")) for k in ("fit_anchors", "balanced_weights", "lr_range_test")}
        with mock.patch.multiple(t, **never if run.resumed else dict(lr_range_test=partial(t.lr_range_test, steps=60))):
            detector, facts = t.fit_to_data(cfg, run, detector, data, device, show=lambda line: None)
            cfg, _ = t.choose_lr(cfg, run, detector, data)
    facts |= dict(started_from=t.begin_with(cfg, run, detector, data, show=lambda line: None))
    with mock.patch.object(module, "SafeCheckpoints", dying(where, at)):
        t.start(cfg, run, data, device, **facts)
        started.set()
        t.fit(cfg, run, data, detector, show=lambda line: None)


def once(values, folder, seconds=None, where="", at=0):
    "One process: its exit code, and how long it trained. It is killed after `seconds` of training, or kills itself in a write."
    started = FORK.Event()
    p = FORK.Process(target=train, args=(values, folder, started, where, at))
    p.start()
    while not started.wait(0.2): assert p.is_alive(), f"it ended with {p.exitcode} before it had begun"
    t = time.perf_counter()
    p.join(seconds)
    if p.is_alive(): p.kill()
    p.join()
    return p.exitcode, time.perf_counter()-t


def same(a, b, at=""):
    "Equal in every bit, down to the last number; paths and times may differ."
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{at}: {a.keys() ^ b.keys()}"
        for k in a:
            if not str(k).endswith("_path") and k not in ("best_k_models", "dirpath"): same(a[k], b[k], f"{at}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b)): same(x, y, f"{at}/{i}")
    elif torch.is_tensor(a): assert a.dtype == b.dtype and torch.equal(a, b), at
    else: assert a == b or a != a and b != b, f"{at}: {a} and {b}"


def history(folder): return pd.read_csv(folder/"history.csv", dtype=str).drop(columns=["seconds", "images_per_second"])


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    from cxr_nbdev.synth import make_synthetic
    return make_synthetic(tmp_path_factory.mktemp("few")/"synthetic", n=40, size=64, seed=3)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, few_images):
    "Runs that nobody killed, each made when first asked for: (values, folder, seconds)."
    made, home = {}, tmp_path_factory.mktemp("undisturbed")

    def get(kind):
        if kind not in made:
            if earlier := KINDS[kind].get("start_from"): get(earlier)
            values = {**RUN, "data_root": str(few_images), "run": kind, **KINDS[kind]}
            code, seconds = once(values, home)
            assert code == 0
            made[kind] = values, home/kind, seconds
        return made[kind]
    return get


def origin_of(kind, undisturbed, home):
    "The run that this one starts from lies beside it."
    earlier = KINDS[kind].get("start_from")
    if earlier and not (home/earlier).exists(): shutil.copytree(undisturbed(earlier)[1], home/earlier)


def check(kind, kills, undisturbed, home):
    "Killed as `kills` says (seconds, or a write), then continued to the end: nothing differs."
    values, whole, _ = undisturbed(kind)
    origin_of(kind, undisturbed, home)
    for k in kills:
        code, _ = once(values, home, **k)
        assert code in (0, -signal.SIGKILL), f"it ended with {code}, not by the kill"
    assert once(values, home)[0] == 0
    assert sorted(o.name for o in (home/kind).iterdir()) == ["best.ckpt", "config.json", "history.csv", "last.ckpt", "split.csv"]
    for name in ("best.ckpt", "last.ckpt"):
        a, b = (torch.load(o/name, weights_only=True) for o in (whole, home/kind))
        if name == "last.ckpt": assert ("averaging_state" in a) == (values.get("average", "none") != "none")
        same({k: v for k, v in a.items() if k != "cxr_nbdev"}, {k: v for k, v in b.items() if k != "cxr_nbdev"}, name)
    pd.testing.assert_frame_equal(history(whole), history(home/kind))


def recorded(folder, names=FITTED):
    config = json.loads((folder/"config.json").read_text())
    return {k: config[k] for k in names}


def test_killed_twice(tmp_path, undisturbed):
    "Half way through a write, and somewhere in the training."
    seconds = undisturbed("quick")[2]
    check("quick", [dict(where="within", at=random.Random(1).randint(3, 5)), dict(seconds=seconds*random.Random(2).random())], undisturbed, tmp_path)


def test_killed_after_a_start_from(tmp_path, undisturbed):
    "Killed before it had a checkpoint of its own it starts from the earlier run again, and only from that very file; later it goes on with its own weights, whatever has become of that."
    check("begun", [dict(where="within", at=1)], undisturbed, tmp_path)
    facts, same_facts = ({k: v for k, v in recorded(o, ["started_from"])["started_from"].items() if k != "checkpoint"} for o in (tmp_path/"begun", undisturbed("begun")[1]))
    assert facts == same_facts and facts["run"] == "quick" and len(facts["sha256"]) == 64
    whole, mine = (torch.load(undisturbed(k)[1]/"best.ckpt", weights_only=True)["cxr_nbdev"]["extra"] for k in ("quick", "begun"))
    assert mine["earlier_patients"] == {"synthetic": whole["train_patients"]}
    (tmp_path/"quick/best.ckpt").unlink()
    assert once({**undisturbed("begun")[0], "epochs": 4}, tmp_path)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_anywhere(tmp_path, undisturbed, seed):
    "Ten more, of a real network: any time, within any write, between best and last; once or twice."
    rng = random.Random(seed)
    kind = ("ema", "swa", "plateau", "stops")[seed % 4]
    seconds = undisturbed(kind)[2]
    anyhow = (lambda: dict(seconds=seconds*rng.random()), lambda: dict(where="within", at=rng.randint(1, 4)), lambda: dict(where="after", at=rng.randint(1, 4)))
    check(kind, [anyhow[(seed+i) % 3]() for i in range(1+seed % 2)], undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [[("within", 1)], [("within", 3), ("after", 2)]], ids=["before the first checkpoint", "twice"])
def test_killed_with_fitted_values(tmp_path, undisturbed, kills):
    "Anchors, class weights and the learning rate are those of the record: found once, before the first epoch, and never again."
    values, whole, _ = undisturbed("fitted")
    found = recorded(whole)
    assert found["anchors_used"]["how"].startswith("fitted to ") and len(set(found["weights_by_class"].values())) > 1 and found["lr"] != values["lr"]
    check("fitted", [dict(where=where, at=at) for where, at in kills], undisturbed, tmp_path)
    assert recorded(tmp_path/"fitted") == found
    specs = [torch.load(o/"best.ckpt", weights_only=True)["cxr_nbdev"]["spec"] for o in (whole, tmp_path/"fitted")]
    assert specs[0] == specs[1] and specs[0]["anchor_ratios"] == found["anchors_used"]["anchor_ratios"]
    assert specs[0]["class_weights"] == list(found["weights_by_class"].values())


class Hostile:
    "Touches a file where it is unpickled."

    def __init__(self, path): self.path = path
    def __reduce__(self): return type(self.path).touch, (self.path,)


def test_hostile_checkpoint(tmp_path):
    "A `last.ckpt` that holds code is refused by all that opens one, resuming included, and the code does not run."
    from cxr_nbdev.model import load_detector, open_checkpoint
    from cxr_nbdev.module import SafeCheckpoints
    bad, trace = tmp_path/"last.ckpt", tmp_path/"i_was_here"
    torch.save(dict(epoch=1, state_dict={}, callbacks=dict(x=Hostile(trace))), bad)
    for opens in (open_checkpoint, load_detector, SafeCheckpoints().load_checkpoint, lambda p: SafeCheckpoints().load_checkpoint(p, weights_only=False)):
        with pytest.raises(ValueError, match="is refused"): opens(bad)
    assert not trace.exists()
    torch.load(bad, weights_only=False)
    assert trace.exists(), "it is not even hostile"
