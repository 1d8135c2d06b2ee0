"""`cxr_download` against a server that breaks, stalls, lies and disappears, and against being killed."""
import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from unittest import mock

import numpy as np
import pytest
from conftest import ENV, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK = dict(pause=.001, timeout=.3)
DATA = bytes(np.random.default_rng(0).integers(256, size=90_000, dtype=np.uint8))
CODES = {"503": 503, "429": 429, "416": 416, "202": 202, "404": 404}


class Handler(BaseHTTPRequestHandler):
    "Answers as the server's `plan` says, one entry a request; well when it is empty."
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.startswith("/moved/"):
            self.close_connection = True
            return self.answer(302, b"", {"Location": self.path.removeprefix("/moved"), "Content-Length": 0})
        s, data, ask = self.server, self.server.files.get(self.path.split("/")[-1]), self.headers.get("Range")
        start, how = int((ask or "bytes=0-")[6:-1]), s.plan.pop(0) if s.plan else "well"
        s.asked.append((self.path, start))
        self.close_connection = True
        if data is None: return self.send_error(404)
        if how in CODES: return self.answer(CODES[how], b"", {"Content-Length": 0, "Retry-After": s.after})
        if how == "page": return self.answer(200, b"<html>sign in</html>", {"Content-Type": "text/html", "Content-Length": 20})
        if how == "hangs up": return
        if how == "ignores ranges" or not ask: return self.send(200, data, {"Content-Length": len(data)}, how)
        first = {"wrong range": max(0, start-7), "other place": 0}.get(how, start)
        says = "bytes */*" if how == "no range" else f"bytes {first if how == 'wrong range' else start}-{len(data)-1}/{len(data)}"
        self.send(206, data[first:][:len(data)-start], {"Content-Range": says, "Content-Length": len(data)-start}, how)

    def send(self, code, body, headers, how):
        etag = {"changed": '"changed"', "no marks": None}.get(how, '"first"')
        if how == "breaks": body = body[:len(body)//2]
        if how == "short body": body = body[:len(body)//2]; headers["Content-Length"] = len(body)
        if how == "no length": headers.pop("Content-Length")
        self.answer(code, body[:len(body)//2] if how in ("stalls", "slow") else body, headers | ({"ETag": etag} if etag else {}))
        if how == "stalls": self.server.end.wait(2)
        if how == "slow":
            with contextlib.suppress(OSError): self.wfile.write(body[len(body)//2:len(body)*3//5])
            if self.server.end.wait(30): return  # whoever is to be killed meanwhile is still there
            with contextlib.suppress(OSError): self.wfile.write(body[len(body)*3//5:])

    def answer(self, code, body, headers):
        self.send_response(code)
        for k, v in headers.items(): self.send_header(k, str(v))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            self.wfile.flush()

    def log_message(self, *args): pass


@pytest.fixture
def server(monkeypatch):
    for k in ("no_proxy", "NO_PROXY"): monkeypatch.setenv(k, "127.0.0.1")
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.files, s.plan, s.asked, s.after, s.end = {"data": DATA}, [], [], "0", threading.Event()
    s.url = f"http://127.0.0.1:{s.server_port}"
    threading.Thread(target=s.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()
    yield s
    s.end.set()
    s.shutdown()
    s.server_close()


def get(server, part, plan=(), seen=None, size=len(DATA), **kw):
    "Fetch /data while the server behaves as planned; what was said."
    from cxr_nbdev.download import Archive, fetch
    server.plan[:], server.asked[:], lines = list(plan), [], []
    fetch(Archive("data", f"{server.url}/data", size), part, {} if seen is None else seen, lambda: None, lambda n, total: None, say=lines.append, **{**QUICK, **kw})
    return lines


FAULTS = ("breaks", "short body", "hangs up", "503", "429", "416", "202", "page", "ignores ranges", "wrong range", "no range", "other place", "changed", "no marks", "no length")


@pytest.mark.parametrize("fault", [*FAULTS, "stalls"])
@pytest.mark.parametrize("known", [True, False])
def test_one_fault(server, tmp_path, fault, known):
    "Broken in the middle, then a fault at the attempt to go on, and the bytes are still the right ones."
    lines = get(server, tmp_path/"p", ["breaks", fault], size=len(DATA) if known else 0)
    says = {"wrong range": "asked for the bytes from", "no range": "asked for the bytes from", "other place": "other bytes than", "202": "answers 202", "page": "sends a page",
            "416": "answers 416", "hangs up": "no connection", "changed": "has changed (etag)", "short body": "then the connection ended"}
    assert says.get(fault, "") in lines[-1]
    assert (tmp_path/"p").read_bytes() == DATA
    assert server.asked[0][1] == 0 < server.asked[1][1], "the second attempt did not go on where the first one ended"


@settings(deadline=None, max_examples=300 if "--slow" in sys.argv else 15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(FAULTS), max_size=7), st.booleans())
def test_any_faults(server, tmp_path, faults, known):
    part = tmp_path/"p"
    part.unlink(missing_ok=True)
    if not known: faults = [o for o in faults if o != "short body"]  # a server that calls the half a whole: gzip's own sum tells, see below
    get(server, part, faults, size=len(DATA) if known else 0)
    assert part.read_bytes() == DATA


def test_goes_on_by_range(server, tmp_path):
    "What is there is not sent again, but for the overlap."
    from cxr_nbdev.download import OVERLAP
    (tmp_path/"p").write_bytes(DATA[:60_000])
    get(server, tmp_path/"p")
    assert server.asked == [("/data", 60_000-OVERLAP)] and (tmp_path/"p").read_bytes() == DATA
    get(server, tmp_path/"p")
    assert not server.asked, "a whole file was asked for again"


def test_follows_redirections(server, tmp_path):
    "NIH's links lead to other addresses; the range has to come along."
    from cxr_nbdev.download import Archive, fetch
    server.plan.append("breaks")
    fetch(Archive("data", f"{server.url}/moved/data", len(DATA)), tmp_path/"p", {}, lambda: None, lambda n, total: None, say=lambda o: None, **QUICK)
    assert (tmp_path/"p").read_bytes() == DATA and server.asked[1][1] > 0


def test_part_of_another_file(server, tmp_path):
    "A part that is not the beginning of the file, and one that is longer than it."
    for part in (DATA[::-1][:60_000], DATA*2):
        (tmp_path/"p").write_bytes(part)
        get(server, tmp_path/"p")
        assert (tmp_path/"p").read_bytes() == DATA


def test_file_changes_between_attempts(server, tmp_path):
    seen, new = {}, DATA[:50_000]+b"new"+DATA[50_003:]
    with pytest.raises(ConnectionError): get(server, tmp_path/"p", ["breaks"]+["503"]*9, seen, retries=3)
    server.files["data"] = new
    lines = get(server, tmp_path/"p", ["changed", "changed"], seen)
    assert any("has changed (etag)" in o for o in lines) and (tmp_path/"p").read_bytes() == new


def test_stall_times_out(server, tmp_path):
    begin = time.monotonic()
    lines = get(server, tmp_path/"p", ["stalls"])
    assert "nothing arrived for 0.3 s" in lines[0] and time.monotonic()-begin < 1.9 and (tmp_path/"p").read_bytes() == DATA


def test_trickle_times_out():
    "A byte now and then keeps a socket alive for ever."
    from cxr_nbdev.download import Broken, blocks
    drip = mock.Mock(read1=lambda n: time.sleep(.02) or b"x")
    with pytest.raises(Broken, match="bytes arrived in"): list(islice(blocks(drip, timeout=.1), 500))


def test_gives_up(server, tmp_path):
    from cxr_nbdev.download import Archive, fetch
    with pytest.raises(ConnectionError, match="4 attempts in a row.*503.*are kept"): get(server, tmp_path/"p", ["503"]*9, retries=3)
    server.plan.clear()
    with pytest.raises(ValueError, match="404.*by hand"): get(server, tmp_path/"p", ["404"])
    with pytest.raises(ConnectionError, match="has 90,000 bytes, NIH's has 99"): get(server, tmp_path/"p", size=99, retries=1)
    server.shutdown()
    server.server_close()  # it disappears
    with pytest.raises(ConnectionError, match="no connection"):
        fetch(Archive("data", f"{server.url}/data"), tmp_path/"q", {}, lambda: None, lambda n, total: None, say=lambda o: None, retries=2, **QUICK)


def test_waits_longer_each_time_or_as_asked(server, tmp_path):
    server.after = "7"
    with mock.patch("cxr_nbdev.download.time.sleep") as sleep: get(server, tmp_path/"p", ["hangs up"]*7+["429"], pause=1)
    assert [o.args[0] for o in sleep.call_args_list] == [1, 2, 4, 8, 16, 32, 60, 60]
    (tmp_path/"p").unlink()
    with mock.patch("cxr_nbdev.download.time.sleep") as sleep: get(server, tmp_path/"p", ["429"])
    assert [o.args[0] for o in sleep.call_args_list] == [7]


def test_disk_full(server, tmp_path):
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)), pytest.raises(OSError, match="no room"): get(server, tmp_path/"p")
    get(server, tmp_path/"p")
    assert (tmp_path/"p").read_bytes() == DATA


def tarball(members):
    "A .tar.gz of {name: bytes}."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for name, data in members.items():
            m = tarfile.TarInfo(name)
            m.size = len(data)
            tar.addfile(m, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def nih(server, small_set, tmp_path):
    "A server with a small data set in twelve archives under NIH's names; `nih.folder` has its tables, `nih.images` its files."
    from cxr_nbdev.download import ARCHIVES, Archive
    images = {p.name: p.read_bytes() for p in sorted((small_set/"images").iterdir())}
    server.archives, server.images, server.folder = [], images, tmp_path/"nih"
    for a, names in zip(ARCHIVES, np.array_split(sorted(images), 12)):
        data = tarball({f"images/{n}": images[n] for n in names})
        server.files[a.name] = data
        server.archives.append(Archive(a.name, f"{server.url}/{a.name}", len(data), hashlib.md5(data).hexdigest(), str(names[0])))
    server.folder.mkdir()
    for t in ("BBox_List_2017.csv", "Data_Entry_2017_v2020.csv"): shutil.copy(small_set/t, server.folder)
    return server


def same(nih, names):
    "The images in the folder are these, byte by byte."
    there = {p.name: p.read_bytes() for p in (nih.folder/"images").iterdir()}
    return there == {n: nih.images[n] for n in names}


def download(nih, only="all", archives=None, lines=None, **kw):
    from cxr_nbdev.download import download_nih, wanted_images
    return download_nih(nih.folder, wanted_images(nih.folder, only), archives or nih.archives, say=[].append if lines is None else lines.append, **{**QUICK, **kw})


def command(nih, *args):
    "cxr_download in this process: (status, standard output, standard error)."
    from cxr_nbdev.download import download_main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = download_main(["nih", str(nih.folder), *args, "--mirror", nih.url, "--repacked", "--pause", ".001", "--timeout", "1"])
    return status, out.getvalue(), err.getvalue()


def test_only_boxes(nih):
    from cxr_nbdev.data import load_tables
    from cxr_nbdev.download import wanted_images
    from cxr_nbdev import download as d
    wanted, parts, check = wanted_images(nih.folder, "boxes"), [], d.check_archive
    with mock.patch.object(d, "check_archive", side_effect=lambda p, a: parts.append(len(list(nih.folder.glob("*.part")))) or check(p, a)):
        done = download(nih, "boxes")
    assert done == dict(there=len(wanted), taken=len(wanted), lacks=[]) and same(nih, wanted) and 0 < len(wanted) < len(nih.images)
    assert set(parts) == {1}, "more than one archive on disk at a time"
    assert sorted(o.name for o in nih.folder.iterdir()) == ["BBox_List_2017.csv", "Data_Entry_2017_v2020.csv", "TERMS.txt", "download.json", "images"]
    assert set(load_tables("nih", nih.folder).images.image_id) == wanted
    state = json.loads((nih.folder/"download.json").read_text())["archives"]
    assert {k: v["md5"] for k, v in state.items()}.items() <= {a.name: a.md5 for a in nih.archives}.items() and len(state) == len(parts)


def test_what_is_there_is_not_fetched(nih):
    first = download(nih, "boxes")["taken"]
    assert download(nih)["taken"] == len(nih.images)-first and same(nih, nih.images)
    nih.asked.clear()
    assert download(nih)["taken"] == 0 and not nih.asked
    half = nih.folder/"images"/min(nih.images)  # the half of an image counts as missing
    half.write_bytes(half.read_bytes()[:50])
    assert download(nih)["taken"] == 1 and same(nih, nih.images) and {p for p, _ in nih.asked} == {"/images_001.tar.gz"}


@pytest.mark.slow
def test_faults_in_every_archive(nih):
    nih.plan += ["stalls"] + ["breaks", "503", "other place", "short body"]*12
    assert download(nih)["lacks"] == [] and same(nih, nih.images)


def damage(data):
    "One byte is another one."
    bad = bytearray(data)
    bad[len(bad)//2] ^= 255
    return bytes(bad)


@pytest.mark.parametrize("known", [True, False])
def test_damaged_once(nih, known):
    from dataclasses import replace
    name, lines = nih.archives[2].name, []
    good = nih.files[name]
    nih.files[name] = damage(good)

    class Files(dict):
        def get(self, k):
            data = super().get(k)
            if k == name: self[name] = good
            return data
    nih.files = Files(nih.files)
    download(nih, archives=None if known else [replace(a, md5="", size=0) for a in nih.archives], lines=lines)
    assert any(f"{name} is damaged: {'its MD5 is' if known else 'gzip says'}" in o for o in lines) and same(nih, nih.images)


def test_damaged_twice(nih):
    name, before = nih.archives[2].name, sorted(nih.images)
    good = nih.files[name]
    for bad in (damage(good), b"<html>not here</html>".ljust(len(good))):
        nih.files[name] = bad
        with pytest.raises(ValueError, match=f"{name} came damaged twice.*MD5.*Next step"): download(nih)
        assert not list(nih.folder.glob("*.part"))
        assert not {p.name for p in (nih.folder/"images").iterdir()} & {n for n in before if nih.archives[2].first <= n < nih.archives[3].first}
    nih.files[name] = good
    assert download(nih)["lacks"] == [] and same(nih, nih.images)


def test_truncated_archive_of_unknown_size(nih):
    from dataclasses import replace
    a = replace(nih.archives[0], size=0, md5="")
    nih.files[a.name] = nih.files[a.name][:-40]
    with pytest.raises(ValueError, match="damaged twice: gzip says"): download(nih, archives=[a])


def test_archive_that_somebody_brought(nih):
    a = nih.archives[0]
    (nih.folder/"images_01.tar.gz").write_bytes(nih.files[a.name])  # as NIH's script names it
    download(nih)
    assert same(nih, nih.images) and (nih.folder/"images_01.tar.gz").exists() and not any(p.endswith(a.name) for p, _ in nih.asked)
    shutil.rmtree(nih.folder/"images")
    (nih.folder/"images_01.tar.gz").write_bytes(damage(nih.files[a.name]))
    with pytest.raises(ValueError, match="images_01.tar.gz.*is damaged.*Delete it"): download(nih)


def test_archive_that_lacks_an_image(nih):
    a, gone = nih.archives[5], nih.archives[5].first
    names = [n for n in nih.images if a.first < n < nih.archives[6].first]
    from dataclasses import replace
    data = tarball({f"images/{n}": nih.images[n] for n in names} | {f"images/{gone}": b"not a PNG"})
    nih.files[a.name], nih.archives[5] = data, replace(a, size=len(data), md5=hashlib.md5(data).hexdigest())
    assert download(nih)["lacks"] == [gone]
    nih.asked.clear()
    assert download(nih)["lacks"] == [gone] and not nih.asked, "an archive was fetched again for an image that it does not have"


def test_evil_archive(nih, tmp_path):
    "Nothing is written but wanted names, into images/."
    from cxr_nbdev.download import take_images
    png, out = next(iter(nih.images.values())), io.BytesIO()
    kinds = {tarfile.SYMTYPE: "../../x.png", tarfile.LNKTYPE: "/etc/passwd", tarfile.FIFOTYPE: "", tarfile.CHRTYPE: "", tarfile.BLKTYPE: ""}
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in ("../x.png", "/x.png", "images/../../x.png", "images\\x.png", "other.png", "images/x.sh", "images/x.png/", "images/good.png"):
            m = tarfile.TarInfo(name)
            m.size, m.mode = len(png), 0o4777
            tar.addfile(m, io.BytesIO(png))
        for kind, target in kinds.items():
            m = tarfile.TarInfo("images/x.png")
            m.type, m.linkname = kind, target
            tar.addfile(m)
        m = tarfile.TarInfo("images/huge.png")
        m.size = 100_001
        tar.addfile(m, io.BytesIO(bytes(m.size)))
    (tmp_path/"evil.tar.gz").write_bytes(out.getvalue())
    before = sorted(tmp_path.rglob("*"))
    with mock.patch("cxr_nbdev.download.LARGEST", 100_000):
        taken, left = take_images(tmp_path/"evil.tar.gz", tmp_path/"in"/"images", {"x.png", "good.png", "huge.png", "missing.png"})
    new = sorted(set(tmp_path.rglob("*"))-set(before))
    assert taken == {"x.png", "good.png"}  # a regular file named images/x.png/ is written as images/x.png
    assert {p.name for p in new if p.is_file()} == taken and not any(p.is_symlink() for p in new)
    assert left["no regular file"] >= 5 and left["its path leads out of the folder"] == 4 and left["too large"] == 1


@settings(deadline=None, max_examples=400 if "--slow" in sys.argv else 30)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_as_archive(tmp_path_factory, data, zipped):
    "Whatever the archive holds: images, or `Damaged`."
    from cxr_nbdev.download import Damaged, take_images
    at = tmp_path_factory.getbasetemp()/"any.tar.gz"
    at.write_bytes(gzip.compress(data, 1) if zipped else data)
    try: assert take_images(at, at.parent/"none", {"a.png"})[0] == set()
    except Damaged: pass


@settings(deadline=None, max_examples=200 if "--slow" in sys.argv else 20)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda o: st.lists(o, max_size=3) | st.dictionaries(st.sampled_from(["archives", "process", "x"]), o, max_size=3)))
def test_any_state(tmp_path_factory, value):
    "A state that somebody else wrote is read or refused."
    from cxr_nbdev.download import claim, read_state
    at = tmp_path_factory.getbasetemp()/"state"
    at.mkdir(exist_ok=True)
    (at/"download.json").write_text(json.dumps(value))
    try: claim(at, read_state(at))
    except ValueError as e: assert "delete it" in str(e)


def start(nih, *args):
    "cxr_download in a process of its own."
    code = "import sys; from cxr_nbdev.download import download_main; sys.exit(download_main())"
    return subprocess.Popen([sys.executable, "-c", code, "nih", str(nih.folder), *args, "--mirror", nih.url, "--repacked", "--pause", ".01"], text=True,
                            env={**os.environ, **ENV, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # what runs in the background of a shell is deaf to it


def until(ready, process, seconds=60):
    end = time.monotonic()+seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(.005)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle(nih, how):
    "Killed while the third archive comes in; the same command goes on, and every file is as it was on the server."
    nih.plan += ["well", "well", "slow"]
    p, part = start(nih, "--all"), nih.folder/"images_003.tar.gz.part"
    until(lambda: part.exists() and part.stat().st_size > len(nih.files["images_003.tar.gz"])*.55, p)
    status, _, err = command(nih, "--all")
    assert status == 1 and f"process {p.pid} is downloading" in err, "two may not write into the same part"
    p.send_signal(how)
    out, err = p.communicate()
    if how == signal.SIGINT: assert p.returncode == 130 and "Go on with: cxr_download nih" in err and "Traceback" not in err, err
    have = part.stat().st_size
    (nih.folder/"images"/".x.png.1.tmp").write_bytes(b"left by a kill while an image was written")
    nih.plan.clear()
    nih.asked.clear()
    status, out, err = command(nih, "--all")
    assert status == 0 and same(nih, nih.images), err
    assert nih.asked[0] == ("/images_003.tar.gz", have-4096), "it did not go on where it was killed"
    assert len(nih.asked) == 10 and not list((nih.folder/"images").glob(".*"))


def test_killed_while_images_are_taken(nih):
    "The archive is whole and some of its images are written: nothing is fetched again."
    a = nih.archives[0]
    (nih.folder/"images").mkdir()
    (nih.folder/"images"/a.first).write_bytes(nih.images[a.first])
    (nih.folder/f"{a.name}.part").write_bytes(nih.files[a.name])
    download(nih)
    assert same(nih, nih.images) and not any(p.endswith(a.name) for p, _ in nih.asked)


def test_disk_fills_up_while_images_are_written(nih):
    from cxr_nbdev import download as d
    real, calls = d.atomic_write, []

    def full(path, write, **kw):
        if str(path).endswith(".png"): calls.append(path)
        if len(calls) == 5: raise OSError(28, "No space left on device")
        return real(path, write, **kw)
    with mock.patch.object(d, "atomic_write", full): status, _, err = command(nih, "--all")
    assert status == 1 and "No space left" in err and "Go on with" in err and len(list((nih.folder/"images").iterdir())) == 4
    nih.asked.clear()
    assert command(nih, "--all")[0] == 0 and same(nih, nih.images) and nih.asked[0][0] == "/images_003.tar.gz"


def test_command(nih, tmp_path):
    status, out, err = command(nih, "--only", "boxes", "--dry-run")
    assert status == 0 and "images_012.tar.gz" in out and "size not known" in out and not nih.asked and len(list(nih.folder.iterdir())) == 2
    status, out, err = command(nih, "--only", "boxes")
    assert status == 0 and "acknowledge the NIH Clinical Center" in out and "no published MD5" in out, err
    assert "CVPR" in (nih.folder/"TERMS.txt").read_text()


def test_command_with_given_lists(nih, tmp_path):
    given = tmp_path/"elsewhere"
    nih.folder.rename(given)
    status, out, err = command(nih, "--only", "boxes")
    assert status == 1 and "BBox_List_2017.csv" in err and "https://nihcc.app.box.com/v/ChestXray-NIHCC" in err and "--boxes FILE" in err
    status, out, err = command(nih, "--only", "boxes", "--boxes", str(given/"BBox_List_2017.csv"))
    assert status == 0 and "Data_Entry_2017_v2020.csv is not there yet" in out
    from cxr_nbdev.data import load_tables
    assert len(load_tables("nih", nih.folder).images)
    other = tmp_path/"other.csv"
    other.write_text((given/"BBox_List_2017.csv").read_text().replace("Nodule", "Mass"))
    status, out, err = command(nih, "--only", "boxes", "--boxes", str(other))
    assert status == 1 and "has another BBox_List_2017.csv" in err


@pytest.mark.parametrize("args, says", [(["--only", "boxes", "--mirror", "ftp://x"], "not an address"), (["--only", "test", "--test-list", "/nowhere"], "no file"),
                                        (["--only", "test"], "test_list.txt"), (["--all", "--repacked"], "--mirror URL"), (["--all", "--timeout", "0"], "more than 0")])
def test_command_that_can_not_be(nih, capsys, args, says):
    from cxr_nbdev.download import download_main
    assert download_main(["nih", str(nih.folder), *args]) == 1
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err


def test_no_room_is_found_out_first(nih):
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)): status, out, err = command(nih, "--all")
    assert status == 1 and "no room" in err and "MB needed" in err and not nih.asked


def test_official_list(tmp_path):
    "Of NIH's own archives: the links are twelve, and no two facts are the same."
    from cxr_nbdev.download import ARCHIVES
    for what in ("name", "url", "size", "md5", "first"): assert len({getattr(a, what) for a in ARCHIVES}) == 12
    assert all(len(a.md5) == 32 and a.url.startswith("https://nihcc.box.com/shared/static/") for a in ARCHIVES)
    assert sorted(a.first for a in ARCHIVES) == [a.first for a in ARCHIVES]
