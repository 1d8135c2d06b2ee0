"""What a GPU has to do as a CPU does: the same boxes, the same losses, trainings that end, and no waiting in a step.

Where torch finds no CUDA device nearly all of it is skipped. `CXR_TEST_DEVICE=cpu pytest tests/test_gpu.py` tries the tests themselves, with a CPU in the place of the GPU; `test_device.py` tries most of them on a simulated device."""
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partialmethod
from unittest import mock

import pandas as pd
import pytest
import torch
from conftest import run
from test_distributed import SCRIPT, result, same_losses

DEVICE = os.environ.get("CXR_TEST_DEVICE", "cuda")
ACCELERATOR = {"cuda": "gpu"}.get(DEVICE, DEVICE)
on_gpu = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch finds no CUDA device here")
SIZE, CLASSES = 128, 3


def answers(batch=3, dtype=torch.float32, steps=0, seed=0):
    "Class logits and box codes by level, as of a network that sees something everywhere; `steps`: logits rounded, so that many are equal."
    g = torch.Generator().manual_seed(seed)
    cells = [-(-SIZE//2**level) for level in range(3, 8)]
    logits, codes = ([torch.randn(batch, 9*n, c, c, generator=g, dtype=dtype)*spread for c in cells] for n, spread in ((CLASSES, 2.), (4, .3)))
    return [(x*steps).round()/steps for x in logits] if steps else logits, codes


def grid(dtype=torch.float32):
    from cxr_nbdev.anchors import anchor_boxes
    return torch.from_numpy(anchor_boxes(SIZE)).to(dtype)


def targets(numbers=(4, 0, 1, 12), seed=0):
    "So many boxes an image, with all that a target can hold."
    g, out = torch.Generator().manual_seed(seed), []
    for n in numbers:
        corner = torch.rand(n, 2, generator=g)*SIZE*.7
        out.append(dict(boxes=torch.cat([corner, corner + 8 + torch.rand(n, 2, generator=g)*(SIZE-corner-8)], 1), labels=torch.randint(0, CLASSES, (n,), generator=g),
                        ignore=torch.rand(CLASSES, generator=g) < .3, box_weights=torch.rand(n, generator=g)))
    return out


@on_gpu
@pytest.mark.parametrize("steps", [0, 2], ids=["", "ties"])
@pytest.mark.parametrize("nms", ["nms", "soft_linear", "soft_gaussian", "wbf"])
def test_same_boxes(nms, steps):
    "Post-processing: the same boxes, in the same order, also where many scores are equal."
    from cxr_nbdev.losses import flatten_levels
    from cxr_nbdev.postprocess import postprocess
    logits, codes = answers(steps=steps)
    whole = flatten_levels(logits, CLASSES), flatten_levels(codes, 4), grid()
    if steps: assert len(whole[0].unique()) < whole[0].numel()/100
    here, there = (postprocess(*(t.to(d) for t in whole), SIZE, nms=nms, max_candidates=600) for d in ("cpu", DEVICE))
    for p, q in zip(here, there, strict=True):
        assert len(p["labels"]) > 10 and all(v.device.type == DEVICE for v in q.values())
        assert torch.equal(p["labels"], q["labels"].cpu())
        torch.testing.assert_close(q["scores"].cpu(), p["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(q["boxes"].cpu(), p["boxes"], atol=1e-3, rtol=0)


@on_gpu
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize("matching", ["iou", "atss"])
def test_same_losses(matching, dtype, most):
    "Which anchor learns what, every loss, and the gradients."
    from cxr_nbdev.fast import targets_to
    from cxr_nbdev.losses import BOX_LOSSES, CLASS_LOSSES, DetectionLosses
    from cxr_nbdev.matching import MATCHERS, pad_targets
    wanted, anchors = targets(), grid(dtype)

    def compute(device, class_loss, box_loss):
        outs = [[v.to(device).requires_grad_() for v in o] for o in answers(len(wanted), dtype)]
        criterion = DetectionLosses(CLASSES, class_loss, box_loss, matching, .05, [1, 2, .5]).to(device)
        terms = criterion(*outs, targets_to(wanted, device), anchors.to(device))
        return [v.detach() for v in terms.values()], torch.autograd.grad(terms["class_loss"]+50*terms["box_loss"], outs[0]+outs[1])

    def matched(device):
        t, levels = pad_targets(targets_to(wanted, device), CLASSES, dtype), [9*v[0, 0].numel() for v in answers()[0]]
        return MATCHERS[matching](anchors.to(device), t["boxes"], t["labels"] >= 0, levels=levels, per_cell=9).cpu()

    assert torch.equal(matched("cpu"), matched(DEVICE)) and (matched("cpu") >= 0).any()
    for kinds in [(c, "huber") for c in CLASS_LOSSES] + [("focal", b) for b in BOX_LOSSES]:
        for a, b in zip(compute("cpu", *kinds), compute(DEVICE, *kinds), strict=True):
            a, b = (torch.cat([v.flatten().cpu().double() for v in o]) for o in (a, b))
            assert a.norm() > 0 and (a-b).norm() < most*a.norm(), kinds


@on_gpu
@pytest.mark.parametrize("batch", [1, 5])
def test_same_films(batch):
    "Synthetic films with every finding in both views and all that clutters a film: the same boxes and pixels, but for a few where a point falls beside the border of two (the limits are several times what another rounding in every function does)."
    from cxr_nbdev.findings import FINDINGS
    from cxr_nbdev.synth import draw_films, set_up
    setups = [set_up([i, view == 'AP'], [f], view=view, difficulty="hard") for i, f in enumerate(FINDINGS) for view in ("PA", "AP")]
    for (a, boxes, _), (b, there, _) in zip(draw_films(setups, 160), draw_films(setups, 160, DEVICE, batch), strict=True):
        off = abs(a.astype(int)-b)
        assert off.mean() < .02 and (off > 1).mean() < 1e-3
        assert list(boxes) == list(there) and all(abs(boxes[f]-there[f]).max() < 1.5 for f in boxes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from cxr_nbdev.synth import make_synthetic
    return make_synthetic(tmp_path_factory.mktemp("tiny")/"synthetic", n=16, size=64, seed=3)


@pytest.fixture
def config(tmp_path, monkeypatch, tiny):
    "A training of one epoch, on the device that is tested."
    from cxr_nbdev.config import TrainConfig
    monkeypatch.setenv("CXR_RUNS", str(tmp_path))
    return TrainConfig(run="short", data="synthetic", data_root=str(tiny), image_size=64, epochs=1, batch_size=4, val_fraction=.3, monitor="val_loss", accelerator=ACCELERATOR)


def check_run(folder, epochs=1):
    "A finite loss in every epoch, and a checkpoint that a CPU loads and predicts with."
    from cxr_nbdev.model import load_detector
    history = pd.read_csv(folder/"history.csv")
    assert list(history.epoch) == list(range(epochs)) and history[["train_loss", "val_loss"]].notna().all(axis=None) and (history[["train_loss", "val_loss"]].abs() < 1e6).all(axis=None)
    saved = torch.load(folder/"last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    assert not any("_orig_mod" in k for k in saved) and all(v.isfinite().all() for v in saved.values())
    for name in ("best.ckpt", "last.ckpt"):
        det = load_detector(folder/name)
        assert {p.device.type for p in det.parameters()} == {"cpu"} and not getattr(det.net, "_compiled_call_impl", None)
        [p] = det.predict(torch.zeros(1, 1, det.image_size, det.image_size, dtype=torch.uint8))
        assert p["scores"].isfinite().all() and p["boxes"].isfinite().all()


@on_gpu
@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_trains(tmp_path, config, precision):
    from cxr_nbdev.train import train
    if (DEVICE, precision) == ("cpu", "16"): pytest.skip("fp16 needs a GPU")
    train(replace(config, precision=precision, average="ema"), show=lambda line: None)
    check_run(tmp_path/"short")


def check_compiled(folder, cfg, device):
    "It trains, is resumed with and without compiling, and evaluated; the compiled network says what the plain one says."
    from cxr_nbdev.evaluate import evaluate, load_subject, predict
    from cxr_nbdev.train import get_data, train
    for epochs, compiled in ((1, True), (2, True), (3, False)):
        train(replace(cfg, epochs=epochs, compile=compiled, resume=epochs > 1), show=lambda line: None)
        check_run(folder, epochs)
    subject, tables = load_subject(folder/"best.ckpt", "short"), get_data(cfg).val.tables
    plain = predict(subject, tables, device=device)
    subject.detector.net.compile()
    quick = predict(subject, tables, device=device)
    for i, p in plain.preds.items(): assert abs(p["scores"][:10]-quick.preds[i]["scores"][:10]).max() < 1e-2
    assert evaluate(subject, plain, n_boot=10)[0]["n_val_images"] == len(tables)


@on_gpu
@pytest.mark.slow
def test_compiled(tmp_path, config): check_compiled(tmp_path/"short", config, DEVICE)


@pytest.mark.slow
def test_compiled_on_a_cpu(tmp_path, config):
    "Traced and taken apart as for a GPU, but run as PyTorch's own operations: writing and building C++ for all of them takes minutes."
    with mock.patch.object(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager")):
        check_compiled(tmp_path/"short", replace(config, accelerator="cpu", batch_size=2, limit=8), "cpu")


@contextmanager
def little_memory(share, cfg):
    "The memory of so many eights of images: on a GPU by PyTorch's own limit, on a CPU, which has none, by refusing more."
    from cxr_nbdev.model import Detector, example_batch
    from cxr_nbdev.finders import one_step
    from cxr_nbdev.optim import make_optimizer
    from cxr_nbdev.train import check_inputs
    losses = Detector.losses

    def limited(self, images, *args, **kwargs):
        if self.training and len(images) > 8*share: raise torch.OutOfMemoryError("CUDA out of memory, as a test")
        return losses(self, images, *args, **kwargs)
    if DEVICE == "cpu":
        with mock.patch.object(Detector, "losses", limited): yield
        return
    det = check_inputs(cfg)[1].to(DEVICE)
    opt, batch = make_optimizer(cfg.optimizer, det, cfg.lr, cfg.weight_decay), example_batch(cfg.image_size, 8)
    torch.cuda.empty_cache()
    held = max(one_step(det, opt, *batch) for _ in range(2))
    del det, opt
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share*held/torch.cuda.get_device_properties(0).total_memory)
    try: yield
    finally: torch.cuda.set_per_process_memory_fraction(1.)


@on_gpu
@pytest.mark.parametrize("share, find_lr", [(1.3, False), (1.3, True), (0.7, False)], ids=["in the training", "looking for the rate", "in the pre-flight check"])
def test_out_of_memory(tmp_path, config, small_set, share, find_lr):
    "The message names a batch size, and with it the training ends."
    from cxr_nbdev.train import train
    cfg = replace(config, data_root=str(small_set), image_size=256 if DEVICE == "cuda" else 64, batch_size=16, find_lr=find_lr)
    with little_memory(share, cfg):
        text = ""
        try: train(cfg, show=lambda line: None)
        except MemoryError as e: text = str(e)         # no more of it, as its traceback holds what the step had made
        fits = int(re.search(r"What fits here is (\d+)", text)[1])
        assert 1 <= fits <= 8*share and f"`batch_size` {fits} and `accumulate` {-(-16//fits)}" in text
        train(replace(cfg, run="fits", batch_size=fits, find_lr=False), show=lambda line: None)
    check_run(tmp_path/"fits")


def test_losses_ask_nothing():
    "No loss needs an answer from an accelerator: here one that is only described, so that whatever asked it would fail."
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    from cxr_nbdev.losses import BOX_LOSSES, CLASS_LOSSES, DetectionLosses
    from cxr_nbdev.matching import MATCHERS
    every = [DetectionLosses(CLASSES, *kinds) for kinds in [(c, "huber", m) for c, m in zip(CLASS_LOSSES, [*MATCHERS]*2)] + [("focal", b, "iou") for b in BOX_LOSSES]]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        on = lambda v: fake.from_tensor(v).to("cuda")
        outs, anchors = [[on(v) for v in o] for o in answers()], on(grid())
        wanted = [{k: on(v) for k, v in t.items()} for t in targets((3, 0, 1))]
        for criterion in every:
            criterion.class_weights = on(criterion.class_weights)
            assert {v.device.type for v in criterion(*outs, wanted, anchors).values()} == {"cuda"}
        with pytest.raises(DataDependentOutputException): float(outs[0][0].sum())


@on_gpu
@pytest.mark.parametrize("average", ["none", "ema"])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_no_waiting(tmp_path, config, precision, average):
    "From the batch on the device to the end of the optimiser's step and of all callbacks, nothing asks the device and waits; fp16's scaler does, and the look at the loss every fifty steps."
    from cxr_nbdev.module import DetectionModule, make_trainer, quiet_lightning
    from cxr_nbdev.train import check_inputs, get_data
    from pytorch_lightning.callbacks import Callback
    watched = []

    def watch(mode):
        if DEVICE != "cpu": getattr(torch, DEVICE).set_sync_debug_mode(mode)
        watched.append(mode)

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, i):
            if i: watch("error")                       # the first step makes what the later ones use
        def on_train_batch_end(self, trainer, module, outputs, batch, i): watch("default")

    cfg = replace(config, precision=precision, average=average, batch_size=2)
    (_, det), data = check_inputs(cfg), get_data(cfg)
    with quiet_lightning():
        trainer = make_trainer(cfg, tmp_path, show=lambda line: None)
        trainer.callbacks.append(Watch())              # behind all others, so that their ends of a step are watched too
        try: trainer.fit(DetectionModule(det, cfg), datamodule=data.loaders)
        finally: watch("default")
    assert watched.count("error") == len(data.train)//2 - 1 > 2


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="torch finds fewer than two CUDA devices here")
def test_several_gpus(tmp_path, small_set):
    "One process a GPU by nccl, with the same global batches: the same losses as on one, step by step."
    n = 2 if DEVICE == "cpu" else min(8, torch.cuda.device_count())
    (tmp_path/"script.py").write_text(SCRIPT, encoding="utf-8")
    run(["python", tmp_path/"script.py", small_set, tmp_path, ACCELERATOR, n], env={"MASTER_ADDR": "127.0.0.1"})
    same_losses(tmp_path, n, 1e-3)                     # a GPU takes other sums for other numbers of images
    assert result(tmp_path, f"{n}_{n-1}")["backend"] == dict(cuda="nccl", cpu="gloo")[DEVICE]
