"""A record names an image file, its mask file and its label. No image is decoded here."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on broken files
UNKNOWN = -1  # the label of an image whose mask would tell it and cannot be read


def image_files(folder: Path) -> list[Path]:
    """Image files of one folder, sorted by name, whatever the case of their suffixes; [] where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


@dataclass(frozen=True)
class Record:
    """An image file of a data set and what is known of it."""

    path: Path
    label: int  # 0 normal, 1 anomalous, from the folder or the split file, never from the mask; `scan` also: UNKNOWN
    defect: str  # "good" or the kind of defect
    mask: Path | None = None  # None: no anomalous pixel (normal images), or no mask known
    category: str = ""  # dataset/category, from `vitad.data.find`
    texture: bool = False  # the material fills the picture: there is no object on a background
    group: str = ""  # the item that was photographed; "": the image is the only one of its item


@dataclass(frozen=True)
class LooseMask:
    """A mask file without its image, as only `Dataset.scan` returns it."""

    mask: Path
    defect: str


def one_channel(mask: Image.Image) -> Image.Image:
    """The mask with one level a pixel, of 8 bits or more; what is not 0 is anomalous."""
    return mask if mask.mode in ("L", "I;16", "I") else mask.convert("L")
