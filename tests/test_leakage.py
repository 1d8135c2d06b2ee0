"""The same image in two sources, the same patient under two ids, and folds that stay: on generated cases, and on real images where there are any."""
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

few_or_many = lambda request: 300 if request.config.getoption("--slow") else 8
needs_shared = pytest.mark.skipif(not (SHARED/"nih/images").is_dir(), reason="needs the shared folder with real images")


def check(request, test, *strategies):
    "Runs a property test: few examples in the quick suite, many under --slow."
    settings(max_examples=few_or_many(request), deadline=None, database=None, suppress_health_check=list(HealthCheck))(given(*strategies)(test))()


def tables(source="nih", patients=("1", "2", "3"), nih_image=None, ids=None, **columns):
    from cxr_nbdev.data import BOX_COLUMNS, map_classes
    n = len(patients)
    im = pd.DataFrame({"image_id": ids or [f"{source}{k}.png" for k in range(n)], "path": "", "patient_id": list(patients), "source": source, "width": 64, "height": 64, "view": "", "sex": "", "age": np.nan, **columns})
    if nih_image: im["nih_image"] = list(nih_image)
    return map_classes(im, pd.DataFrame(columns=BOX_COLUMNS), "nih8", {"source": source, "labels": "boxes"})


def test_folds_of_any_tables(request, tmp_path):
    "Whatever the patients: everybody in one fold, the file read back is the same, and who comes later moves nobody."
    from cxr_nbdev.folds import read_folds, split_by_folds, write_folds
    count = iter(range(10**6))

    def one(patients, more, k, seed):
        t = tables(patients=[f"p{p}" for p in patients])
        if k > len(set(patients)):
            with pytest.raises(ValueError, match="expected at most"): write_folds(t, k, seed, tmp_path/"too_many.csv")
            return
        path = tmp_path/f"{next(count)}.csv"
        f = write_folds(t, k, seed, path)
        assert read_folds(path).hash == f.hash and set(f.table.fold) <= set(range(k))
        later = tables(patients=[f"p{p}" for p in [*patients, *more]])
        for n in range(k):
            side = lambda t: set(split_by_folds(t, f, n).val) & set(f.table.image_id)
            try: assert side(t) == side(later) == set(f.table.image_id[f.table.fold == n])
            except ValueError as e: assert "side is empty" in str(e)
    check(request, one, st.lists(st.integers(0, 12), min_size=2, max_size=30), st.lists(st.integers(0, 40), max_size=10), st.integers(2, 6), st.integers(0, 3))


def test_any_edit_of_a_manifest_is_noticed(request, tmp_path):
    "One byte changed, lost or added anywhere: one clear ValueError."
    from cxr_nbdev.folds import read_folds, write_folds
    path = tmp_path/"f.csv"
    write_folds(tables(patients=list("abcdefgh")), 2, 0, path)
    good = path.read_bytes()

    def one(at, byte, kind):
        at %= len(good)
        bad = good[:at]+{"changed": bytes([byte]), "lost": b"", "added": bytes([byte])+good[at:at+1]}[kind]+good[at+1:]
        if bad.replace(b"\r\n", b"\n").rstrip(b"\n") == good.rstrip(b"\n"): return
        (tmp_path/"bad.csv").write_bytes(bad)
        with pytest.raises(ValueError, match="bad.csv (was changed|is not a manifest)"): read_folds(tmp_path/"bad.csv")
    check(request, one, st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["changed", "lost", "added"]))


@needs_shared
def test_shipped_folds_are_made_by_one_command(tmp_path):
    "From the real images, in a process of its own, the same bytes."
    command = ("from cxr_nbdev.data import load_tables; from cxr_nbdev.folds import write_folds; import sys\n"
               "t = load_tables('nih', sys.argv[1], 'nih8'); write_folds(t, 5, 42, 'nih5.csv'); write_folds(t, (.15, .85), 42, 'nih_holdout.csv')")
    subprocess.run([sys.executable, "-c", command, str(SHARED/"nih")], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}, timeout=120)
    for name in ("nih5.csv", "nih_holdout.csv"):
        shipped = (ROOT/"cxr_nbdev/folds"/name).read_text(encoding="utf-8")
        assert (tmp_path/name).read_text(encoding="utf-8") == shipped, f"{name} would be made otherwise today"


def test_groups_and_drop(request):
    "Any mixture linked by any names: afterwards no image is in two sources, no patient has two ids, and counts add up."
    from cxr_nbdev.data import mix_tables
    from cxr_nbdev.leakage import drop_overlap, find_overlap, known_patients, leakage_report
    from cxr_nbdev.split import patient_hash

    def one(a, b):
        t = mix_tables([tables("nih", [str(p) for p, _ in a], ids=[f"{k:08}_000.png" for k in range(len(a))]),
                        tables("rsna", [f"rsna:{p}" for p, _ in b], [f"{k:08}_000.png" if k < len(a) else "" for _, k in b])])
        out, says, info = drop_overlap(t)
        assert len(out)+len(info["dropped"]) == len(t) and set(info["dropped"]).isdisjoint(out.images.image_id)
        assert info["images"] == len(info["dropped"]) == sum(info["by_source"].values()) == sum(k < len(a) for _, k in b)
        rows = find_overlap(out).rows
        assert rows.groupby("image").source.nunique().max() == 1 and rows.groupby("person").patient.nunique().max() == 1
        assert {patient_hash(p) for p in t.images.patient_id} <= set(known_patients(out)), "a training patient would not be recognised"
        r = leakage_report(t)
        assert len(r.says) > 20 and len(r.table) == 3 and str(r) and r._repr_markdown_()
    pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), min_size=1, max_size=8)
    check(request, one, pairs, pairs)


def test_close_hashes_is_exact(request):
    "The blocked search finds what two loops find."
    from cxr_nbdev.leakage import close_hashes

    def one(n, seed, block, distance):
        rng = np.random.default_rng(seed)
        h = rng.integers(0, 256, (max(n//3, 1), 32), dtype=np.uint8)[rng.integers(0, max(n//3, 1), n)]
        h ^= np.packbits(rng.random((n, 256)) < rng.choice([0, .1, .4]), axis=1)
        h[:, 0] &= 127
        d = lambda i, j: min(x := int(np.bitwise_count(h[i] ^ h[j]).sum()), 255-x)
        want = {(i, j): d(i, j) for j in range(n) for i in range(j) if d(i, j) <= distance and h[i].any() and h[j].any()}
        got = {(r.i, r.j): r.distance for r in close_hashes(h, distance, [0], block).itertuples()}
        assert got.items() <= want.items()
        assert connected(n, got) == connected(n, want)  # of hashes that are equal bit for bit only the first is searched with
    check(request, one, st.integers(1, 24), st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 100))


def connected(n, pairs):
    "For each of n the smallest that it hangs together with, by the plainest way."
    to = list(range(n))
    for _ in range(n):
        for i, j in pairs: to[i] = to[j] = min(to[i], to[j])
    return to


def test_a_run_on_nih_recognises_patients_in_other_sources():
    "RSNA's and ChestX-Det's tables carry NIH's numbers, and the evaluation's own rule finds them among the training patients."
    from cxr_nbdev.evaluate import seen_patients
    from cxr_nbdev.leakage import drop_overlap, known_patients
    from cxr_nbdev.data import mix_tables
    from cxr_nbdev.sources import name_map, nih_patient
    from cxr_nbdev.split import patient_hash
    names = [n for n, k in name_map("rsna").items() if k.startswith("00000003_")]
    rsna = tables("rsna", [nih_patient("rsna", n) for n in names]+["rsna:nobody"], [name_map("rsna")[n] for n in names]+[""], ids=[*names, "nobody"])
    trained = tables("nih", ["3", "4"], ids=["00000003_000.png", "00000004_000.png"])
    seen = seen_patients(rsna, SimpleNamespace(facts=dict(source="nih", train_patients=list(known_patients(drop_overlap(trained)[0])))))
    assert len(names) > 1 and seen.tolist() == [True]*len(names)+[False]
    own = tables("coco", ["coco:P1", "coco:P1"], ["00000003_000.png", ""], ids=["a", "b"])  # trained on this alone, under its own numbers
    both = drop_overlap(mix_tables([tables("nih", ["3", "4"], ids=["00000003_000.png", "00000004_000.png"]), own]))[0]
    seen = seen_patients(both, SimpleNamespace(facts=dict(source="coco", train_patients=[patient_hash("coco:P1")])))
    assert dict(zip(both.images.image_id, seen)) == {"00000003_000.png": True, "00000004_000.png": False, "b": True}


def test_cross_patients_change_no_fold_silently():
    "Two NIH patients who turn out to be one, and whom the shipped list has in different folds, are an error that names them."
    from cxr_nbdev.folds import read_folds, split_by_folds
    f = read_folds("nih5")
    a, b = (f.table[f.table.fold == n].iloc[0] for n in (0, 1))
    patient = lambda r: str(int(r.image_id[:8]))
    apart = tables(patients=[patient(a), patient(b)], ids=[a.image_id, b.image_id])
    assert split_by_folds(apart, "nih5", 0).val == [a.image_id]
    with pytest.raises(ValueError, match=f"{b.image_id} .fold 1, but its patient here is in fold 0"):
        split_by_folds(tables(patients=[patient(a)]*2, ids=[a.image_id, b.image_id]), "nih5", 0)


@pytest.mark.slow
def test_search_of_all_nih_fits_into_memory():
    "112,120 generated hashes with planted copies, one position, in a process of its own: all found, in less than 3 GB."
    code = ("import numpy as np, os, resource, time; from cxr_nbdev.leakage import close_hashes\n"
            "rng = np.random.default_rng(1); h = rng.integers(0, 256, (112120, 32), dtype=np.uint8); h[:, 0] &= 127; p = rng.choice(112120, (100, 2), replace=False)\n"
            "h[p[:, 1]] = h[p[:, 0]] ^ np.packbits(rng.random((100, 256)) < .15, axis=1); h[:5000] = h[0]*0; start = time.time()\n"
            "c = close_hashes(h, turns=[0]); got = set(zip(c.i, c.j)); want = {tuple(sorted(q)) for q in p.tolist() if min(q) >= 5000}\n"
            "assert want <= got and len(want) > 80, len(want-got); own = [int(l.split()[1])/1e6 for l in (open('/proc/self/status') if os.path.exists('/proc/self/status') else ()) if l.startswith('VmHWM')]\n"
            "print(round(time.time()-start), *(own or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6])) # ru_maxrss may begin with what the tests' own process had")
    o = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=1500)
    assert o.returncode == 0, o.stderr[-2000:]
    seconds, gigabytes = map(float, o.stdout.split())
    assert gigabytes < 3, f"{gigabytes:.1f} GB"


@pytest.mark.slow
@needs_shared
def test_real_images_against_their_copies():
    "A second source made of disguised copies of real images is found again; no two patients are taken for one."
    import cv2
    from cxr_nbdev.data import load_tables
    from cxr_nbdev.dataset import load_pixels
    from cxr_nbdev.leakage import leakage_report
    t = load_tables("nih", SHARED/"nih")
    pixels, t = load_pixels(t, 256)
    ways = [lambda im: 255-im, lambda im: cv2.imdecode(cv2.imencode(".jpg", im, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 0), lambda im: np.ascontiguousarray(np.rot90(im)),
            lambda im: cv2.resize(cv2.resize(im, (160, 160), interpolation=cv2.INTER_AREA), (256, 256)), lambda im: ((im/255.)**.6*255).astype(np.uint8)]
    copies = np.stack([ways[k % 5](im) for k, im in enumerate(pixels)])
    other = tables("other", [f"other:{k}" for k in range(len(t))])
    r = leakage_report(t, other, pixels=[pixels, copies])
    across = r.links[r.links["and"] == "other"]
    right = across.image.map({n: k for k, n in enumerate(t.images.image_id)}) == across["and image"].str[5:-4].astype(int)
    assert right.sum() >= .98*len(t) and (~right).sum() <= 2, (right.sum(), (~right).sum())
    assert r.info["blank"] == 0
