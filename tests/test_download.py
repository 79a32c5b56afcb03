"""Fetching data sets from a server on this machine: licence, checksum, broken downloads, hostile archives."""

import hashlib
import io
import os
import stat
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import pytest
import trees

from vitad.cli import main
from vitad.data import DATASETS, TEXTURE_SETS, download
from vitad.data.download import unpack
from vitad.errors import UserError

EVERY = DATASETS | TEXTURE_SETS


class Server:
    """Serves `content` at any path. `requested` lists the ranges of all requests; `stop_after` cuts an answer off."""

    def __init__(self):
        self.content, self.requested, self.stop_after, self.ranges, self.status, self.delay = (
            b"",
            [],
            None,
            True,
            None,
            0,
        )
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/archive"

    def answer(self, handler):
        requested = handler.headers["Range"]
        self.requested.append(requested)
        time.sleep(self.delay)
        if self.status:
            return handler.send_error(self.status)
        start = int(requested.removeprefix("bytes=").rstrip("-")) if requested and self.ranges else 0
        if start and start >= len(self.content):
            return handler.send_error(416)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(self.content) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.end_headers()
        handler.wfile.write(self.content[start : self.stop_after])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small trees are taken for the whole data sets."""
    for name, counts in trees.COUNTS.items():
        monkeypatch.setattr(EVERY[name], "published", counts)


def packed(tree, suffix, top=""):
    """The bytes of an archive of a folder, its members below `top`."""
    buffer = io.BytesIO()
    files = [(p, f"{top}{p.relative_to(tree).as_posix()}") for p in sorted(tree.rglob("*"))]
    if suffix == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for path, name in files:
                archive.write(path, name)
    else:
        with tarfile.open(fileobj=buffer, mode=f"w:{suffix}") as archive:
            for path, name in files:
                archive.add(path, name, recursive=False)
    return buffer.getvalue()


@pytest.fixture
def offered(server, tmp_path, monkeypatch):
    """Put an archive on the server as the published one of a data set."""

    def offer(name="btad", suffix="zip", top="", content=None, algorithm="sha256"):
        if content is None:
            trees.WRITE[name](tmp_path / "tree")
            content = packed(tmp_path / "tree", suffix, top)
        server.content = content
        checksum = f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"
        source = replace(EVERY[name].source, url=server.url, checksum=checksum)
        monkeypatch.setattr(EVERY[name], "source", source)
        return content

    return offer


@pytest.fixture
def place(tmp_path):
    """A folder for data sets, in which nothing else is."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def fetch(root, *words, name="btad"):
    return main(["data", "download", name, "--root", str(root), "--accept-licence", *words])


def line(capsys):
    """What the command that failed says, which is one line."""
    errors = capsys.readouterr().err
    assert errors.count("vitad: error:") == 1 and "Traceback" not in errors
    return errors.strip().replace("\r", "\n").splitlines()[-1]


def contents(root):
    return {p.relative_to(root).as_posix(): p.is_file() and p.read_bytes() for p in root.rglob("*")}


# --- fetching ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, suffix, top",
    [
        ("mvtec", "xz", ""),
        ("btad", "zip", "BTech_Dataset_transformed/"),
        ("visa", "", ""),
        ("ksdd2", "zip", ""),
        ("dtd", "gz", "dtd/"),
    ],
)
def test_a_data_set_is_fetched_unpacked_and_counted(name, suffix, top, offered, place, tmp_path, capsys):
    offered(name, suffix, top)
    assert fetch(place / "set", name=name) == 0
    assert contents(place / "set") == contents(tmp_path / "tree")
    assert [p.name for p in place.iterdir()] == ["set"]
    number = sum(sum(counts.values()) for counts in trees.COUNTS[name].values())
    assert f"{place / 'set'}: {number} images, counts as published" in capsys.readouterr().out
    assert main(["data", "verify", name, "--root", str(place / "set")]) == 0


def test_the_licence_comes_first_and_has_to_be_accepted(offered, place, server, capsys):
    offered()
    assert main(["data", "download", "btad", "--root", str(place / "btad")]) == 2
    printed = capsys.readouterr()
    assert "licence: CC BY-SA 4.0 by its authors' read-me, CC BY-NC-SA 4.0" in printed.out
    assert printed.err.count("\n") == 1 and "nothing was fetched" in printed.err and "--accept-licence" in printed.err
    assert not server.requested and not list(place.iterdir())


def test_every_source_states_a_licence_and_a_page_and_a_checksum_of_the_right_form():
    sources = {name: dataset.source for name, dataset in EVERY.items() if dataset.source}
    assert sources.keys() == EVERY.keys() - {"toy", "folder"}
    for name, source in sources.items():
        assert source.licence and source.page.startswith("https://")
        if name != "mt":
            algorithm, digest = source.checksum.split(":")
            assert len(digest) == 2 * hashlib.new(algorithm).digest_size and int(digest, 16)


def test_a_second_call_fetches_nothing(offered, place, server, capsys):
    offered()
    assert fetch(place / "btad") == fetch(place / "btad") == 0
    assert len(server.requested) == 1 and "already whole" in capsys.readouterr().out


def test_an_empty_folder_is_used_and_one_with_other_files_left_alone(offered, place, server, capsys):
    offered()
    (place / "btad").mkdir()
    assert fetch(place / "btad") == 0
    (place / "mine").mkdir()
    (place / "mine" / "image.png").write_bytes(b"keep me")
    assert fetch(place / "mine") == 2
    assert "mine holds other files than the data set 'btad', or not all of it" in line(capsys)
    assert contents(place / "mine") == {"image.png": b"keep me"} and len(server.requested) == 1


def test_another_address_serves_the_same_archive(offered, place, server, tmp_path):
    content = offered()
    (tmp_path / "by hand.zip").write_bytes(content)
    assert fetch(place / "one", "--url", f"{server.url}/mirror?id=7") == 0
    assert fetch(place / "two", "--url", (tmp_path / "by hand.zip").as_uri()) == 0
    assert len(server.requested) == 1 and contents(place / "one") == contents(place / "two")


def test_the_tiles_are_cloned(place, capsys):
    """There is no archive of them, and no checksum of one."""
    assert fetch(place / "mt", name="mt") == 2
    assert f"git clone {EVERY['mt'].source.page} {place / 'mt'} && git -C {place / 'mt'} checkout" in line(capsys)


# --- broken downloads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_broke_off(ranges, offered, place, server, capsys):
    """From the start, if the server does not know how to go on."""
    content = offered()
    server.stop_after, server.ranges = 5000, ranges
    assert fetch(place / "btad") == 2
    assert "broke off after 0.0 MB. The same command goes on from there" in line(capsys)
    assert not (place / "btad").exists()
    server.stop_after = 8000
    assert fetch(place / "btad") == 2
    server.stop_after = None
    assert fetch(place / "btad") == 0
    assert server.requested == [None, "bytes=5000-", "bytes=8000-"] and len(content) > 8000
    assert [p.name for p in place.iterdir()] == ["btad"]


def test_a_download_that_lacked_nothing_but_its_name(offered, place, server):
    content = offered()
    (place / ".btad.download").mkdir()
    (place / ".btad.download" / "archive.part").write_bytes(content)
    assert fetch(place / "btad") == 0
    assert server.requested == [f"bytes={len(content)}-"]


def test_the_connection_dies_without_a_length(offered, place, server, monkeypatch, capsys):
    """A chunked answer whose last chunk is missing."""
    offered()

    def answer(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"5\r\nhello\r\n40\r\nand")
        handler.close_connection = True

    monkeypatch.setattr(server, "answer", answer)
    assert fetch(place / "btad") == 2
    assert "broke off" in line(capsys) and not (place / "btad").exists()


def test_an_archive_that_was_kept_and_is_damaged_is_fetched_again(offered, place, server):
    offered()
    (place / ".btad.download").mkdir()
    (place / ".btad.download" / "archive").write_bytes(b"damaged")
    assert fetch(place / "btad") == 0 and server.requested == [None]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_another_file_is_recognised_and_deleted(algorithm, offered, place, server, capsys):
    content = offered(algorithm=algorithm)
    server.content = content[:-1] + b"?"
    assert fetch(place / "btad") == 2
    message = line(capsys)
    expected, found = (hashlib.new(algorithm, c).hexdigest() for c in (content, server.content))
    assert f"has the {algorithm} {found} instead of {expected}" in message
    assert "--url" in message and EVERY["btad"].source.page in message
    assert not list(place.iterdir())
    server.content = content
    assert fetch(place / "btad") == 0


def test_what_a_dead_link_answers_is_said(offered, place, server, capsys):
    offered()
    server.status = 404
    assert fetch(place / "btad") == 2
    assert "answers 404 Not Found" in line(capsys)
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://nowhere.invalid/btad.zip", "cannot reach http://nowhere.invalid/btad.zip"),
        ("http://127.0.0.1:1/btad.zip", "Connection refused"),
        ("file:///nowhere/btad.zip", "cannot reach file:///nowhere/btad.zip"),
        ("ftp://127.0.0.1/btad.zip", "address 'ftp://127.0.0.1/btad.zip' is not usable"),
        ("btad.zip", "address 'btad.zip' is not usable"),
    ],
)
def test_without_a_network_there_is_one_line_soon(url, message, place, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "*")
    begun = time.monotonic()
    assert fetch(place / "btad", "--url", url) == 2
    assert message in line(capsys) and time.monotonic() - begun < 10
    assert not list(place.iterdir())


def test_a_server_that_says_nothing_is_not_waited_for(offered, place, server, monkeypatch, capsys):
    offered()
    assert download.PATIENCE < 8  # leaves time to start Python
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    server.delay = 2
    begun = time.monotonic()
    assert fetch(place / "btad") == 2
    assert "(no answer)" in line(capsys) and time.monotonic() - begun < 2
    assert not list(place.iterdir())


# --- unpacking --------------------------------------------------------------------------------------------


def test_a_half_unpacked_folder_is_never_the_data_set(offered, place, server, monkeypatch, capsys):
    """Interrupted or killed in the middle: nothing has the name yet, and the same command need not fetch again."""
    offered()
    copy, calls = download.shutil.copyfileobj, []

    def interrupted(*words):
        calls.append(words)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return copy(*words)

    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "copyfileobj", interrupted)
        assert fetch(place / "btad") == 130
    assert not (place / "btad").exists()
    half = place / ".btad.download" / "unpacked" / "01"  # what a process leaves that was killed
    half.mkdir(parents=True)
    (half / "stale.png").touch()
    assert fetch(place / "btad") == 0
    assert len(server.requested) == 1 and not list(place.rglob("stale.png"))
    assert [p.name for p in place.iterdir()] == ["btad"]


def test_a_full_disk_keeps_what_was_fetched(offered, place, server, monkeypatch, capsys):
    offered()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "copyfileobj", full)
        assert fetch(place / "btad") == 2
    assert "No space left on device" in line(capsys) and not (place / "btad").exists()
    assert fetch(place / "btad") == 0 and len(server.requested) == 1


def test_other_counts_than_the_published_ones_are_said(offered, place, server, tmp_path, capsys):
    offered()
    (tmp_path / "tree" / "01" / "train" / "ok" / "0001.bmp").unlink()
    offered(content=packed(tmp_path / "tree", "zip"))
    assert fetch(place / "btad") == 2
    assert f"unpacked into {place / 'btad'}, but 01 train good: 3 images, 4 published" in line(capsys)


def test_an_archive_of_something_else_is_refused(offered, place, tmp_path, capsys):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "index.html").write_text("hello")
    offered(content=packed(tmp_path / "tree", "gz"))
    assert fetch(place / "btad") == 2
    assert "holds no images in the layout of 'btad'" in line(capsys)
    assert not (place / "btad").exists()


def tar_with(name, kind=tarfile.REGTYPE, content=b"x", link=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        first = tarfile.TarInfo("01/fine.png")
        archive.addfile(first)
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_with(name, mode=stat.S_IFREG, content=b"x"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("01/fine.png", b"")
        member = zipfile.ZipInfo(name)
        member.filename = name  # ZipInfo tidies it
        member.external_attr = (mode | 0o644) << 16
        archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


ELSEWHERE = [
    "/evil",
    "../evil",
    "01/../../evil",
    "..\\evil",
    "01\\..\\..\\evil",
    "C:\\evil",
    "C:evil",
    "\\evil",
]
HOSTILE = [
    *[(make(name), "would be written elsewhere") for make in (tar_with, zip_with) for name in ELSEWHERE],
    (tar_with("01/link", tarfile.SYMTYPE, b"", "/etc/passwd"), "is a link or a device"),
    (tar_with("01/link", tarfile.SYMTYPE, b"", "fine.png"), "is a link or a device"),
    (tar_with("01/link", tarfile.LNKTYPE, b"", "01/fine.png"), "is a link or a device"),
    (tar_with("01/device", tarfile.CHRTYPE, b""), "is a link or a device"),
    (tar_with("01/device", tarfile.BLKTYPE, b""), "is a link or a device"),
    (tar_with("01/pipe", tarfile.FIFOTYPE, b""), "is a link or a device"),
    (zip_with("01/link", stat.S_IFLNK, b"/etc/passwd"), "is a link or a device"),
    (zip_with("01/pipe", stat.S_IFIFO), "is a link or a device"),
    (zip_with("01/device", stat.S_IFCHR), "is a link or a device"),
    (tar_with("01/large", content=bytes(3000)), "makes it larger than allowed"),
    (zip_with("01/large", content=bytes(3000)), "makes it larger than allowed"),
]


@pytest.mark.parametrize("content, message", HOSTILE)
def test_hostile_members_are_refused_and_nothing_is_kept(content, message, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(UserError, match=message):
        unpack(tmp_path / "archive", tmp_path / "work" / "unpacked", limit=2000)
    assert contents(tmp_path) == {"archive": content, "work": False}
    assert not os.path.exists("/evil")


@pytest.mark.parametrize("make", [tar_with, zip_with])
def test_many_small_members_exceed_the_limit_together(make, tmp_path):
    (tmp_path / "archive").write_bytes(make("01/second", content=bytes(1500)))
    unpack(tmp_path / "archive", tmp_path / "unpacked", limit=1500)
    assert (tmp_path / "unpacked" / "01" / "second").stat().st_size == 1500
    with pytest.raises(UserError, match="'01/second' makes it larger than allowed"):
        unpack(tmp_path / "archive", tmp_path / "unpacked", limit=1499)
    assert not (tmp_path / "unpacked").exists()


def test_backslashes_of_a_zip_file_separate_folders(tmp_path):
    (tmp_path / "archive").write_bytes(zip_with("01\\train\\ok.png"))
    unpack(tmp_path / "archive", tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "01" / "train" / "ok.png").read_bytes() == b"x"


def test_files_can_be_read_whatever_the_modes_in_the_archive(tmp_path):
    with tarfile.open(tmp_path / "archive", "w") as archive:
        for name, kind in (("01", tarfile.DIRTYPE), ("01/a.png", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, 0
            archive.addfile(member)
    unpack(tmp_path / "archive", tmp_path / "unpacked")
    for name in ("01", "01/a.png"):
        assert (tmp_path / "unpacked" / name).stat().st_mode & stat.S_IRUSR


def broken():
    yield b"not an archive"
    yield b""
    for mode in ("w", "w:gz", "w:xz"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as archive:
            member = tarfile.TarInfo("01/noise.png")
            member.size = 20_000
            archive.addfile(member, io.BytesIO(Random(0).randbytes(20_000)))
        yield buffer.getvalue()[:10_000]
    content = bytearray(zip_with("01/text", content=b"abcdefgh" * 100))
    yield bytes(content[:-30])
    content[content.index(b"01/text") + 12] ^= 0xFF
    yield bytes(content)


@pytest.mark.parametrize("content", list(broken()))
def test_broken_archives_are_refused_and_nothing_is_kept(content, tmp_path):
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(UserError, match="the archive cannot be read: .+ Nothing was unpacked"):
        unpack(tmp_path / "archive", tmp_path / "unpacked")
    assert contents(tmp_path) == {"archive": content}


def test_a_hostile_archive_is_not_kept_by_the_command(offered, place, server, capsys):
    offered(content=tar_with("../evil"))
    assert fetch(place / "btad") == 2
    assert "'../evil' would be written elsewhere" in line(capsys)
    assert not list(place.iterdir())
