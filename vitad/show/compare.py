"""The same test images as several finished runs see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitad import data
from vitad.errors import UserError
from vitad.runs import read_maps, read_record
from vitad.runs.pipeline import MASK_THRESHOLD
from vitad.show import plots


def compare(
    folders: Sequence[str | Path],
    out: str | Path,
    data_root: str | Path | None = None,
    per_kind: int = 2,
    good: int = 2,
) -> None:
    """Draw the same test images as several finished runs see them, one row a run, into the PNG file `out`.

    Good images and every kind of defect are there, spread evenly over the ranking by the mean of the runs' ranks, so
    that no run chooses. Each row has one colour scale of its own, since methods score on different scales.

    Parameters
    ----------
    folders
        Of the runs, with `record.json` and `maps.npz`; of one data set and one split.
    out
        The PNG file.
    data_root
        Folder of the data set, as in `vitad.data.load`.
    per_kind, good
        Numbers of images of each kind of defect, and of good ones.

    Raises
    ------
    UserError
        Runs have no maps, share no test image, or were tested on other data than `data_root`.
    """
    records, maps = [read_record(f) for f in folders], [read_maps(f) for f in folders]
    shared = set.intersection(*({str(p) for p in m["paths"]} for m in maps))
    if not shared or len({(r["dataset"], r["split"]) for r in records}) > 1:
        raise UserError("these runs share no test images. Give runs of one data set, one split and one category.")
    paths = sorted(shared)
    rows = []  # of each run: where the shared images are
    for m in maps:
        row_of = {str(p): i for i, p in enumerate(m["paths"])}
        rows.append(np.array([row_of[p] for p in paths]))
    labels, defects = (maps[0][name][rows[0]] for name in ("labels", "defects"))
    ranks = [m["scores"][i].argsort().argsort() for m, i in zip(maps, rows, strict=True)]
    chosen = plots.examples(labels, defects, per_kind, good, order=np.mean(ranks, 0))

    first, size = records[0], max(r["protocol"]["image_size"] for r in records)
    found = data.find(first["dataset"], data_root, first["category"], first["split"])
    by_path = {r.path.relative_to(found.root).as_posix(): r for r in found.test}
    if missing := [paths[k] for k in chosen if paths[k] not in by_path]:
        raise UserError(
            f"{found.root} does not hold {missing[0]}, which these runs were tested on. Give their --data-root."
        )
    test = data.ImageSet([by_path[paths[k]] for k in chosen], found.root, size, mask_threshold=MASK_THRESHOLD)
    names = [f"{r['method']}\n{r['protocol']['image_size'][0]} px" for r in records]
    if len(set(names)) < len(names):
        names = [Path(f).resolve().name for f in folders]
    seen = {n: m["maps"][i[chosen]] for n, m, i in zip(names, maps, rows, strict=True)}
    limits = {n: plots.heat_range(m["maps"]) for n, m in zip(names, maps, strict=True)}
    images, titles = test.batch(range(len(test)))["image"].numpy(), [str(d) for d in defects[chosen]]
    plots.save(plots.heatmap_grid(images, test.masks, seen, titles, limits, 0.8 * len(chosen)), out, dpi=100)
