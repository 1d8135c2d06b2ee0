"""Mixed images: properties over drawn scenes, and a run that mixes (tests/test_resume.py kills such runs)."""
import json
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

MANY = settings(deadline=None, max_examples=400 if "--slow" in sys.argv else 40)
SIZE, CLASSES = 48, 4


@st.composite
def scenes(draw):
    "An image of noise with up to four boxes."
    from cxr_nbdev.mix import Scene
    rng, n = np.random.default_rng(draw(st.integers(0, 2**32-1))), draw(st.integers(0, 4))
    at = rng.uniform(0, SIZE-2, (n, 2))
    boxes = np.concatenate([at, at+rng.uniform(1, np.maximum(SIZE-at, 1.01))], 1).clip(0, SIZE)
    return Scene(rng.integers(0, 256, (SIZE, SIZE)).astype(np.uint8), boxes, rng.integers(0, CLASSES, n), rng.random(CLASSES) < .2)


def frozen(*scenes): return [(s.image.copy(), s.boxes.copy(), s.labels.copy(), s.ignore.copy(), s.weights.copy(), Counter(s.lost)) for s in scenes]


def same(a, b): return all(all(np.array_equal(x, y) if not isinstance(x, Counter) else x == y for x, y in zip(o, p)) for o, p in zip(a, b))


def sound(m, *given):
    "What holds for every mixture."
    assert m.image.dtype == np.uint8 and m.image.shape == (SIZE, SIZE)
    assert len(m.boxes) == len(m.labels) == len(m.weights) and np.isfinite(m.boxes).all()
    assert (m.boxes >= 0).all() and (m.boxes <= SIZE).all() and (m.boxes[:, 2:] > m.boxes[:, :2]).all()
    for s in given: assert (m.ignore | ~s.ignore).all()  # what is unknown stays so


@MANY
@given(scenes(), scenes(), st.floats(0, 1))
def test_mixup(a, b, share):
    from cxr_nbdev.mix import mixup
    before = frozen(a, b)
    m = mixup(a, b, share)
    sound(m, a, b)
    assert same(before, frozen(a, b)) and not m.lost and len(m.boxes) == len(a.boxes)+len(b.boxes)
    assert m.weights.sum() == pytest.approx(share*len(a.boxes)+(1-share)*len(b.boxes), abs=1e-4)
    low, high = np.minimum(a.image, b.image).astype(int), np.maximum(a.image, b.image).astype(int)
    assert (m.image >= low-1).all() and (m.image <= high+1).all()


@MANY
@given(scenes(), scenes(), st.lists(st.integers(0, SIZE), min_size=4, max_size=4), st.floats(.05, .95))
def test_cutmix(a, b, ends, least):
    from cxr_nbdev.mix import cutmix
    before, rect = frozen(a, b), (*np.minimum(ends[:2], ends[2:]).tolist(), *np.maximum(ends[:2], ends[2:]).tolist())
    m = cutmix(a, b, rect, least)
    sound(m, a, b)
    assert same(before, frozen(a, b))
    inside = np.zeros((SIZE, SIZE), bool)
    inside[rect[1]:rect[3], rect[0]:rect[2]] = True
    assert np.array_equal(m.image, np.where(inside, b.image, a.image))
    x1, y1, x2, y2 = b.boxes.T if len(b.boxes) else np.zeros((4, 0))
    shown = (np.minimum(x2, rect[2])-np.maximum(x1, rect[0])).clip(0)*(np.minimum(y2, rect[3])-np.maximum(y1, rect[1])).clip(0) > 0
    assert len(m.boxes)+sum(m.lost.values()) == len(a.boxes)+shown.sum()  # kept, or counted
    kept = Counter(m.labels.tolist())
    for c, n in m.lost.items(): assert kept[c]+n == (a.labels == c).sum()+(b.labels[shown] == c).sum()


@MANY
@given(st.lists(scenes(), min_size=4, max_size=4), st.integers(SIZE//4, SIZE-SIZE//4), st.integers(SIZE//4, SIZE-SIZE//4))
def test_mosaic(four, x, y):
    from cxr_nbdev.mix import mosaic
    before = frozen(*four)
    m = mosaic(four, x, y)
    sound(m, *four)
    assert same(before, frozen(*four)) and len(m.boxes)+sum(m.lost.values()) <= sum(len(s.boxes) for s in four)
    corner = (m.boxes[:, :2] >= [x, y]).astype(int)  # every box lies in one corner
    assert (m.boxes[:, 2:] <= np.where(corner, SIZE, [x, y])).all()


@MANY
@given(scenes(), scenes(), st.integers(-9, 9), st.integers(-9, 9))
def test_paste(a, b, dx, dy):
    from cxr_nbdev.mix import find_place, paste
    before = frozen(a, b)
    for k in range(len(b.boxes)):
        (x, y), fit = find_place(a, b, k)
        assert abs(x) <= SIZE and abs(y) <= SIZE and -1 <= fit <= 1.001
        m = paste(a, b, k, (dx, dy))
        if m is None: continue
        sound(m, a)
        assert len(m.boxes) == len(a.boxes)+1 and m.labels[-1] == b.labels[k] and np.allclose(m.boxes[-1], b.boxes[k]+[dx, dy, dx, dy])
    assert same(before, frozen(a, b))


@pytest.mark.slow
def test_run(runs, small_set):
    "A run that mixes says so in its record."
    from cxr_nbdev.config import parse_config
    from cxr_nbdev.train import train
    values = dict(run="mixed", data_root=str(small_set), epochs=1, image_size=64, num_workers=0, accelerator="cpu", limit=16, mixup=.3, cutmix=.2, mosaic=.2, paste=.3, mix_off=2)
    train(parse_config(values), show=lambda line: None)
    record = json.loads((runs/"mixed/config.json").read_text())
    assert record["mixup"] == .3 and record["augment_policy"]["mix"]["paste"] == .3 and record["augment_policy"]["mix"]["off"] == 2
