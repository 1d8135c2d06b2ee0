"""The pixel cache among several processes, kills, changed files and full disks; samplers that depend on nothing but seed and epoch."""
import errno
import multiprocessing
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from cxr_nbdev import cache
from cxr_nbdev.cache import PixelCache, cached_pixels
from cxr_nbdev.data import load_tables
from cxr_nbdev.dataset import CXRDataset, load_pixels
from cxr_nbdev.sampling import make_sampler

quiet = lambda line: None
fork = multiprocessing.get_context("fork") if os.name == "posix" else None
needs_fork = pytest.mark.skipif(os.name != "posix", reason="processes are forked here")


@pytest.fixture
def tables(small_set): return load_tables("synthetic", str(small_set))


def decoding(monkeypatch, before=lambda n: None):
    "Counts what is decoded; `before` is called with the number."
    read, n = cache.read_square, []
    def counted(*a):
        n.append(a[0])
        before(len(n))
        return read(*a)
    monkeypatch.setattr(cache, "read_square", counted)
    return n


def test_same_as_load_pixels(tables, tmp_path, monkeypatch):
    n = decoding(monkeypatch)
    for part in (tables, tables.subset(tables.images.image_id[::3]), replace(tables, images=tables.images[::-1].reset_index(drop=True))):
        px, t = cached_pixels(part, 64, tmp_path, show=quiet)
        assert np.array_equal(np.asarray(px), load_pixels(part, 64)[0]) and t is part
    assert len(n) == len(tables)  # a part and another order needed nothing new


@needs_fork
def test_two_processes(tables, tmp_path, monkeypatch):
    "Both ask at the same time: each image is decoded by one of them."
    monkeypatch.setattr(PixelCache, "block", 4*64*64)
    n = decoding(monkeypatch, lambda k: time.sleep(.02))
    def work(pipe):
        lines = []
        px, _ = cached_pixels(tables, 64, tmp_path, workers=1, show=lines.append)
        pipe.send((len(n), np.asarray(px).tobytes(), lines))
    pipes = [fork.Pipe() for _ in range(2)]
    processes = [fork.Process(target=work, args=(p[1],)) for p in pipes]
    for p in processes: p.start()
    answers = [p[0].recv() for p in pipes]
    for p in processes: p.join()
    assert sum(a[0] for a in answers) == len(tables)
    assert {a[1] for a in answers} == {load_pixels(tables, 64)[0].tobytes()}
    assert any("waiting" in line for a in answers for line in a[2])


@needs_fork
@pytest.mark.parametrize("at", [1, 9, 23, 40])
def test_killed(tables, tmp_path, monkeypatch, at):
    "What was done before a kill is kept, and is not done again; nothing half-written is served."
    monkeypatch.setattr(PixelCache, "block", 4*64*64)
    n = decoding(monkeypatch, lambda k: k == at and os.kill(os.getpid(), signal.SIGKILL))
    p = fork.Process(target=lambda: cached_pixels(tables, 64, tmp_path, workers=1, show=quiet))
    p.start(); p.join()
    assert p.exitcode == -signal.SIGKILL
    monkeypatch.undo()
    rows, _ = PixelCache(tmp_path, 64).find(tables)
    n, kept = decoding(monkeypatch), int((rows >= 0).sum())
    assert kept % 4 == 0 and kept < at <= kept+12
    px, _ = cached_pixels(tables, 64, tmp_path, show=quiet)
    assert len(n) == len(tables)-kept and np.array_equal(np.asarray(px), load_pixels(tables, 64)[0])


def test_changed_file(tables, tmp_path):
    "Other bytes under the same name are noticed; who opened the map before keeps what he had."
    path = tmp_path/"one.png"
    path.write_bytes(Path(tables.images.path[3]).read_bytes())
    t = replace(tables, images=tables.images.assign(path=[*tables.images.path[:3], str(path), *tables.images.path[4:]]))
    before, _ = cached_pixels(t, 64, tmp_path/"c", show=quiet)
    old = before[3].copy()
    cv2.imwrite(str(path), 255-cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    after, _ = cached_pixels(t, 64, tmp_path/"c", show=quiet)
    assert np.array_equal(np.asarray(after), load_pixels(t, 64)[0]) and np.array_equal(before[3], old) and not np.array_equal(after[3], old)


def test_full_disk(tables, tmp_path, monkeypatch):
    "Found before the start where it can be, else at the write; the cache stays good and goes on."
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("", (), dict(free=1000))())
    with pytest.raises(OSError, match="no room"): cached_pixels(tables, 64, tmp_path, show=quiet)
    monkeypatch.undo()
    monkeypatch.setattr(PixelCache, "block", 8*64*64)
    written = []
    def full(fd):
        written.append(fd)
        if len(written) == 3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="16 images that are in it stay. Next step"): cached_pixels(tables, 64, tmp_path, show=quiet)
    monkeypatch.undo()
    assert PixelCache(tmp_path, 64).pixels.stat().st_size == 16*64*64
    n = decoding(monkeypatch)
    px, _ = cached_pixels(tables, 64, tmp_path, show=quiet)
    assert len(n) == len(tables)-16 and np.array_equal(np.asarray(px), load_pixels(tables, 64)[0])


@pytest.mark.parametrize("sampling", ["uniform", "class", "balanced"])
@pytest.mark.parametrize("negatives", [-1, 0, .5, 3.])
def test_samplers(tables, sampling, negatives):
    "The same epoch for the same seed, the promised number of negatives, and no image left out that has a share of one or more."
    if sampling == "uniform" and negatives == -1: return
    s, boxed = make_sampler(tables, 7, negatives=negatives, sampling=sampling), tables.images.image_id.isin(tables.boxes.image_id).to_numpy()
    for e in (0, 5):
        s.set_epoch(e)
        at = [o[1] for o in s]
        assert list(s) == list(s) and len(at) == len(s) and {o[0] for o in s} == {e} and len(set(s)) == len(at)
        want, off = (~boxed).sum() if negatives == -1 else negatives*boxed.sum(), 1 if sampling == "uniform" else 3  # unequal shares: one side may take from the other
        assert abs((~boxed[at]).sum()-want) <= off and abs(boxed[at].sum()-boxed.sum()) <= off and abs(len(at)-want-boxed.sum()) <= 1
        assert not set(np.flatnonzero(s.shares >= 1))-set(at)
    seen = [boxed[[o[1] for o in s]].sum() for e in range(100) if s.set_epoch(e) is None]
    assert abs(np.mean(seen)-boxed.sum()) < .5  # on average as promised


def many(n, folder):
    "Tables of `n` different small files, an image in eight with a box."
    folder.mkdir()
    im = np.zeros((16, 16), np.uint8)
    for i in range(n):
        im[0, :4] = i & 255, i >> 8 & 255, i >> 16, 255
        (folder/f"{i}.png").write_bytes(cv2.imencode(".png", im)[1].tobytes())
    ids = pd.Series([f"i{i}" for i in range(n)])
    images = pd.DataFrame(dict(image_id=ids, path=[str(folder/f"{i}.png") for i in range(n)], patient_id=ids, source="many", width=16, height=16, view="PA", sex="F", age=50., A=1.))
    k = np.arange(0, n, 8)
    boxes = pd.DataFrame(dict(image_id=ids[k].to_list(), label="A", x1=np.float32(2), y1=np.float32(2), x2=np.float32(9), y2=np.float32(9), reader=""))
    from cxr_nbdev.data import Tables
    return Tables(images, boxes, ("A",), pd.DataFrame(dict(A=np.ones(n, np.int8)), index=pd.Index(ids, name="image_id")))


def own_memory():
    "GiB of memory that is this process's own, without the pages of mapped files."
    return next(int(o.split()[1]) for o in open("/proc/self/status") if o.startswith("RssAnon"))/2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_112k_images(tmp_path):
    "The whole of NIH at 256 px, built by the real code from files that are small, and shown by the real data set."
    n, size = 112_120, 256
    import shutil
    if shutil.disk_usage(tmp_path).free < 1.5*n*size**2: pytest.skip("needs 11 GB of disk")
    t, facts, start = many(n, tmp_path/"files"), {}, own_memory()
    def timed(name, f):
        s = time.perf_counter(); o = f(); facts[name] = f"{time.perf_counter()-s:.1f} s, {own_memory()-start:.2f} GiB"
        return o
    timed("build", lambda: cached_pixels(t, size, tmp_path/"c", show=quiet))
    px, _ = timed("open", lambda: cached_pixels(t, size, tmp_path/"c", show=quiet))
    ds = timed("data set", lambda: CXRDataset(t, size, pixels=px))
    timed("10,000 items", lambda: [ds[i] for i in np.random.default_rng(0).integers(0, n, 10_000).tolist()] and None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    print(facts, f"largest resident size with mapped pages {peak:.1f} GiB")
    assert len(px) == n and ds[n-1]["image"].shape == (1, size, size) and len(ds[n-8]["boxes"]) == 1
    assert own_memory()-start < 4
    shutil.rmtree(tmp_path)
