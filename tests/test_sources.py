"""The data set sources: their parsers on whatever a disk may hold, and what the notebooks leave to longer runs."""
import csv
import io
import json
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import SHARED

CORNERS = ["x_min", "y_min", "x_max", "y_max"]


@pytest.fixture
def prove(request):
    "A property, tried on few examples, and on many with --slow."
    from hypothesis import given, settings
    many = 300 if request.config.getoption("--slow") else 10

    def run(check, *strategies): settings(max_examples=many, deadline=None, database=None, derandomize=True)(given(*strategies)(check))()
    return run


def tried(f):
    "What `f` gives, or None where it refuses with a clear error; any other exception is a failure."
    try: return f()
    except (ValueError, OSError) as e:
        assert len(str(e)) > 7, f"the error says too little: {e!r}"
        return None


def cells():
    "What stands in a table's cell: numbers, words, nothing, and things that break parsers."
    from hypothesis import strategies as st
    return st.one_of(st.sampled_from(["", "0", "1", "14", "3", "nan", "inf", "-5", "1e400", "a", "b", "R8", "R9", "No finding", "Cardiomegaly", "ILD", "Normal", "Lung Opacity",
                                      "-1", "1 2", "5 5 5", "YES", "NO", '"', "'", "\ufeff", " ", "1.0"]),
                     st.integers(-10, 1030).map(str), st.text(max_size=6).filter(lambda s: not set(s) & set("\r\n,\"")))


def tables(header):
    "CSV texts under a header, with lines of any length."
    from hypothesis import strategies as st
    n = len(header)
    return st.lists(st.lists(cells(), min_size=1, max_size=n+1), max_size=8).map(lambda rows: "\n".join([",".join(header), *map(",".join, rows)]) + "\n")


def parsers():
    from cxr_nbdev import chestxdet, lookup, nih, rsna, siim, vindr
    images = pd.DataFrame({"image_id": ["a", "b"], "opacity": [1., 0.]})
    return {"rsna labels": (rsna.read_rsna_labels, rsna.RSNA_COLUMNS), "rsna classes": (lambda p, *a: rsna.read_rsna_classes(p, images, *a), ["patientId", "class"]),
            "vindr boxes": (vindr.read_vindr_boxes, ["image_id", "class_name", "class_id", "rad_id", *CORNERS]), "siim": (lambda p, *a: siim.read_siim(p, "auto", 1024, *a), ["ImageId", " EncodedPixels"]),
            "vindr labels": (vindr.read_vindr_labels, ["image_id", "rad_id", "Cardiomegaly", "Pneumonia", "No finding"]), "chestxdet": (chestxdet.read_chestxdet, None),
            "radiologists": (lambda p, *a: nih.read_radiologists(p), ["Image Index", *nih.GOOGLE4]), "table": (lambda p, *a: lookup.read_table(p, ["x"]), ["x", "y"])}


@pytest.mark.parametrize("name", ["rsna labels", "rsna classes", "vindr boxes", "vindr labels", "siim", "radiologists", "table", "chestxdet"])
def test_any_bytes(name, prove, tmp_path):
    "Bytes of any kind end in tables or in a clear error."
    from hypothesis import strategies as st
    parse, header = parsers()[name]
    start = b"[" if header is None else (",".join(header)+"\n").encode()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as z: z.writestr("a.csv", start)

    def check(raw, prefix):
        path = tmp_path/"file"
        path.write_bytes(prefix + raw)
        for args in ((), (True,)): tried(lambda: parse(path, *args))
    prove(check, st.binary(max_size=60), st.sampled_from([b"", start, b"\xef\xbb\xbf"+start, b"\x1f\x8b", b"PK\3\4", zipped.getvalue()[:-9]]))


@pytest.mark.parametrize("name", ["rsna labels", "rsna classes", "vindr boxes", "vindr labels", "siim", "radiologists", "table"])
def test_any_table(name, prove, tmp_path):
    "A table with the right header and any cells: tables, or a clear error; and what passes without `skip_bad` is not changed by it."
    parse, header = parsers()[name]

    def check(text):
        path = tmp_path/"file.csv"
        path.write_text(text, encoding="utf-8")
        strict, counts = tried(lambda: parse(path)), {}
        loose = tried(lambda: parse(path, True, counts)) if name not in ("radiologists", "table") else strict
        if strict is None: return
        assert not counts and loose is not None
        first = lambda o: o[0] if isinstance(o, tuple) else o
        assert first(strict).equals(first(loose)) if hasattr(first(strict), "equals") else first(strict) == first(loose)
    prove(check, tables(header))


def test_no_silent_drop_vindr(prove, tmp_path):
    "Of a box table each line is in the result or in the counts."
    from cxr_nbdev.vindr import read_vindr_boxes
    header = ["image_id", "class_name", "class_id", "rad_id", *CORNERS]

    def check(text):
        path, counts = tmp_path/"train.csv", {}
        path.write_text(text, encoding="utf-8")
        rows = tried(lambda: read_vindr_boxes(path, True, counts))
        if rows is not None: assert len(rows)+sum(counts.values()) == sum(any(c.strip() for c in r) for r in csv.reader(io.StringIO(text, newline="")))-1
    prove(check, tables(header))


def test_no_silent_drop_siim(prove, tmp_path):
    "Of SIIM's table each line is in the result or in the counts."
    from cxr_nbdev.siim import read_siim

    def check(text):
        path, counts = tmp_path/"train-rle.csv", {}
        path.write_text(text, encoding="utf-8")
        got = tried(lambda: read_siim(path, "relative", 1024, True, counts))
        if got is not None: assert len(got[0])+sum(counts.values()) == sum(any(c.strip() for c in r) for r in csv.reader(io.StringIO(text, newline="")))-1
    prove(check, tables(["ImageId", " EncodedPixels"]))


def test_no_silent_drop_chestxdet(prove, tmp_path):
    "Of ChestX-Det's JSON each entry is in the result or in the counts, and each good entry's boxes are all there."
    from hypothesis import strategies as st

    from cxr_nbdev.chestxdet import read_chestxdet
    any_json = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4), lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=4), o, max_size=3), max_leaves=6)
    good = st.lists(st.tuples(st.sampled_from(["Mass", "Effusion"]), st.lists(st.integers(0, 1024), min_size=4, max_size=4)), max_size=3).map(
        lambda f: {"file_name": "a.png", "syms": [s for s, _ in f], "boxes": [b for _, b in f]})
    odd = st.fixed_dictionaries({"file_name": any_json, "syms": any_json, "boxes": any_json})

    def check(entries):
        path, counts = tmp_path/"ChestX_Det_train.json", {}
        path.write_text(json.dumps(entries))
        names, boxes = read_chestxdet(path, True, counts)
        assert len(names)+sum(counts.values()) == len(entries)
        assert len(boxes) >= sum(len(e["syms"]) for e in entries if isinstance(e, dict) and e.get("file_name") == "a.png" and "polygons" not in e and all(isinstance(s, str) for s in e["syms"]) and e["syms"] and e["boxes"] and isinstance(e["boxes"][0], list) and set(e["syms"]) <= {"Mass", "Effusion"})
        if not counts: assert len(tried(lambda: read_chestxdet(path))[1]) == len(boxes)
    prove(check, st.lists(good | odd | any_json, max_size=5))


def runs_text(mask, relative):
    edge = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel(), 0]))
    start, end = edge[::2], edge[1::2]
    return " ".join(f"{s} {n}" for s, n in zip(start-np.r_[0, end[:-1]] if relative else start+1, end-start))


def test_run_lengths_and_boxes(prove):
    "Masks survive both dialects, and boxes are those of scipy's connected areas."
    from hypothesis import strategies as st
    from scipy import ndimage

    from cxr_nbdev.siim import mask_boxes, mask_of, runs_of

    def check(seed, share, side):
        mask = (np.random.default_rng(seed).random((side, side)) < share).astype(np.uint8)
        if not mask.any(): return
        for relative in (True, False): assert (mask_of(runs_of(runs_text(mask, relative), relative, side), side) == mask).all()
        label, n = ndimage.label(mask, np.ones((3, 3)))
        theirs = sorted((x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(label))
        assert list(map(tuple, mask_boxes(mask)[0])) == theirs
        areas = ndimage.sum(mask, label, range(1, n+1))
        assert mask_boxes(mask, 4)[1] == (areas < 4).sum()
    prove(check, st.integers(0, 10**6), st.floats(.02, .9), st.integers(1, 24))


def test_any_run_lengths(prove):
    "Any text is runs inside the frame, in their order, or a clear error."
    from hypothesis import strategies as st

    from cxr_nbdev.siim import runs_of

    def check(words, relative):
        runs = tried(lambda: runs_of(" ".join(words), relative, 16))
        if runs is not None: assert (runs[:, 1] > runs[:, 0]).all() and (runs[1:, 0] >= runs[:-1, 1]).all() and runs[0, 0] >= 0 and runs[-1, 1] <= 256
    prove(check, st.lists(st.integers(-3, 300).map(str) | st.text(max_size=4) | st.integers().map(str), max_size=9), st.booleans())


def test_fusion(prove):
    "Each box is in one fused box, which lies between its members; the order of lines plays no part."
    from hypothesis import strategies as st

    from cxr_nbdev.vindr import fuse_boxes, fuse_readers
    box = st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(1, 60), st.integers(1, 60)).map(lambda b: (b[0], b[1], b[0]+b[2], b[1]+b[3]))

    def check(marks, iou, need, seed):
        xyxy = np.array([b for b, *_ in marks], float).reshape(-1, 4)
        fused, members = fuse_boxes(xyxy, iou=iou)
        assert sorted(i for m in members for i in m) == list(range(len(xyxy)))
        for f, m in zip(fused, members): assert (f >= xyxy[m].min(0)-1e-9).all() and (f <= xyxy[m].max(0)+1e-9).all()
        t = pd.DataFrame([("im", label, r, *b) for b, r, label in marks], columns=["image_id", "label", "reader", "x1", "y1", "x2", "y2"])
        one, left = fuse_readers(t, need, iou)
        other, left2 = fuse_readers(t.sample(frac=1, random_state=seed), need, iou)
        assert one.equals(other) and sorted(left) == sorted(left2)
        assert (one.reader.str.count(r"\+")+1 >= need).all() and set(one.label) | {c for _, c in left} == set(t.label)
    prove(check, st.lists(st.tuples(box, st.sampled_from(["R8", "R9", "R10"]), st.sampled_from(["ILD", "Mass"])), max_size=8), st.floats(.1, .9), st.integers(1, 3), st.integers(0, 99))


def test_radiologists(prove):
    "Whatever the answers: boxed labels stay, each answer is counted, and a YES never makes both findings absent."
    from hypothesis import strategies as st

    from cxr_nbdev.nih import use_radiologists
    row = st.tuples(*[st.sampled_from([0., 1., float("nan")])]*3, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["", "Nodule", "Mass", "Pneumothorax"]))

    def check(rows):
        table = pd.DataFrame([(f"{i}.png", *r[:3]) for i, r in enumerate(rows)], columns=["image_id", "Pneumothorax", "Nodule", "Mass"])
        said = pd.DataFrame([(f"{i}.png", float(r[3]), float(r[4])) for i, r in enumerate(rows) if r[5]], columns=["image_id", "Pneumothorax", "Nodule or mass"])
        boxes = pd.DataFrame([(f"{i}.png", r[6]) for i, r in enumerate(rows) if r[6]], columns=["image_id", "label"])
        new, changes = use_radiologists(table, said, boxes)
        assert len(changes) == 3*len(said)
        for i, r in enumerate(rows):
            for c in ("Pneumothorax", "Nodule", "Mass"):
                if not r[5] or r[6] == c: np.testing.assert_equal(new[c][i], table[c][i])
            if r[5] and r[6] == "" and r[4]: assert not (new.Nodule[i] == 0 and new.Mass[i] == 0)
            if r[5] and r[6] != "Pneumothorax": assert new.Pneumothorax[i] == float(r[3])
    prove(check, st.lists(row, min_size=1, max_size=6))


def test_folders_are_searched_once(tmp_path, monkeypatch):
    "Of NIH's images folders each is listed a single time."
    import os

    from cxr_nbdev.nih import find_images
    for d in ("images", "images_001/images", "images_002/images"): (tmp_path/d).mkdir(parents=True)
    (tmp_path/"images_001"/"images"/"a.png").write_bytes(b"")
    seen, real = [], os.scandir

    def scandir(p): seen.append(os.path.realpath(p)); return real(p)
    monkeypatch.setattr(os, "scandir", scandir)
    assert list(find_images(tmp_path)) == ["a.png"]
    inside = [p for p in seen if p != os.path.realpath(tmp_path)]
    assert len(inside) == len(set(inside)), f"listed more than once: {inside}"


def write_dicom(path, side, patient, sex="F", age="047Y"):
    "A small radiograph with a header."
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = DigitalXRayImageStorageForPresentation, generate_uid(), ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0"*128)
    for k, v in dict(SOPClassUID=meta.MediaStorageSOPClassUID, SOPInstanceUID=meta.MediaStorageSOPInstanceUID, Modality="DX", BodyPartExamined="CHEST", ViewPosition="AP", PatientID=patient,
                     PatientSex=sex, PatientAge=age, PhotometricInterpretation="MONOCHROME2", SamplesPerPixel=1, Rows=side, Columns=side, BitsAllocated=8, BitsStored=8, HighBit=7,
                     PixelRepresentation=0).items(): setattr(ds, k, v)
    ds.PixelData = np.arange(side*side, dtype=np.uint32).astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds)


@pytest.mark.parametrize("name", ["rsna", pytest.param("vindr", marks=pytest.mark.slow), pytest.param("siim", marks=pytest.mark.slow)])
def test_dicom_folders(name, tmp_path):
    "The sources in their published form, DICOM: sizes, boxes, what the header says, and no identifier."
    from cxr_nbdev.sources import check_source
    root, folder, side = tmp_path/name, {"rsna": "stage_2_train_images", "vindr": "train", "siim": "dicom-images-train/1.2/3.4"}[name], 256
    for i, who in zip("abc", ("Secret^Ann", "Secret^Ann", "Secret^Bob")): write_dicom(root/folder/f"{i}.{'dicom' if name == 'vindr' else 'dcm'}", side, who)
    mask = np.zeros((1024, 1024), np.uint8)
    mask[200:400, 100:300] = 1
    text = {"rsna": "patientId,x,y,width,height,Target\na,100,200,200,200,1\nb,,,,,0\nc,,,,,0\n", "siim": f"ImageId, EncodedPixels\na, {runs_text(mask, True)}\nb, -1\nc, -1\n",
            "vindr": "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\na,Pneumothorax,12,R9,25,50,75,100\nb,No finding,14,R9,,,,\nc,No finding,14,R9,,,,\n"}[name]
    (root/{"rsna": "stage_2_train_labels.csv", "vindr": "train.csv", "siim": "train-rle.csv"}[name]).write_text(text)
    t = check_source(name, root)
    assert t.boxes[["x1", "y1", "x2", "y2"]].to_numpy().tolist() == [[25, 50, 75, 100]] and set(t.images.width) == {side}
    assert set(t.images.sex) == {"F"} and set(t.images.age) == {47} and set(t.images["view"]) == {"PA" if name == "vindr" else "AP"}
    assert t.images.patient_id.nunique() == (2 if name == "siim" else 3)
    assert "Secret" not in t.images.drop(columns="path").to_csv() + json.dumps(t.info)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared folder with real files is absent (CXR_SHARED)")
def test_real_annotations_whole(tmp_path):
    "All of the real annotation files are read, and the numbers are the published ones."
    from cxr_nbdev.chestxdet import read_chestxdet
    from cxr_nbdev.nih import read_radiologists
    from cxr_nbdev.rsna import read_rsna_labels
    files = SHARED/"annotations"
    images, boxes = read_rsna_labels(files/"rsna_stage_2_train_labels.csv.zip")
    assert (len(images), len(boxes), int(images.opacity.sum())) == (26684, 9555, 6012)
    assert [len(read_chestxdet(files/f"ChestX_Det_{p}.json")[0]) for p in ("train", "test")] == [3025, 553]
    assert len(read_radiologists(files/"google2019_nih-chest-xray-labels.csv.gz")) == 4376
