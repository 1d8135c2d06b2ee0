"""Policies: properties over drawn boxes, and a record that says exactly what a training lost."""
import json
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

MANY = settings(deadline=None, max_examples=200 if "--slow" in sys.argv else 25)
SIZE = 64
KEPT = {"none": [137.5]*6, "predecessor": [126.85, 137.5, 120.69, 138.66, 85.78, 137.5], "cxr": [141.57, 110.41, 148.45, 107.44, 106.92, 112.31],
        "cxr_flip": [141.57, 110.41, 148.45, 107.44, 106.92, 112.31], "light": [137.5, 159.5, 137.5, 120.15, 158.04, 137.5]}  # mean gray of six seeds
NEW = "geometry", "exposure", "acquisition", "occlusion", "strong"


@st.composite
def films(draw):
    "An image of noise with up to five boxes, some of them at the edge."
    rng, n = np.random.default_rng(draw(st.integers(0, 2**32-1))), draw(st.integers(0, 5))
    at = rng.uniform(0, SIZE-2, (n, 2))*rng.integers(0, 2, (n, 2))
    boxes = np.concatenate([at, at+rng.uniform(1.5, np.maximum(SIZE-at, 1.6))], 1).clip(0, SIZE).astype(np.float32)
    return rng.integers(0, 256, (SIZE, SIZE)).astype(np.uint8), boxes, rng.integers(0, 4, n)


@pytest.mark.parametrize("name", NEW)
@MANY
@given(film=films(), seed=st.integers(0, 2**32-1))
def test_policy(name, film, seed):
    "Nothing that goes in is changed, boxes are sound, every one is kept or counted, and a policy read back gives the same."
    from cxr_nbdev.augment import make_policy, policy_dict, policy_from_dict
    before, (image, boxes, labels) = [o.copy() for o in film], film
    policy = make_policy(name, SIZE)
    out = policy(image, boxes, labels, seed)
    assert all(np.array_equal(a, b) for a, b in zip(before, film))
    assert out[0].shape == (SIZE, SIZE) and out[0].dtype == np.uint8 and out[1].dtype == np.float32 and len(out[1]) == len(out[2])
    assert (out[1] >= 0).all() and (out[1] <= SIZE).all() and (out[1][:, 2:] > out[1][:, :2]).all()
    assert Counter(out[2].tolist())+policy.drops == Counter(labels.tolist()) == policy.seen
    if name not in ("geometry", "strong"): assert np.allclose(out[1], boxes, atol=1e-3) and not policy.drops  # nothing moves
    again = policy_from_dict(json.loads(json.dumps(policy_dict(policy))))(image, boxes, labels, seed)
    assert all(np.array_equal(a, b) for a, b in zip(out, again))


def test_names_and_pictures():
    "What recorded runs rely on: the names, and that a name's picture for a seed stays what it is."
    from cxr_nbdev.augment import list_policies, make_policy
    assert list_policies() == ["none", "predecessor", "cxr", "cxr_flip", "light", *NEW]
    y, x = np.mgrid[:SIZE, :SIZE]
    image = ((x*3+y*2) % 256).astype(np.uint8)
    for name, means in KEPT.items():  # rounding may differ between builds of OpenCV
        now = [make_policy(name, SIZE)(image, [[8, 8, 40, 40]], [0], s)[0].mean() for s in range(6)]
        assert now == pytest.approx(means, abs=.3), name


@pytest.mark.slow
def test_record(runs, small_set, monkeypatch):
    "Lost boxes are counted exactly, with and without workers, and over an interruption; here by a policy that loses many."
    from cxr_nbdev.augment import POLICIES, albumentations_module, make_policy, policy_from_dict
    from cxr_nbdev.config import parse_config
    from cxr_nbdev.ranks import RankSampler
    from cxr_nbdev.rundata import get_data
    from cxr_nbdev.train import train
    away = lambda size: [albumentations_module().Affine(translate_percent=(-.5, .5), p=1)]
    monkeypatch.setitem(POLICIES, "away", (away, 0.))
    values = dict(data="synthetic", data_root=str(small_set), epochs=2, image_size=64, accelerator="cpu", limit=24, augment="away", mosaic=.4, mixup=.2, scheduler="none", batch_size=4)
    def run(**kw):
        train(parse_config(values | kw), show=lambda line: None)
        return json.loads((runs/kw["run"]/"metrics.json").read_text())["augmented_boxes"]
    at_once = run(run="workers", num_workers=2)
    run(run="alone", num_workers=0, epochs=1)
    assert run(run="alone", num_workers=0, resume=True) == at_once
    written = json.loads((runs/"workers/config.json").read_text())["augment_policy"]
    now, back = make_policy("away", 64), policy_from_dict(written)
    image = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    assert all(np.array_equal(now(image, [], [], s)[0], back(image, [], [], s)[0]) for s in range(4)) and written["mix"]["mosaic"] == .4
    data, counts = get_data(parse_config(values)), {k: Counter() for k in ("boxes", "lost", "mix_lost")}
    for epoch in range(2):
        data.loaders.sampler.set_epoch(epoch)
        for at in RankSampler(data.loaders.sampler, 0, 1, whole=4):
            item = data.train[at]
            for k, ids in (("boxes", item["labels"].tolist()), ("lost", item["lost"]), ("mix_lost", item.get("mix_lost", ()))): counts[k].update(ids)
    assert at_once == dict(policy="away", flip="auto", **{k: {c: v[i] for i, c in enumerate(data.tables.classes)} for k, v in counts.items()})
    assert sum(at_once["lost"].values()) > 3 and sum(at_once["mix_lost"].values()) > 0
