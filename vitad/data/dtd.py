"""DTD, the Describable Textures (Cimpoi et al. 2014): 47 classes of 120 images, for synthetic damage only.

images/<class>/<class>_NNNN.jpg, of many sizes. The published splits do not matter here.
"""

from vitad.data.samples import Record, image_files

CLASSES = """
    banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous flecked
    freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted meshed paisley
    perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained stratified striped
    studded swirly veined waffled woven wrinkled zigzagged
"""
PUBLISHED = {None: {("all", name): 120 for name in CLASSES.split()}}
KNOWN = {}


def scan(root, category=None):
    """See `folder.scan`; the part is `all`, and the kind is the class."""
    folders = [root / "images" / name for name in CLASSES.split()]
    return {"all": [Record(p, 0, d.name) for d in folders if d.is_dir() for p in image_files(d)]}
