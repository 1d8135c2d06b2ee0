"The audit on tables of any shape: it never fails, and its numbers are counts of what is there."
import numpy as np
import pandas as pd
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

CLASSES = ["Effusion", "Mass", "Nodule"]
FLOAT = st.floats(0, 90).map(lambda v: round(v, 2))
IMAGE = st.fixed_dictionaries(dict(patient_id=st.sampled_from("abcde"), source=st.sampled_from(["nih", "other"]), view=st.sampled_from(["AP", "PA", ""]), sex=st.sampled_from(["F", "M", ""]),
                                   age=st.sampled_from([np.nan, -1., 40., 70., 130.]), width=st.sampled_from([100, 300]), height=st.sampled_from([100, 200]), readers=st.sampled_from(["", "R1", "R1+R2", "R1+R2+R3"]),
                                   **{c: st.sampled_from([0., 1., np.nan]) for c in CLASSES}))
BOX = st.tuples(st.integers(0, 20), st.sampled_from(CLASSES), FLOAT, FLOAT, st.sampled_from([1., 5., 10.]), st.sampled_from(["", "R1", "R2", "R1+R2"]))


def made(images, boxes, nih):
    from cxr_nbdev.data import check_tables, map_classes
    im = pd.DataFrame(images).assign(image_id=[f"i{k}" for k in range(len(images))], path="", nih_image=[f"{n:08}_000.png" if n else "" for n in nih[:len(images)]])
    b = pd.DataFrame([(f"i{i % len(images)}", c, x, y, x+s, y+s, r) for i, c, x, y, s, r in boxes], columns=["image_id", "label", "x1", "y1", "x2", "y2", "reader"])
    return check_tables(map_classes(im, b, "own", dict(source="nih+other", labels="report", annotates=CLASSES)))


def test_any_tables(request):
    n = 100 if request.config.getoption("--slow") else 4
    settings(max_examples=n, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))(
        given(st.lists(IMAGE, min_size=1, max_size=9), st.lists(BOX, max_size=12), st.lists(st.integers(0, 6), min_size=9, max_size=9), st.booleans())(one_case))()


def one_case(images, boxes, nih, with_split):
    from cxr_nbdev.audit import audit
    from cxr_nbdev.split import Split
    t = made(images, boxes, nih)
    ids = t.images.image_id.tolist()
    split = Split(ids[::2], ids[1::2], pd.DataFrame(), "", {}) if with_split else None # by image, as nobody should
    a = audit(t, split, pixels=False)
    for c in a.checks:
        assert c.number >= 0 and (c.of is None or c.number <= c.of), c
        assert isinstance(c.number, int) and c.severity in ("problem", "warning", "note", "fine"), c
        assert set(c.ids) <= {*ids, *t.images.patient_id}, c
    assert a.find("ages over 100 or below 0").number == sum(i["age"] in (-1, 130) for i in images)
    assert a.find("labelled findings").number == sum(i[c] == 1 and not ((t.boxes.image_id == f"i{k}") & (t.boxes.label == c)).any() for k, i in enumerate(images) for c in CLASSES)
    if split:
        sides = [{i["patient_id"] for i in images[s::2]} for s in (0, 1)]
        assert a.find("patients on both sides").number >= sum(i["patient_id"] in (sides[0] & sides[1]) for i in images)
    assert a._repr_markdown_().startswith("**") and len(a.table) == len(a.checks)
