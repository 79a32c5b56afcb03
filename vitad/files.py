"""Files are written completely or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from vitad.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def cache_dir() -> Path:
    """Folder for generated data, converted weights and decoded images; the variable `VITAD_CACHE` names another one."""
    return Path(os.environ.get("VITAD_CACHE") or Path.home() / ".cache" / "vitad")


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a temporary name to write to, which becomes `path` when the block ends without an error.

    Otherwise the temporary file is removed, and a file that was at `path` before stays as it was.

    Raises
    ------
    UserError
        The file cannot be written: the disk is full, the folder is read-only, and the like.

    Examples
    --------
    >>> with atomic_write("record.json") as temporary:  # doctest: +SKIP
    ...     temporary.write_text("{}")
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"cannot write {path}: {reason}. Nothing was changed there; mend this and run again.") from e
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_safetensors(tensors: Mapping[str, Tensor], path: Path | str, metadata: dict[str, str] | None = None) -> None:
    """Write tensors from any device, and a dict of strings."""
    from safetensors.torch import save_file  # imports torch

    with atomic_write(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a file.

    Raises
    ------
    UserError
        The file does not exist or has another format.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except SafetensorError as e:
        raise UserError(f"{path} is not a readable safetensors file ({e}). Pickled weights are not read.") from e


def sha256(path: Path | str) -> str:
    """Hash of a file's contents, as 64 hexadecimal digits; the file is read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=64)
def _sha256_of(path: str, size: int, modified: int) -> str:
    return sha256(path)


def sha256_once(path: str | Path) -> str:
    """Hash of a file, computed once in a process for as long as its size and time do not change."""
    stat = Path(path).stat()
    return _sha256_of(str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns)
