"""Hashes of a data set's files, kept so that the files are read only once.

The hashes of a data folder are in one JSON file of the cache: `{relative name: [size, mtime_ns, sha256]}`. A file is
read again when its size or its time of change differs.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from vitad.errors import UserError
from vitad.files import atomic_write, cache_dir, sha256

Stamp = tuple[int, int]  # size, mtime_ns
MISSING = (-1, -1)
UNREADABLE = "unreadable"  # in place of a hash; whoever decodes the file says what is wrong with it
BAR_FROM = 200  # files to read, above which a progress bar is shown


def hash_files(paths: list[Path], root: Path) -> list[str]:
    """The sha256 of each file's contents; all are below `root`."""
    names = [path.relative_to(root).as_posix() for path in paths]
    stamps = dict(zip(names, map(_stamp, paths), strict=True))  # taken first: a file that changes later is read again
    cache_file = _cache_file(root)
    cached = _read(cache_file)
    hashes = {name: cached[name][1] for name, stamp in stamps.items() if name in cached and cached[name][0] == stamp}

    missing = [name for name in stamps if name not in hashes]
    with ThreadPoolExecutor() as pool:
        results = pool.map(_hash, [root / name for name in missing])
        bar = tqdm(results, "hash", len(missing), unit="file", leave=False, disable=len(missing) <= BAR_FROM)
        hashes |= dict(zip(missing, bar, strict=True))

    new = {name: (stamps[name], hashes[name]) for name in missing if hashes[name] != UNREADABLE}
    if new:
        entries = {name: [*stamp, digest] for name, (stamp, digest) in (cached | new).items()}
        # A cache that cannot be written costs time, not the run.
        with suppress(UserError), atomic_write(cache_file) as temporary:
            temporary.write_text(json.dumps(entries))
    return [hashes[name] for name in names]


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return MISSING
    return status.st_size, status.st_mtime_ns


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError:
        return UNREADABLE


def _cache_file(root: Path) -> Path:
    name = hashlib.sha256(str(root).encode()).hexdigest()[:24]
    return cache_dir() / "hashes" / f"{name}.json"


def _read(path: Path) -> dict[str, tuple[Stamp, str]]:
    """`{name: (stamp, sha256)}` of a cache file; {} where it is missing or damaged."""
    try:
        entries = json.loads(path.read_text())
        return {name: ((size, modified), digest) for name, (size, modified, digest) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
