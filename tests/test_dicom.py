"""Names and identifiers in DICOM files stay there; and whatever the bytes are, there is a picture or one clear error."""
import gzip
import io
import logging
import warnings
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("pydicom", reason="DICOM readers are an extra: pip install cxr_nbdev[dicom]")
PERSON = {"PatientName": "Plantedname^Jane{i}", "PatientID": "MRN74{i:05}", "PatientBirthDate": "195{i:01}0417", "AccessionNumber": "ACCPLANT{i:04}", "PatientAddress": "{i} Planted Lane",
          "ReferringPhysicianName": "Doctorplant^{i}", "InstitutionName": "Hospitalplant {i}", "StudyInstanceUID": "1.2.826.99.74.{i}", "OtherPatientNames": "Aliasplant^{i}",
          "PatientComments": "commentplant {i}", "StudyID": "STUDYPLANT{i}", "OperatorsName": "Operatorplant^{i}", "DeviceSerialNumber": "SERIALPLANT{i}", "IssuerOfPatientID": "ISSUERPLANT{i}"}
ALWAYS = dict(Modality="DX", BodyPartExamined="CHEST", ViewPosition="PA", PatientSex="F", PatientAge="061Y", SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=16,
              BitsStored=12, HighBit=11, PixelRepresentation=0, WindowCenter=2048, WindowWidth=4096, PixelSpacing=[.14, .14])


def write(path, pixels, syntax=None, **elements):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    every = dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1", SOPInstanceUID=f"1.2.826.98.{abs(hash(str(path)))}", Rows=pixels.shape[0], Columns=pixels.shape[1], PixelData=pixels.tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some values are wrong on purpose
        for k, v in (ALWAYS | every | elements).items():
            if v is not None: setattr(ds, k, v)
        ds.private_block(0x0011, "PLANTVENDOR", create=True).add_new(1, "LO", "Privateplant")
        if syntax: ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(path, enforce_file_format=True)
    return path


def film(i, size=96):
    "Noise with a bright square: pixels and its box."
    rng = np.random.default_rng(i)
    a, (x, y) = rng.integers(0, 1500, (size, size)), rng.integers(5, size-45, 2)
    a[y:y+40, x:x+40] += 2000
    return a.astype(np.uint16), (float(x), float(y), float(x+40), float(y+40))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A folder of 16 files of 8 persons, their boxes, and every string that must not be seen again."
    folder, boxes, plants = tmp_path_factory.mktemp("dicom")/"ward", [], {"PLANTVENDOR", "Privateplant"}
    folder.mkdir()
    for i in range(16):
        who = {k: v.format(i=i//2) for k, v in PERSON.items()}
        plants |= set(who.values())
        pixels, box = film(i)
        write(folder/f"IM{i:04}", pixels, **who)
        boxes.append((f"IM{i:04}", ("Effusion", "Nodule")[i % 2], *box))
    return folder, pd.DataFrame(boxes, columns=["image_id", "label", "x1", "y1", "x2", "y2"]), plants


def load_ward(root, classes="nih7", skip_bad=False):
    "A source of DICOM files as anybody would write it."
    from cxr_nbdev.dicom import dicom_facts
    from cxr_nbdev.nih import find_images
    from cxr_nbdev.sources import build_tables
    rows = [dict(image_id=n, path=p, **dicom_facts(p)) for n, p in sorted(find_images(root).items())]
    images = pd.DataFrame(rows).rename(columns={"patient": "patient_id"})
    images["patient_id"] = "ward:" + images.patient_id
    boxes = pd.read_csv(f"{root}/boxes.txt")
    return build_tables("ward", images, boxes, classes, skip_bad=skip_bad, info={"annotates": ["Effusion", "Nodule"]}, folder=root)


@pytest.fixture
def ward(planted, monkeypatch):
    "The folder, known as the source `ward`; and the plants."
    from cxr_nbdev import data
    folder, boxes, plants = planted
    boxes.to_csv(folder/"boxes.txt", index=False)
    monkeypatch.setitem(data.SOURCES, "ward", load_ward)
    return folder, plants


def leaks(blob, plants):
    "Which plants are in these bytes, or in what is packed inside of them."
    if isinstance(blob, str): blob = blob.encode()
    if blob[:2] == b"\x1f\x8b": blob += gzip.decompress(blob)
    if blob[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(blob)) as z: blob += b"".join(z.read(n) for n in z.namelist())
    low = blob.lower()
    return {p for p in plants if p.lower().encode() in low or p.lower().encode("utf-16-le") in low}


def test_leaks_are_seen(planted, tmp_path):
    "The search finds what it is there to find, packed or not."
    folder, _, plants = planted
    assert len(leaks((folder/"IM0003").read_bytes(), plants)) == len(PERSON)+2
    assert leaks(gzip.compress(b"x MRN7400003 y"), plants) == {"MRN7400003"}
    with zipfile.ZipFile(tmp_path/"z", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a.txt", "plantedNAME^jane1")
    assert leaks((tmp_path/"z").read_bytes(), plants) == {"Plantedname^Jane1"}
    assert not leaks(b"Plantedname", plants)


def test_tables(ward, capfd, caplog, recwarn):
    "Tables, their `info`, what they show of themselves, and an item hold pseudonyms only."
    from cxr_nbdev.data import load_tables
    from cxr_nbdev.dataset import CXRDataset, load_pixels
    from cxr_nbdev.dicom import pseudonym
    from cxr_nbdev.split import split_patients
    folder, plants = ward
    caplog.set_level(logging.DEBUG)
    t = load_tables("ward", str(folder))
    assert t.images.patient_id.nunique() == 8 and t.images.patient_id[0] == "ward:"+pseudonym("MRN7400000")
    assert set(t.images["view"]) == {"PA"} and set(t.images.age) == {61.} and set(t.images.pixel_spacing) == {.14}
    pixels, t = load_pixels(t, 96)
    x1, y1, x2, y2 = t.boxes.loc[0, ["x1", "y1", "x2", "y2"]].astype(int)
    assert pixels[0, y1:y2, x1:x2].mean() > 2*pixels[0].min()+100
    item = CXRDataset(t, 96)[0]
    seen = [t.images.to_csv(), t.boxes.to_csv(), t.states.to_csv(), repr(t), t._repr_markdown_(), str(t.info), str(item), split_patients(t).manifest.to_csv()]
    out = capfd.readouterr()
    assert not leaks("\n".join([*seen, out.out, out.err, caplog.text, *(str(w.message) for w in recwarn)]), plants)


BAD = {"ct": dict(Modality="CT"), "typed": dict(BodyPartExamined="Plantedname^Jane0"), "kind": dict(Modality="Plantedname^Jane0"), "gone": dict(PixelData=None), "frames": dict(NumberOfFrames=2),
       "function": dict(VOILUTFunction="Plantedname^Jane0"), "odd dates": dict(PatientBirthDate="Plantedname^Jane0", PatientAge="Plantedname^Jane0", ViewPosition="Plantedname^Jane0", PatientSex="Plantedname^Jane0"),
       "photometric": dict(PhotometricInterpretation="Plantedname^Jane0")}


def test_messages(ward, tmp_path, capfd, caplog, recwarn):
    "Neither errors nor warnings repeat what stands in a file, even where somebody typed a name into a field for something else."
    from cxr_nbdev.data import load_tables
    from cxr_nbdev.dataset import load_pixels
    from cxr_nbdev.dicom import DicomError, dicom_facts, dicom_size, read_dicom
    folder, plants = ward
    who, pixels, told, root = {k: v.format(i=0) for k, v in PERSON.items()}, film(0)[0], [], tmp_path/"bad"
    root.mkdir()
    for p in sorted(folder.iterdir()): (root/p.name).write_bytes(p.read_bytes())
    for name, kw in BAD.items(): write(root/f"{name}.dcm", pixels, **who | kw)
    caplog.set_level(logging.DEBUG)
    for o in (caplog, recwarn): o.clear()  # what pydicom said as these were written
    capfd.readouterr()
    whole = (root/"IM0000").read_bytes()
    for at in (200, 700, 900, len(whole)//2): (root/f"cut{at}.dcm").write_bytes(whole[:at])
    for p in sorted(root.glob("*.dcm")):
        for f in (read_dicom, dicom_size, dicom_facts):
            try: told.append(str(f(p)))
            except DicomError as e: told.append(str(e))
    assert sum("DIR" in o.replace(str(root), "DIR") for o in told) > len(BAD)
    with pytest.raises(ValueError, match="cannot be read") as e: load_tables("ward", str(root))
    told.append(str(e.value))
    t = load_tables("ward", str(root), skip_bad=True)
    assert "modality is CT" in t.info["skipped"]["ct.dcm"] and len(t.info["skipped"]) >= 5
    with pytest.raises(ValueError) as e: load_pixels(t, 96)
    _, t = load_pixels(t, 96, skip_bad=True)
    out = capfd.readouterr()
    assert not leaks("\n".join([*told, str(e.value), str(t.info), out.out, out.err, caplog.text, *(str(w.message) for w in recwarn)]), plants)


@pytest.mark.slow
def test_run(ward, runs, capfd, caplog, recwarn):
    "A training on such files: nothing of the persons is in its folder, in MLflow's file, or in what was printed."
    from cxr_nbdev.config import TrainConfig
    from cxr_nbdev.split import patient_hash
    from cxr_nbdev.dicom import pseudonym
    from cxr_nbdev.train import train
    folder, plants = ward
    caplog.set_level(logging.DEBUG)
    said = []
    train(TrainConfig(run="ward", data="ward", data_root=str(folder), image_size=128, epochs=1, batch_size=4, val_fraction=.25, accelerator="cpu"), show=lambda o: said.append(str(o)))
    files = [p for p in runs.rglob("*") if p.is_file()]
    assert {"mlflow.db", "config.json", "best.ckpt"} <= {p.name for p in files}
    assert any(patient_hash("ward:"+pseudonym("MRN7400000")) in p.read_text(errors="ignore") for p in files)  # the pseudonym of a pseudonym is
    out = capfd.readouterr()
    text = "\n".join([*said, out.out, out.err, caplog.text, *(str(w.message) for w in recwarn)])
    assert {str(p.relative_to(runs)): found for p in files if (found := leaks(p.read_bytes(), plants))} == {} and not leaks(text, plants)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    from pydicom.uid import JPEG2000Lossless, RLELossless
    folder = tmp_path_factory.mktemp("examples")
    return [write(folder/f"{i}.dcm", film(i, 64)[0], s).read_bytes() for i, s in enumerate((None, RLELossless, JPEG2000Lossless))]


def prop(n): return settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck))


def check_damaged(blob, path):
    from cxr_nbdev.dicom import DicomError, dicom_facts, dicom_size, read_dicom
    path.write_bytes(blob)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for f in (read_dicom, dicom_size, dicom_facts):
            try: o = f(path)
            except DicomError as e: assert str(e).startswith(f"`{path}` ") and "\0" not in str(e); continue
            if f is read_dicom: assert o.dtype == np.uint8 and o.ndim == 2


@pytest.mark.parametrize("n", [30, pytest.param(1500, marks=pytest.mark.slow)])
def test_damaged(examples, tmp_path, n):
    "Bytes changed, left out or put in anywhere: a picture or the one error."
    @prop(n)
    @given(st.sampled_from(range(len(examples))), st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=3), st.integers(0, 1 << 16))
    def go(which, changes, end):
        blob = bytearray(examples[which])
        for at, new, drop in changes: at = 132+at % min(len(blob)-132, 1500); blob[at:at+drop] = new
        check_damaged(bytes(blob[:max(end % (2*len(blob)), 132)]), tmp_path/"x.dcm")
    go()


@pytest.mark.parametrize("n", [30, pytest.param(1500, marks=pytest.mark.slow)])
def test_shades(tmp_path, n):
    "A window keeps the order of values whatever its numbers; MONOCHROME1 and a negative slope turn it round, both together do not."
    from cxr_nbdev.dicom import DicomError, read_dicom
    @prop(n)
    @given(st.integers(8, 16), st.booleans(), st.floats(-5e4, 5e4), st.floats(0, 1e5), st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]), st.floats(.01, 9), st.booleans(), st.booleans())
    def go(bits, signed, center, width, kind, slope, falls, negative):
        low, high = (-(1 << bits-1), (1 << bits-1)-1) if signed else (0, (1 << bits)-1)
        values = np.linspace(low, high, 64).astype(np.int64).reshape(1, 64)
        write(tmp_path/"w.dcm", values.astype("<i2" if signed else "<u2"), BitsStored=bits, HighBit=bits-1, PixelRepresentation=int(signed), WindowCenter=f"{center:.4f}", WindowWidth=f"{width:.4f}",
              VOILUTFunction=kind, RescaleSlope=f"{-slope if falls else slope:.4f}", RescaleIntercept="0", PhotometricInterpretation=f"MONOCHROME{1 if negative else 2}")
        try: im = read_dicom(tmp_path/"w.dcm")[0].astype(int)
        except DicomError as e: assert "one shade" in str(e) or "window of width" in str(e); return
        assert (np.diff(im if falls == negative else -im) >= 0).all() and im.min() >= 0 and im.max() <= 255
    go()


def test_no_pydicom(ward, monkeypatch):
    "Without pydicom the whole set ends in one sentence that says what to install, and not in 16 bad images."
    import sys
    from cxr_nbdev.dataset import read_image
    from cxr_nbdev.nih import image_sizes
    folder, _ = ward
    for name in ("pydicom", "pydicom.pixels"): monkeypatch.setitem(sys.modules, name, None)
    for f in (lambda: read_image(folder/"IM0000"), lambda: image_sizes({"a": str(folder/"IM0000")})):
        with pytest.raises(ImportError, match=r"pip install cxr_nbdev\[dicom\]"): f()
