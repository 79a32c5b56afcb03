"""Fetch a published data set: its licence accepted, its checksum compared, unpacked completely or not at all.

pooch compares the checksum and gives the file its name. It cannot continue a download of gigabytes where it broke off,
so that is added here. The checksums come from public code (anomalib, torchvision); where none is known, only the counts
of images are checked.
"""

import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PureWindowsPath
from ssl import SSLError
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pooch
from tqdm import tqdm

import vitad
from vitad.data import DATASETS, TEXTURE_SETS
from vitad.data.dataset import Source
from vitad.data.verify import count
from vitad.errors import UserError, unknown
from vitad.network import answer_within

PATIENCE = 6  # seconds until a response begins
STALL = 30  # seconds without another byte
BLOCK = 2**20
UNPACKED_LIMIT = 20 * 2**30  # bytes; the largest of the sets has 5 GB
BROKEN = (  # what the standard library raises on archives that are damaged, locked or malformed
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error),
    *(EOFError, ValueError, RuntimeError),
)


def download(
    name: str,
    root: str | Path,
    url: str | None = None,
    accept_licence: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Fetch and unpack a data set to the folder `root`, which then serves as `--data-root`.

    The same call again continues a download that broke off, or returns at once where the data set is complete. A folder
    `.<name of root>.download` beside `root` keeps what is unfinished.

    Parameters
    ----------
    name : str
        A data set or a set of textures that has a `source`.
    root : path
        Where it goes; nothing else may be in that folder.
    url : str, optional
        Address of the archive instead of the published one; `file://` for one on this machine.
    accept_licence : bool
        Without it only the licence is shown.
    say : callable
        Called with lines of text.

    Raises
    ------
    UserError
        Without the licence accepted; for an address that does not answer, another checksum, an archive that would write
        elsewhere, and counts that differ from the published ones.
    """
    sources = {key: dataset.source for key, dataset in (DATASETS | TEXTURE_SETS).items() if dataset.source}
    if name not in sources:
        raise unknown("dataset to download", name, sources)
    source, root = sources[name], Path(root).expanduser().absolute()
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
            f"'{name}' has no archive. Run: git clone {source.page} {root} && git -C {root} checkout {source.commit}; "
            "or give the address of an archive with --url."
        )

    unfinished = root.with_name(f".{root.name}.download")
    archive, unpacked = unfinished / "archive", unfinished / "unpacked"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        fetch(url, archive, source)
        say("unpacking")
        try:
            unpack(archive, unpacked)
            complete = _data_folder(unpacked, name)
        except UserError:
            archive.unlink()  # it would be refused again
            raise
        if root.exists():
            root.rmdir()
        complete.rename(root)
        shutil.rmtree(unfinished)
    except OSError as e:
        raise UserError(f"cannot write {e.filename or unfinished}: {e.strerror or e}. Fix this and run again.") from e
    finally:
        with suppress(OSError):
            unfinished.rmdir()  # if nothing was fetched
    report = count(name, root)
    if report.differences:
        more = f" and {len(report.differences) - 1} more" if len(report.differences) > 1 else ""
        raise UserError(f"unpacked into {root}, but {report.differences[0]}{more}. See vitad data verify.")
    how = "counts as published" if source.checksum else "counts as published; no checksum is known"
    say(f"{root}: {sum(row[-1] for row in report.counts)} images, {how}")


def fetch(url: str, path: Path, source: Source) -> None:
    """Download to `path`, unless a file with the right checksum is there; continues `<path>.part`."""
    part = path.with_name(f"{path.name}.part")

    def continue_download(url: str, target: str, _: object) -> None:
        response = _request(url, part.stat().st_size if part.exists() else 0, source)
        if response and not _receive(response, part):
            size = part.stat().st_size / 1e6
            raise UserError(f"the download broke off after {size:.1f} MB. The same command goes on from there.")
        part.replace(target)

    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(url, source.checksum, path.name, path.parent, downloader=continue_download)
    except UserError:
        raise
    except ValueError as e:  # pooch's error for another checksum, which names both
        algorithm, expected = str(source.checksum).split(":")
        actual = str(e).partition("but got ")[2].partition(".")[0]
        raise UserError(
            f"{url} has the {algorithm} {actual} instead of {expected}, so it is another file and was deleted. "
            f"See {source.page} for the present address and give it with --url."
        ) from e


def _receive(response: HTTPResponse, part: Path) -> bool:
    """Write the response to `part`, after its present end if the server continues it; False if bytes are missing."""
    continued = response.status == 206
    have, length = part.stat().st_size if continued else 0, response.headers["Content-Length"]
    total = have + int(length) if length else None
    bar = tqdm(total=total, initial=have, desc="fetch", unit="B", unit_scale=True, leave=False)
    try:
        with response, open(part, "ab" if continued else "wb") as file, bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    except (HTTPException, ConnectionError, TimeoutError, SSLError):
        return False
    return total in (None, part.stat().st_size)


def _request(url: str, have: int, source: Source) -> HTTPResponse | None:
    """The server's response from byte `have` on; None where the file has no more bytes."""
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


def unpack(archive: Path, target: Path, limit: int = UNPACKED_LIMIT) -> None:
    """Unpack a tar or zip file into the folder `target`, whose old contents are deleted.

    Raises
    ------
    UserError
        For a member that is absolute, climbs out, is a link or a device, or exceeds `limit` bytes together with those
        before it; and for a file that is no archive or a broken one. Then no `target` is left.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    try:
        if tarfile.is_tarfile(archive):  # checked first, since a tar file that ends in a zip file passes for one
            _unpack_tar(archive, target, limit)
        else:
            _unpack_zip(archive, target, limit)
    except BaseException as e:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(e, BROKEN) and not isinstance(e, UserError):
            raise UserError(f"the archive cannot be read: {e or type(e).__name__}. Nothing was unpacked.") from e
        raise


def _unpack_tar(archive: Path, target: Path, limit: int) -> None:
    with tarfile.open(archive) as file:
        for member in tqdm(file, "unpack", unit="file", leave=False):
            limit -= member.size
            _check_member(member.name, member.isreg() or member.isdir(), limit)
            # The filter would refuse devices, but allows links, and drops the slash of an absolute name.
            file.extract(member, target, filter="data")


def _unpack_zip(archive: Path, target: Path, limit: int) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in tqdm(file.infolist(), "unpack", unit="file", leave=False):
            limit -= member.file_size
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was not made on Unix
            _check_member(member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR), limit)
            member.filename = member.filename.replace("\\", "/")  # some Windows programs write backslashes
            file.extract(member, target)


def _check_member(name: str, plain: bool, left: int) -> None:
    """Refuse a member that leaves the folder, is not a `plain` file or folder, or for which no bytes are `left`."""
    path = PureWindowsPath(name)  # knows drives and both kinds of slashes
    if path.anchor or ".." in path.parts:
        raise UserError(f"the archive's member '{name}' would be written elsewhere. Nothing was unpacked.")
    if not plain:
        raise UserError(f"the archive's member '{name}' is a link or a device. Nothing was unpacked.")
    if left < 0:
        raise UserError(f"the archive's member '{name}' makes it larger than allowed. Nothing was unpacked.")


def _data_folder(unpacked: Path, name: str) -> Path:
    """The folder with most of the data set's images: the archive's top, or one below it."""

    def images(folder: Path) -> int:
        try:
            return sum(row[-1] for row in count(name, folder).counts)
        except UserError:
            return 0

    best = max([unpacked, *(d for d in unpacked.iterdir() if d.is_dir())], key=images)
    if not images(best):
        raise UserError(f"the archive holds no images in the layout of '{name}'.")
    return best
