"""Compare a data set on disk with what is published of it, and look for what would spoil a run."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vitad.data import ALL, DATASETS, TEXTURE_SETS
from vitad.data.dataset import Dataset, Scan
from vitad.data.records import IMAGE_SUFFIXES, UNKNOWN, UNREADABLE, LooseMask, Record, one_channel
from vitad.errors import UserError, unknown

NONE_EXPECTED = (
    "unreadable files",
    "masks without an image",
    "images without a mask",
    "masks of another size than the image",
    "good images whose mask marks something",
)
WITHOUT_MASKS = "categories without masks"  # the check; their images are not counted as lacking a mask each

CountRow = tuple[str, str, str, int | None, int]


@dataclass(frozen=True)
class Report:
    """The result of `verify`; `str` gives it as a table.

    A number that nobody has published is None; it is shown and compared with nothing.

    Attributes
    ----------
    title : str
        The data set, the category if only one was checked, and the folder.
    counts : list of tuple
        Rows (category, part, kind, published number of images, number found).
    checks : dict
        `{check: (expected number of files, names of the files found)}`.
    """

    title: str
    counts: list[CountRow]
    checks: dict[str, tuple[int | None, list[str]]] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Published categories of which there is no image."""
        found: Counter[str] = Counter()
        for category, *_, published, n in self.counts:
            if category and published is not None:
                found[category] += n
        return [category for category, n in found.items() if not n]

    @property
    def differences(self) -> list[str]:
        """Lines that say what is not as it should be; [] where all is well."""
        lines = [f"no images of {', '.join(self.missing)}"] if self.missing else []
        parts: dict[tuple[str, str], list[CountRow]] = {}
        for row in self.counts:
            if row[0] not in self.missing:
                parts.setdefault(row[:2], []).append(row)
        for rows in parts.values():
            lines += _count_differences(rows)
        for check, (expected, names) in self.checks.items():
            if expected in (None, len(names)):
                continue
            if check == WITHOUT_MASKS:
                lines.append(f"no masks of {', '.join(names)}, so only image AUROC can be computed there")
            else:
                lines.append(f"{check}: {len(names)}, expected {expected}")
        return lines

    def __str__(self) -> str:
        published = [row[3] for row in self.counts]
        total = None if None in published else sum(n for n in published if n is not None)
        found = sum(row[4] for row in self.counts)
        rows = [("category", "part", "kind", "published", "found", "")]
        rows += [(*row[:3], *_compared(row[3], row[4])) for row in self.counts if row[0] not in self.missing]
        for category in self.missing:
            of_category = sum(row[3] or 0 for row in self.counts if row[0] == category)
            rows.append((category, "", "", *_compared(of_category, 0)))
        rows += [("total", "", "", *_compared(total, found))]
        lines = [self.title, *_aligned(rows)]
        if self.checks:
            table = [("check", "expected", "found", "")]
            for check, (expected, names) in self.checks.items():
                few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                table.append((check, *_compared(expected, len(names))[:2], few))
            lines += ["", *_aligned(table)]
        lines.append("")
        if self.differences and total == found:
            lines.append(f"all {found} images are there, but:")
        return "\n".join(lines + (self.differences or ["as it should be"]))


def _count_differences(rows: list[CountRow]) -> list[str]:
    """Lines on the numbers of images in one part of a category.

    Kinds of defect that are there under other names are one line, where the number of defective images agrees.
    """
    defects = [row for row in rows if row[2] != "good"]
    total = sum(row[4] for row in defects)
    lacking = [row for row in defects if row[3] and not row[4]]
    others = [row for row in defects if row[3] == 0]
    lines = []
    if lacking and others and total == sum(row[3] or 0 for row in defects):
        names, instead = (", ".join(kind for _, _, kind, *_ in some) for some in (lacking, others))
        where = " ".join(filter(None, rows[0][:2]))
        lines = [f"{where}: {total} defective images as published, but with {names} merged into {instead}"]
        rows = [row for row in rows if row not in lacking + others]
    return lines + [
        f"{' '.join(filter(None, (category, part, kind)))}: {found} images, {published or 'none'} published"
        for category, part, kind, published, found in rows
        if published not in (None, found)
    ]


def count(name: str, root: str | Path | None = None, category: str | None = None) -> Report:
    """`Report` of the numbers of images alone, which takes seconds; parameters as in `verify`."""
    dataset, folder, scans = _scan(name, root, category)
    return Report(_title(dataset, folder, scans), _count_rows(dataset, scans))


def verify(name: str, root: str | Path | None = None, category: str | None = None) -> Report:
    """Read every file of a data set and compare it with what is published.

    Unreadable files, pairs that do not match and wrong counts are always differences; empty masks and byte-identical
    images only where their number is known, else they are only shown.

    Parameters
    ----------
    name : str
        One of `DATASETS` or `TEXTURE_SETS`.
    root : path, optional
        Its folder, by default as in `vitad.data.load`.
    category : str, optional
        Check this one alone; by default all, and those that are missing are differences.

    Raises
    ------
    UserError
        For an unknown name or category, and for a folder that does not exist or holds no images.
    """
    dataset, root, scans = _scan(name, root, category)
    entries = {one: [entry for part in scan.values() for entry in part] for one, scan in scans.items()}
    records = [r for of_category in entries.values() for r in of_category if isinstance(r, Record)]
    loose = [m.mask for of_category in entries.values() for m in of_category if isinstance(m, LooseMask)]
    paths = sorted({r.path for r in records} | {r.mask for r in records if r.mask} | set(loose))
    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(_look, paths), "read", len(paths), unit="file", leave=False)
        looks = dict(zip(paths, bar, strict=True))

    without_mask, unmasked = [], []
    for one, of_category in entries.items():
        bare = [r for r in of_category if isinstance(r, Record) and r.mask is None and r.label != 0]
        if any(entry.mask for entry in of_category) or any(r.label == UNKNOWN for r in bare):
            without_mask += [r.path for r in bare]
        elif bare:
            unmasked.append(one or dataset.name)
    pairs = [
        (r, mask, image_look, mask_look)
        for r in records
        if (mask := r.mask) and (image_look := looks[r.path]) and (mask_look := looks[mask])
    ]
    copies: dict[bytes, set[Path]] = {}
    for r in records:
        if look := looks[r.path]:
            copies.setdefault(look.digest, set()).add(r.path)

    def names(files: Iterable[Path]) -> list[str]:
        return [p.relative_to(root).as_posix() for p in sorted(files)]

    checks = {
        "unreadable files": names(p for p, look in looks.items() if look is None),
        "masks without an image": names(loose),
        "images without a mask": names(without_mask),
        WITHOUT_MASKS: unmasked,
        "masks of another size than the image": names(
            mask for _, mask, image_look, mask_look in pairs if image_look.size != mask_look.size
        ),
        "good images whose mask marks something": names(
            r.path for r, *_, look in pairs if r.label == 0 and look.marked
        ),
        "empty masks": names(mask for r, mask, _, look in pairs if r.label and not look.marked),
        "duplicate images": [" = ".join(names(group)) for group in copies.values() for _ in range(len(group) - 1)],
        "image files left out": names(_image_files_below(dataset, root, scans) - set(paths)),
    }
    expected = dict.fromkeys(NONE_EXPECTED, 0) | dict(dataset.known)
    if dataset.published:  # a user's own images need no masks
        expected[WITHOUT_MASKS] = 0
    return Report(
        _title(dataset, root, scans),
        _count_rows(dataset, scans),
        {check: (expected.get(check), files) for check, files in checks.items()},
    )


def _scan(name: str, root: str | Path | None, category: str | None) -> tuple[Dataset, Path, dict[str | None, Scan]]:
    """The data set, its folder, and the files of each category to check."""
    datasets = DATASETS | TEXTURE_SETS
    if name not in datasets:
        raise unknown("dataset", name, datasets)
    dataset = datasets[name]
    if category is not None:
        category, _ = dataset.resolve(category)
    folder = dataset.locate(root)
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist. Check --root.")
    categories = dataset.categories(folder)
    if category not in (None, ALL):
        if categories == [None]:
            raise UserError(f"{folder} holds no categories, but category '{category}' was given. Leave it out.")
        if category not in categories:
            raise unknown(f"category in {folder}:", category, categories)
        categories = [category]
    scans = {one: dataset.scan(folder, one) for one in categories}
    if not dataset.published and not any(files for scan in scans.values() for files in scan.values()):
        raise UserError(f"{folder} holds no images in train/good or test/<kind>, of itself or of its folders.")
    return dataset, folder, scans


def _title(dataset: Dataset, root: Path, scans: dict[str | None, Scan]) -> str:
    category = _only_category(dataset, root, scans)
    return f"{dataset.name}{f' {category}' if category else ''} in {root}"


def _only_category(dataset: Dataset, root: Path, scans: dict[str | None, Scan]) -> str | None:
    """The category that is checked, where the data set has others; None where all are checked."""
    return next(iter(scans)) if len(scans) < len(dataset.categories(root)) else None


def _count_rows(dataset: Dataset, scans: dict[str | None, Scan]) -> list[CountRow]:
    rows: list[CountRow] = []
    for category, scan in scans.items():
        found = Counter(
            (part, r.defect)
            for part, files in scan.items()
            for r in files
            if isinstance(r, Record) and r.path.is_file()
        )
        published = dataset.published.get(category, {})
        for part, kind in [*published, *(key for key in found if key not in published)]:
            expected = published.get((part, kind), 0) if published else None
            rows.append((category or "", part, kind, expected, found[part, kind]))
    return rows


def _image_files_below(dataset: Dataset, root: Path, scans: dict[str | None, Scan]) -> set[Path]:
    """All image files of the data set, or of the only category that is checked."""
    base = root / (_only_category(dataset, root, scans) or "")
    return {p for p in base.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()}


@dataclass(frozen=True)
class _Look:
    digest: bytes
    size: tuple[int, int]
    marked: bool  # any pixel above 0


def _look(path: Path) -> _Look | None:
    """One reading of an image file; None where it cannot be read."""
    try:
        content = path.read_bytes()
        with Image.open(BytesIO(content)) as image:
            return _Look(hashlib.sha256(content).digest(), image.size, bool(np.asarray(one_channel(image)).any()))
    except UNREADABLE:
        return None


def _compared(expected: int | None, found: int) -> tuple[str, str, str]:
    """Two numbers as text, None as a dash, and whether they differ."""
    return "-" if expected is None else str(expected), str(found), "differs" if expected not in (None, found) else ""


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of columns as wide as their widest cell; what looks like a number goes to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = {i for i, cell in enumerate(rows[-1]) if cell == "-" or cell.isdigit()}
    return [
        "  ".join(
            f"{c:>{w}}" if i in right else f"{c:<{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
