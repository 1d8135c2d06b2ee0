"""Property tests of the readers of annotation files: arbitrary text, damaged files, round trips. Nothing but a clear error, and no row lost in silence."""
import csv
import io
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
import numpy as np
import pandas as pd
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from cxr_nbdev.boxcsv import load_csv, read_boxes, write_csv
from cxr_nbdev.coco import load_coco, write_coco
from cxr_nbdev.data import IMAGE_COLUMNS, State, Tables, check_tables, data_hash
from cxr_nbdev.nih import BOX_HEADER, read_nih_boxes, read_nih_labels, read_text
from cxr_nbdev.sidecar import RESERVED, hard_tables, png_head, same_tables
from cxr_nbdev.voc import load_voc, read_voc, write_voc
from cxr_nbdev.yolo import load_yolo, read_yolo, write_yolo

FORMATS = dict(coco=(write_coco, load_coco), yolo=(write_yolo, load_yolo), voc=(write_voc, load_voc), csv=(write_csv, load_csv))
ODD = ("nan", "inf", "-inf", "1e999", "", "-1", "0", "1e-300", "999999999999", "x", '"', "1,5", "1_0", "٣", "NaN", "null", "[]", "{}", "<", "\0", "é")


@pytest.fixture
def examples(request):
    "many(test, quick): runs a property with few examples, or with thirty times as many under --slow."
    slow = request.config.getoption("--slow")
    def many(test, quick):
        phases = tuple(Phase) if slow else (Phase.generate,)  # looking for a smaller example takes minutes
        settings(max_examples=quick*(30 if slow else 1), deadline=None, derandomize=not slow, database=None, phases=phases, suppress_health_check=list(HealthCheck))(test)()
    return many


@pytest.fixture
def home():
    with tempfile.TemporaryDirectory() as d: yield Path(d).resolve()


def clear(load, *names):
    "What `load` gives, or None where it refuses with a message that has one of the names; another exception is a failure."
    try: return load()
    except (ValueError, OSError) as e:
        assert not isinstance(e, UnicodeDecodeError) and any(n in str(e) for n in names), f"the message should name {' or '.join(names)}: {e!r}"


@st.composite
def damaged(draw, text):
    "A text with one to three things wrong that happen to files."
    for _ in range(draw(st.integers(1, 3))):
        lines = text.split("\n")
        k = draw(st.integers(0, max(len(lines)-1, 0)))
        numbers = [m.span() for m in re.finditer(r"\d+(\.\d+)?", text)]
        kind = draw(st.sampled_from(("number", "number", "cut", "drop", "twice", "swap", "columns", "insert", "cr")))
        if kind == "number" and numbers:
            a, b = draw(st.sampled_from(numbers))
            text = text[:a]+draw(st.sampled_from(ODD))+text[b:]
        elif kind == "cut": text = text[:draw(st.integers(0, len(text)))]
        elif kind == "drop":
            a = draw(st.integers(0, len(text)))
            text = text[:a]+text[a+draw(st.integers(1, 30)):]
        elif kind == "twice": text = "\n".join([*lines[:k+1], *lines[k:]])
        elif kind == "swap":
            words = re.split(r"([,;\s<>])", lines[k])
            i, j = (draw(st.integers(0, len(words)-1)) for _ in range(2))
            words[i], words[j] = words[j], words[i]
            text = "\n".join([*lines[:k], "".join(words), *lines[k+1:]])
        elif kind == "columns":
            order = draw(st.permutations(range(lines[0].count(",")+1)))
            text = "\n".join(",".join(c[i] for i in order) if len(c := o.split(",")) == len(order) else o for o in lines)
        elif kind == "insert":
            a = draw(st.integers(0, len(text)))
            text = text[:a]+draw(st.text(max_size=8))+text[a:]
        else: text = text.replace("\n", "\r\n")
    return text


def csv_rows(text):
    "Rows of a CSV below its header, by Python's own reader."
    sep = max(",;\t|", key=next(o for o in text.splitlines() if o.strip()).count)
    return sum(any(c.strip() for c in r) for r in csv.reader(io.StringIO(text, newline=""), delimiter=sep))-1


def test_yolo_lines(examples):
    "Every line is a box or is named."
    word = st.one_of(st.sampled_from((*ODD, "0", "1", "0.5", "0.25", "Mass")), st.text(max_size=4))
    lines = st.lists(st.lists(word, max_size=9).map(" ".join), max_size=6).map("\n".join)
    @given(st.one_of(st.text(), lines))
    def check(text):
        rows, bad = read_yolo(text, {0: "Mass", 1: "Großes Herz"})
        assert len(rows)+len(bad) == sum(bool(o.split()) for o in text.splitlines())
        assert all(np.isfinite(r[2:]).all() for r in rows)
    examples(check, 25)


def test_voc_text(examples, home):
    "Every object is a box or is named; what is no annotation names its file."
    write_voc(hard_tables(home/"hard"), home/"voc")
    valid = (home/"voc/Annotations/00000001_000.xml").read_text(encoding="utf-8")
    @given(st.one_of(st.text(), damaged(valid)))
    def check(text):
        got = clear(lambda: read_voc(text, "a.xml"), "a.xml")
        if got: assert len(got[1])+len(got[2]) == text.count("<object>") and all(np.isfinite(r[2:6]).all() for r in got[1])
    examples(check, 25)


def test_csv_text(examples, home):
    "Every row is a box, an image, a finding or is named."
    write_csv(hard_tables(home/"hard"), home/"csv")
    valid = (home/"csv/boxes.csv").read_text(encoding="utf-8")
    cell = st.one_of(st.sampled_from((*ODD[:-2], "a", "Mass", "1", "2.5", "No finding")), st.text(max_size=4))
    table = st.lists(st.lists(cell, min_size=6, max_size=6).map(",".join), max_size=5).map(lambda r: "\n".join(["image_id,label,x1,y1,x2,y2", *r]))
    @given(st.one_of(st.text(), table, damaged(valid)))
    def check(text):
        (home/"b.csv").write_bytes(text.encode())
        got = clear(lambda: read_boxes(home/"b.csv"), "b.csv")
        if got: assert sum(len(got[k]) for k in ("box", "image", "finding", "bad")) == csv_rows(read_text(home/"b.csv"))
    examples(check, 25)


def test_nih_text(examples, home):
    "NIH's two tables: all rows, or an error that names the file."
    boxes = BOX_HEADER+",,,\n00000001_000.png,Mass,10,20.5,30,40\n00000002_000.png,Infiltrate,1,2,3,4\n"
    labels = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n00000001_000.png,Mass|Nodule,0,1,58,M,PA\n"
              "00000002_000.png,No Finding,0,2,058Y,F,AP\n00000003_000.png,Infiltration,0,3,414,F,AP\n")
    @given(st.one_of(st.text(), damaged(boxes)), st.one_of(st.text(), damaged(labels)))
    def check(text, table):
        for name, read, content in (("BBox_List_2017.csv", read_nih_boxes, text), ("Data_Entry_2017.csv", read_nih_labels, table)):
            (home/name).write_bytes(content.encode())
            got = clear(lambda: read(home/name), name)
            if got is not None: assert len(got) == sum(any(c.strip() for c in r) for r in csv.reader(io.StringIO(read_text(home/name), newline="")))-1
    examples(check, 25)


def test_huge_fields(home):
    "Python's csv module refuses a cell of 128 KB with an error of its own kind."
    for read, header in ((read_nih_boxes, BOX_HEADER), (read_nih_labels, "Image Index,Finding Labels"), (read_boxes, "image_id,label,x1,y1,x2,y2")):
        (home/"b.csv").write_text(f"{header}\n{'x'*200_000},Mass,1,2,3,4\n")
        clear(lambda: read(home/"b.csv"), "b.csv")
    assert clear(lambda: read_voc("<annotation>"+"<a>"*200_000, "a.xml"), "a.xml") is None
    (home/"a.json").write_text("["*200_000)
    assert clear(lambda: load_coco(home), "a.json") is None


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.just(10**400), st.text(max_size=4)),
                    lambda o: st.lists(o, max_size=4) | st.dictionaries(st.sampled_from(("id", "image_id", "category_id", "bbox", "file_name", "name", "width", "extra", "info")), o, max_size=4), max_leaves=8)


def test_coco_values(examples, home):
    "Any value of JSON in any place of a COCO file: every annotation is a box, a region, or counted; or the error names the file."
    write_coco(hard_tables(home/"hard"), home/"coco")
    file = home/"coco/annotations.json"
    valid = json.loads(file.read_text(encoding="utf-8"))
    keys = ("id", "file_name", "image_id", "category_id", "bbox", "iscrowd", "segmentation", "name", "width", "height", "patient_id", "view", "age", "source", "neg_category_ids",
            "not_exhaustive_category_ids", "present_category_ids", "unknown_category_ids", "extra", "reader", "info", "images", "annotations", "categories")
    @given(st.data())
    def check(data):
        d = json.loads(json.dumps(valid))
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.sampled_from([d, *(o for k in ("images", "annotations", "categories") if isinstance(d.get(k), list) for o in d[k] if isinstance(o, dict))]))
            at[data.draw(st.sampled_from([k for k in keys if k in at or k in ("iscrowd", "segmentation")]))] = data.draw(JSON)
        file.write_text(json.dumps(d), encoding="utf-8")
        t = clear(lambda: load_coco(file.parent, "own", skip_bad=True), "annotations.json", "coco")
        if t is not None and not t.info["skipped"]: assert len(t.boxes)+sum(t.info["skipped_boxes"].values())+t.info["crowds"] >= len(d["annotations"])
        clear(lambda: load_coco(file.parent, "own"), "annotations.json", "coco")
    examples(check, 10)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_folder(examples, home, name):
    "Any text file of a written folder, damaged: the folder loads, with what was left out counted, or one error names the file, the folder or the image."
    write, load = FORMATS[name]
    tables = hard_tables(home/"hard")
    good = write(tables, home/name)
    files = [p for p in sorted(good.rglob("*")) if p.is_file() and p.suffix != ".png"]
    rows = dict(yolo=lambda: sum(bool(o.split()) for f in (good/"labels").glob("*.txt") for o in read_text(f).splitlines()),
                voc=lambda: sum(read_text(f).count("<object>") for f in (good/"Annotations").glob("*.xml")), csv=lambda: sum(len(read_boxes(good/"boxes.csv")[k]) for k in ("box", "bad")))
    @given(st.data())
    def check(data):
        f = data.draw(st.sampled_from(files))
        old = f.read_bytes()
        try:
            f.write_text(data.draw(damaged(old.decode())), encoding="utf-8")
            said = (f.name, f.stem, name, *tables.images.image_id)
            clear(lambda: load(good, "own"), *said)
            t = clear(lambda: load(good, "own", skip_bad=True), *said)
            if t is not None and not t.info["skipped"] and name in rows: assert len(t.boxes)+sum(t.info["skipped_boxes"].values()) == rows[name]()
        finally: f.write_bytes(old)
    examples(check, 5)
    same_tables(load(good, "own"), tables)


WORD = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=10).map(str.strip).filter(lambda s: s and s.isprintable())
CLASS = WORD.filter(lambda s: "|" not in s and s not in (*IMAGE_COLUMNS, *RESERVED, "split", "note", "mm")) | st.sampled_from(("Nodule/Mass", "normal", "none", "nan", "7", "yes", "x1"))


@st.composite
def tables(draw, home):
    "Small tables with all that a format could lose."
    ids, classes = draw(st.lists(WORD, min_size=1, max_size=4, unique=True)), tuple(draw(st.lists(CLASS, min_size=1, max_size=3, unique=True)))
    assume(not set(ids) & {"nan"})
    size = [(draw(st.integers(2, 3000)), draw(st.integers(2, 3000))) for _ in ids]
    for k, wh in enumerate(size): png_head(home/f"{k}.png", *wh)
    images = pd.DataFrame({"image_id": ids, "path": [str(home/f"{k}.png") for k in range(len(ids))], "patient_id": [draw(WORD) for _ in ids], "source": "made",
                           "width": [w for w, _ in size], "height": [h for _, h in size], "view": [draw(st.sampled_from(("PA", "AP", ""))) for _ in ids],
                           "sex": [draw(st.sampled_from(("F", "M", ""))) for _ in ids], "age": [draw(st.sampled_from((np.nan, 58., .5))) for _ in ids],
                           "split": [draw(st.sampled_from(("train", "val", "a b", ""))) for _ in ids], "mm": [draw(st.sampled_from((np.nan, .143, 1.))) for _ in ids],
                           "note": [draw(st.just("") | WORD) for _ in ids]})
    rows, states, labels = [], {c: [] for c in classes}, {c: [] for c in classes}
    for i, (w, h) in zip(ids, size):
        for c in classes:
            n = draw(st.sampled_from((0, 0, 1, 2)))
            for _ in range(n):
                x, y = ([draw(st.floats(0, s*.7, width=32).map(float)), draw(st.floats(s*.8, s, width=32).map(float))] for s in (np.float32(w), np.float32(h)))
                rows.append((i, c, x[0], y[0], x[1], y[1], draw(st.just("") | WORD)))
            s = State(draw(st.sampled_from((State.BOXED, State.INCOMPLETE) if n else (State.ABSENT, State.IGNORE))))
            states[c].append(int(s))
            labels[c].append(1. if n else 0. if s == State.ABSENT else draw(st.sampled_from((1., np.nan))))
    boxes = pd.DataFrame(rows, columns=["image_id", "label", "x1", "y1", "x2", "y2", "reader"]).astype(dict.fromkeys(("x1", "y1", "x2", "y2"), np.float32))
    info = {"source": "made", "labels": draw(st.sampled_from(("report", "boxes"))), "skipped": {}}
    return check_tables(Tables(images.assign(**labels), boxes, classes, pd.DataFrame(states, index=pd.Index(ids, name="image_id")).astype("int8"), info))


def test_round_trips(examples, home):
    "From one format to the next and back to the first, tables stay the same to the last bit."
    @given(st.data())
    def check(data):
        first = t = data.draw(tables(home/"made"))
        shutil.rmtree(home/"out", ignore_errors=True)
        for k, name in enumerate((*FORMATS, "coco")):
            write, load = FORMATS[name]
            t = load(write(t, home/"out"/f"{k}", data.draw(st.sampled_from(("copy", "link", "none")))), "own")
            same_tables(t, first)
            assert data_hash(t) == data_hash(first)
    examples(check, 2)
