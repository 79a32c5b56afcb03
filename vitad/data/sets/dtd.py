"""DTD, the Describable Textures (Cimpoi et al. 2014): 47 classes of 120 images, for synthetic damage only.

images/<class>/<class>_NNNN.jpg, of many sizes. The published splits are not used.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from vitad.data.dataset import Dataset, Records, Scan, Source
from vitad.data.records import Record, image_files
from vitad.errors import UserError

CLASSES = """
    banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous flecked
    freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted meshed paisley
    perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained stratified striped
    studded swirly veined waffled woven wrinkled zigzagged
"""


class DTD(Dataset):
    """Has no split and no anomalies: its part is `all`, and the kind of an image is its class."""

    name = "dtd"
    title = "DTD (textures for synthetic damage)"
    source = Source(
        page="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        licence="none of the usual ones; the page releases it for research purposes",
        url="https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        checksum="sha256:e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205",
        citation="Cimpoi, Maji, Kokkinos, Mohamed, Vedaldi: Describing Textures in the Wild. CVPR 2014",
    )
    published = {None: {("all", name): 120 for name in CLASSES.split()}}

    def records(self, root: Path, category: str | None = None, split: str | None = None) -> Records:
        """Refused: there is nothing to train on."""
        raise UserError("dataset 'dtd' holds textures for synthetic damage, no images to train on.")

    def scan(self, root: Path, category: str | None = None) -> Scan:
        """All images, as the part `all`."""
        folders = [root / "images" / name for name in CLASSES.split()]
        return {"all": [Record(p, 0, folder.name) for folder in folders for p in image_files(folder)]}


DATASET = DTD()


def is_dtd(files: Iterable[Path]) -> bool:
    """Whether files are DTD's images: 120 of each class, in a folder of its name, and named after it."""
    files = list(files)
    by_class = Counter(p.parent.name for p in files)
    named = all(p.name.startswith(f"{p.parent.name}_") for p in files)
    return named and by_class == {name: 120 for name in CLASSES.split()}
