"""Files are written whole or not at all."""

import hashlib
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vitad.errors import UserError


def cache_dir() -> Path:
    """Folder for generated data, converted weights and decoded images; the variable `VITAD_CACHE` names another one."""
    return Path(os.environ.get("VITAD_CACHE") or Path.home() / ".cache" / "vitad")


@contextmanager
def atomic_write(path):
    """Give a name to write to; it becomes `path` when the block ends well and vanishes when it does not.

    A full disk, a read-only folder and the like become a `UserError`; what `path` held before stays.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"cannot write {path}: {reason}. Nothing was changed there; mend this and run again.") from e
    finally:
        with suppress(OSError):
            aside.unlink()


def write_safetensors(tensors, path, metadata=None):
    """Write tensors (moved to the CPU) and a dict of strings."""
    with atomic_write(path) as aside:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, aside, metadata)


def read_safetensors(path):
    """(tensors, metadata) of a file; `UserError` where it is missing or not of that format."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except SafetensorError as e:
        raise UserError(f"{path} is not a readable safetensors file ({e}). Pickled weights are not read.") from e


def sha256(path):
    """Hash of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
