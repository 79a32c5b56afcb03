"""Fetch a published data set: its licence accepted, its checksum compared, unpacked whole or not at all.

pooch compares the checksum and gives the file its name. What it cannot do is added here: a download of gigabytes has
to go on where it broke off. Checksums come from public code (anomalib, torchvision); where none is known, the counts of
images decide alone.
"""

import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path, PureWindowsPath
from ssl import SSLError
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pooch
from tqdm import tqdm

import vitad
from vitad.data.verify import count
from vitad.errors import UserError, unknown
from vitad.network import answer_within

PATIENCE = 6  # seconds until an answer begins
STALL = 30  # seconds in which nothing more comes
BLOCK = 2**20
UNPACKED_LIMIT = 20 * 2**30  # bytes; the largest of the sets has 5 GB
BROKEN = (  # what the standard library raises on archives that are damaged, locked or malformed
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error),
    *(EOFError, ValueError, RuntimeError),
)


@dataclass(frozen=True)
class Source:
    page: str
    licence: str
    url: str | None  # of the archive
    checksum: str | None  # algorithm:hex


SOURCES = {
    "mvtec": Source(
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
        "CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): not for commercial use",
        "https://www.mydrive.ch/shares/38536/3830184030e49fe74747669442f0f282/download/420938113-1629952094/"
        "mvtec_anomaly_detection.tar.xz",
        "sha256:cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
    ),
    "btad": Source(
        "https://github.com/pankajmishra000/VT-ADL",
        "CC BY-SA 4.0 by its authors' read-me, CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/) by "
        "anomalib: take the stricter one, not for commercial use",
        "https://avires.dimi.uniud.it/papers/btad/btad.zip",
        "sha256:461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
    ),
    "visa": Source(
        "https://github.com/amazon-science/spot-diff",
        "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)",
        "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
        "sha256:2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
    ),
    "ksdd2": Source(
        "https://www.vicos.si/resources/kolektorsdd2/",
        "CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): not for commercial use",
        "https://data.vicos.si/datasets/KSDD/KolektorSDD2.zip",
        "md5:1ed0f628122776ace4965afa30dfe316",  # no sha256 is published
    ),
    "mt": Source(
        "https://github.com/abin24/Magnetic-tile-defect-datasets.",
        "none is stated; the read-me asks to cite Huang, Qiu and Yuan, Surface defect saliency of magnetic tile",
        None,  # a repository, to be cloned
        None,
    ),
    "dtd": Source(
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        "none of the usual ones; the page releases it for research purposes",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        "sha256:e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205",
    ),
}


def download(name, root, url=None, accept_licence=False, say=print):
    """Fetch and unpack a data set to the folder `root`, which then serves as `--data-root`.

    The same call again goes on where a download broke off, or returns at once where the data set is whole. Beside
    `root`, a folder `.<name of root>.download` keeps what is unfinished.

    Args:
        name: one of `SOURCES`.
        url: address of the archive instead of the published one; `file://` for one that is here.
        accept_licence: without it only the licence is told.
        say: called with lines of text.

    Raises:
        UserError: without the licence accepted; for an address that does not answer, another checksum, an archive that
            would write elsewhere, and counts that differ from the published ones.
    """
    if name not in SOURCES:
        raise unknown("dataset to download", name, SOURCES)
    source, root = SOURCES[name], Path(root).expanduser().absolute()
    url = url or source.url
    say(f"{name}: {source.page}\nlicence: {source.licence}")
    if not accept_licence:
        raise UserError("nothing was fetched. Read the licence and its page, then add --accept-licence to the command.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if root.is_dir() and not count(name, root).differences:
            say(f"already whole: {root}")
            return
        raise UserError(f"{root} holds other files than the data set '{name}', or not all of it. Give another --root.")
    if url is None:
        raise UserError(
            f"'{name}' has no archive. Run: git clone {source.page} {root} && git -C {root} checkout cc4eb53; "
            "or give the address of an archive with --url."
        )

    aside = root.with_name(f".{root.name}.download")
    archive, unpacked = aside / "archive", aside / "unpacked"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        fetch(url, archive, source)
        say("unpacking")
        try:
            unpack(archive, unpacked)
            whole = _data_folder(unpacked, name)
        except UserError:
            archive.unlink()  # it would be refused again
            raise
        if root.exists():
            root.rmdir()
        whole.rename(root)
        shutil.rmtree(aside)
    except OSError as e:
        raise UserError(f"cannot write {e.filename or aside}: {e.strerror or e}. Mend this and run again.") from e
    finally:
        with suppress(OSError):
            aside.rmdir()  # nothing came
    report = count(name, root)
    if report.differences:
        more = f" and {len(report.differences) - 1} more" if len(report.differences) > 1 else ""
        raise UserError(f"unpacked into {root}, but {report.differences[0]}{more}. See vitad data verify.")
    how = "counts as published" if source.checksum else "counts as published; no checksum is known"
    say(f"{root}: {sum(row[-1] for row in report.counts)} images, {how}")


def fetch(url, path, source):
    """Download to `path`, going on where `<path>.part` ends, unless a file with the right checksum is there."""
    part = path.with_name(f"{path.name}.part")

    def go_on(url, whole, _):
        answer = _ask(url, part.stat().st_size if part.exists() else 0, source)
        if answer and not _receive(answer, part):
            size = part.stat().st_size / 1e6
            raise UserError(f"the download broke off after {size:.1f} MB. The same command goes on from there.")
        part.replace(whole)

    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(url, source.checksum, path.name, path.parent, downloader=go_on)
    except UserError:
        raise
    except ValueError as e:  # which pooch raises for another checksum, and says both
        algorithm, expected = source.checksum.split(":")
        found = str(e).partition("but got ")[2].partition(".")[0]
        raise UserError(
            f"{url} has the {algorithm} {found} instead of {expected}, so it is another file and was deleted. "
            f"See {source.page} for the present address and give it with --url."
        ) from e


def _receive(answer, part):
    """Write what comes to `part`, behind what is there if the server goes on from it; False if the end is missing."""
    resumed = answer.status == 206
    have, length = part.stat().st_size if resumed else 0, answer.headers["Content-Length"]
    total = have + int(length) if length else None
    bar = tqdm(total=total, initial=have, desc="fetch", unit="B", unit_scale=True, leave=False)
    try:
        with answer, open(part, "ab" if resumed else "wb") as file, bar:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    except (HTTPException, ConnectionError, TimeoutError, SSLError):
        return False
    return total in (None, part.stat().st_size)


def _ask(url, have, source):
    """The server's answer from byte `have` on; None where the file has no more bytes."""
    if urlsplit(url).scheme not in ("http", "https", "file"):
        raise UserError(f"address '{url}' is not usable. Give one that begins with https://, http:// or file://.")
    headers = {"User-Agent": f"vitad/{vitad.__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return answer_within(PATIENCE, lambda: urlopen(Request(url, headers=headers), timeout=STALL))
    except HTTPError as e:
        if e.code == 416 and have:
            return None
        raise UserError(
            f"{url} answers {e.code} {e.reason}. See {source.page} for the present address and give it with --url."
        ) from e
    except (OSError, HTTPException, ValueError) as e:  # the last for an address that cannot be read
        raise UserError(
            f"cannot reach {url} ({getattr(e, 'reason', e)}). Check the network, or fetch the file elsewhere and "
            "name it with --url file:///..."
        ) from e


def unpack(archive, target, limit=UNPACKED_LIMIT):
    """Unpack a tar or zip file into the folder `target`, which is made anew.

    Raises `UserError`, and leaves no `target`, for a member that is absolute, climbs out, is a link or a device, or
    exceeds `limit` bytes together with those before it; and for a file that is no archive or a broken one.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    try:
        for name, kind, size, content in tqdm(_members(archive), "unpack", unit="file", leave=False):
            limit -= size
            way = PureWindowsPath(name)  # knows drives and both kinds of slashes
            if way.anchor or ".." in way.parts:
                raise UserError(f"the archive's member '{name}' would be written elsewhere. Nothing was unpacked.")
            if kind == "other":
                raise UserError(f"the archive's member '{name}' is a link or a device. Nothing was unpacked.")
            if limit < 0:
                raise UserError(f"the archive's member '{name}' makes it larger than allowed. Nothing was unpacked.")
            path = target.joinpath(*way.parts)
            (path if kind == "folder" else path.parent).mkdir(parents=True, exist_ok=True)
            if kind == "file":
                with content() as source, open(path, "wb") as file:
                    shutil.copyfileobj(source, file, BLOCK)
    except BaseException as e:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(e, BROKEN) and not isinstance(e, UserError):
            raise UserError(f"the archive cannot be read: {e or type(e).__name__}. Nothing was unpacked.") from e
        raise


def _members(archive):
    """(name, "file" | "folder" | "other", size, function that opens it) of a tar or zip file."""
    if tarfile.is_tarfile(archive):  # asked first, since a tar file that ends in a zip file passes for one
        with tarfile.open(archive) as file:
            for m in file:
                kind = "file" if m.isreg() else "folder" if m.isdir() else "other"
                yield m.name, kind, m.size, partial(file.extractfile, m)
    else:
        with zipfile.ZipFile(archive) as file:
            for m in file.infolist():
                plain = stat.S_IFMT(m.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                kind = "other" if not plain else "folder" if m.is_dir() else "file"
                yield m.filename, kind, m.file_size, partial(file.open, m)


def _data_folder(unpacked, name):
    """The folder with most of the data set's images: the archive's top, or one below it."""

    def images(folder):
        try:
            return sum(row[-1] for row in count(name, folder).counts)
        except UserError:
            return 0

    best = max([unpacked, *(d for d in unpacked.iterdir() if d.is_dir())], key=images)
    if not images(best):
        raise UserError(f"the archive holds no images in the layout of '{name}'.")
    return best
