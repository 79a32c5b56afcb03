"""Compare a data set on disk with what is published of it, and look for what would spoil a run."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from vitad.data import LAYOUTS, dtd, folder, locate
from vitad.data.samples import IMAGE_SUFFIXES, UNREADABLE, one_channel
from vitad.errors import UserError, unknown

VERIFIABLE = LAYOUTS | {"dtd": dtd}
NONE_EXPECTED = (
    "unreadable files",
    "masks without an image",
    "images without a mask",
    "masks of another size than the image",
    "good images whose mask marks something",
)


@dataclass(frozen=True)
class Report:
    """What `verify` found; `str` gives it as a table.

    `counts`: rows (category, part, kind, published, found). `checks`: {what: (expected, names of the files)}. A number
    that nobody has published is None; it is shown and compared with nothing.
    """

    title: str
    counts: list
    checks: dict = field(default_factory=dict)

    @property
    def differences(self):
        """Lines that say what is not as it should be; [] where all is well."""
        counts = [
            f"{' '.join(filter(None, (category, part, kind)))}: {found} images, {published or 'none'} published"
            for category, part, kind, published, found in self.counts
            if published not in (None, found)
        ]
        checks = [
            f"{what}: {len(names)}, expected {expected}"
            for what, (expected, names) in self.checks.items()
            if expected not in (None, len(names))
        ]
        return counts + checks

    def __str__(self):
        total = [
            None if None in column else sum(column) for column in zip(*(row[3:] for row in self.counts), strict=True)
        ]
        rows = [("category", "part", "kind", "published", "found", ""), *map(_marked, self.counts)]
        lines = [self.title, *_aligned([*rows, _marked(("total", "", "", *total))])]
        if self.checks:
            rows = [("check", "expected", "found", "")]
            for what, (expected, names) in self.checks.items():
                few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                rows.append((*_marked((what, expected, len(names)))[:3], few))
            lines += ["", *_aligned(rows)]
        return "\n".join(lines + ["", *(self.differences or ["as it should be"])])


def count(name, root=None):
    """`Report` of the numbers of images alone, which takes seconds."""
    root, found = _scan(name, root)
    published = VERIFIABLE[name].PUBLISHED
    rows = []
    for category, parts in found.items():
        here = Counter(
            (part, r.defect) for part, records in parts.items() for r in records if r.path and r.path.is_file()
        )
        there = published.get(category, {})
        for part, kind in [*there, *(key for key in here if key not in there)]:
            rows.append((category or "", part, kind, there.get((part, kind), 0 if there else None), here[part, kind]))
    return Report(f"{name} in {root}", rows)


def verify(name, root=None):
    """Read every file of a data set; returns a `Report`.

    Expected numbers are the published ones. Unreadable files, pairs that do not match and wrong counts are always
    differences; empty masks and byte-identical images only where their number is known, else they are only shown.
    """
    root, found = _scan(name, root)
    records = [r for parts in found.values() for part in parts.values() for r in part]
    paths = sorted({p for r in records for p in (r.path, r.mask) if p})
    with ThreadPoolExecutor() as pool:
        looks = dict(
            zip(paths, tqdm(pool.map(_look, paths), "read", len(paths), unit="file", leave=False), strict=True)
        )

    bare = []
    for parts in found.values():
        here = [r for part in parts.values() for r in part]
        if VERIFIABLE[name].PUBLISHED or any(r.mask for r in here):  # a user's own images need no masks
            bare += [r.path for r in here if r.path and r.label != 0 and r.mask is None]
    pairs = [r for r in records if r.path and r.mask and looks[r.path] and looks[r.mask]]
    copies = {}
    for r in records:
        if r.path and looks[r.path]:
            copies.setdefault(looks[r.path].digest, []).append(r.path)
    groups = [sorted(set(group)) for group in copies.values()]
    used = set(paths)

    def names(chosen):
        return [p.relative_to(root).as_posix() for p in sorted(chosen)]

    checks = {
        "unreadable files": names(p for p, look in looks.items() if look is None),
        "masks without an image": names(r.mask for r in records if r.path is None),
        "images without a mask": names(bare),
        "masks of another size than the image": names(
            r.mask for r in pairs if looks[r.path].size != looks[r.mask].size
        ),
        "good images whose mask marks something": names(r.path for r in pairs if r.label == 0 and looks[r.mask].marked),
        "empty masks": names(r.mask for r in pairs if r.label and not looks[r.mask].marked),
        "duplicate images": [" = ".join(names(group)) for group in groups for _ in group[1:]],
        "image files left out": names(
            p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and p not in used
        ),
    }
    known = dict.fromkeys(NONE_EXPECTED, 0) | VERIFIABLE[name].KNOWN
    counts = count(name, root)
    return Report(counts.title, counts.counts, {what: (known.get(what), found) for what, found in checks.items()})


def _scan(name, root):
    """(root, {category: {part: records}})."""
    if name not in VERIFIABLE:
        raise unknown("dataset", name, VERIFIABLE)
    root, layout = locate(name, root), VERIFIABLE[name]
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist. Check --root.")
    categories = list(layout.PUBLISHED) or folder.categories(root) or [None]
    found = {category: layout.scan(root, category) for category in categories}
    if not layout.PUBLISHED and not any(records for parts in found.values() for records in parts.values()):
        raise UserError(f"{root} holds no images in train/good or test/<kind>, of itself or of its folders.")
    return root, found


@dataclass(frozen=True)
class _Look:
    digest: bytes
    size: tuple
    marked: bool  # any pixel above 0


def _look(path):
    """One reading of an image file; None where it cannot be read."""
    try:
        content = path.read_bytes()
        with Image.open(BytesIO(content)) as image:
            return _Look(hashlib.sha256(content).digest(), image.size, bool(np.asarray(one_channel(image)).any()))
    except UNREADABLE:
        return None


def _marked(row):
    """Numbers as text, None as a dash; a last cell says where the two last numbers differ."""
    *words, expected, found = row
    mark = "differs" if expected not in (None, found) else ""
    return (*words, *("-" if n is None else str(n) for n in (expected, found)), mark)


def _aligned(rows):
    """Lines of columns as wide as their widest cell; what looks like a number goes to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = {i for i, cell in enumerate(rows[-1]) if cell == "-" or cell.isdigit()}
    return [
        "  ".join(
            f"{c:>{w}}" if i in right else f"{c:<{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
