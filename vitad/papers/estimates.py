"""How long a run will take, by the records of such runs, or by counted operations where there are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from vitad import data, runs
from vitad.runs import Request
from vitad.runs.record import Record


def estimate(request: Request, records: Iterable[Record]) -> tuple[float | None, str]:
    """(seconds, basis) that a run takes by the records of such runs; (None, reason) where there are none.

    Such runs have the same method, preset and image size. Those of a machine like this one count before others. Their
    time until the end of training is scaled by training images and epochs, the rest by test images, and the median
    taken. A method that stops early, or trains on a share of the images, takes less.
    """
    records, settings = list(records), request.settings
    kind = (request.method, request.preset, settings["image_size"])
    same = [r for r in records if (r["method"], r["preset"], r["settings"]["image_size"]) == kind]
    if not same:
        once = "".join(f" {k}=1" for k in settings if k.endswith("epochs"))
        words = f"vitad run {request.method} --preset {request.preset}{once and ' --set'}{once}"
        return None, f"for a measured time, run one epoch on toy: {words} --out runs/pace-{request.method}"
    counts = n_images(request, records)
    if counts is None:
        return None, f"the number of images of {request.dataset} is not known before the first run"
    e = runs.environment(runs.find_device(request.device))
    machines = Counter(_machine(r["environment"]) for r in same)
    like_this = [m for m in machines if m.startswith(_machine(e, threads=False))]
    machine = max(like_this or machines, key=lambda m: machines[m])
    seconds = []
    for r in same:
        if _machine(r["environment"]) == machine:
            times, n = r["timings"], r["counts"]
            fit = (times["prepare_s"] + times["train_s"]) / n["train"] / max(_epochs(r["settings"]), 1)
            test = (times["load_s"] + times["score_s"] + times["evaluate_s"]) / (n["test_good"] + n["test_defective"])
            seconds.append(fit * max(_epochs(settings), 1) * counts[0] + test * counts[1])
    return float(np.median(seconds)), f"{len(seconds)} run{'s' * (len(seconds) > 1)} on {machine}"


def n_images(request: Request, records: Iterable[Record] = ()) -> tuple[int, int] | None:
    """Numbers of training and test images: as published or generated, or as in a run on the same data."""
    if counts := data.get(request.dataset).counts(request.category, request.split):
        return counts
    where = ("dataset", "category", "split")
    same = (r["counts"] for r in records if all(r[k] == getattr(request, k) for k in where))
    return next(((n["train"], n["test_good"] + n["test_defective"]) for n in same), None)


def overview(requests: list[Request], records: Mapping[str, Record]) -> tuple[pd.DataFrame, float | None, str]:
    """What a list of requests has and lacks, one line for those that differ in the seed only.

    Returns
    -------
    (DataFrame `runs, seeds there, missing, time each`, seconds of all that is missing or None, basis as text)

    The basis also says how long those take on two cards of which such runs have no record, see `by_operations`.
    """
    groups: dict[str, list[Request]] = {}
    for request in requests:
        groups.setdefault("".join(request.name.rpartition(f"-s{request.seed}")[::2]), []).append(request)
    lines, bases = [], []
    unrecorded: list[Request] = []
    left: float | None = 0.0
    for stem, group in groups.items():
        seconds, basis = estimate(group[0], records.values())
        missing = [r for r in group if r.hash not in records]
        lines.append(
            {
                "runs": stem,
                "seeds there": " ".join(str(r.seed) for r in group if r.hash in records),
                "missing": " ".join(str(r.seed) for r in missing),
                "time each": "" if seconds is None else duration(seconds),
            }
        )
        if missing:
            left = None if left is None or seconds is None else left + seconds * len(missing)
            bases.append(basis)
            unrecorded += missing if seconds is None else []
    if counted := by_operations(unrecorded):
        bases = [counted, *bases]
    return pd.DataFrame(lines), left, "\n  ".join(dict.fromkeys(bases))


def by_operations(requests: Iterable[Request]) -> str:
    """Time of all these runs on two cards, by counted operations; "" where the images of none are counted.

    Examples
    --------
    >>> from vitad.papers.estimates import by_operations
    >>> by_operations([Request("l2cae", "mvtec", "bottle", preset="paper")])
    'about 4.6 s on one H100 SXM, 4.7 s on one RTX 4090, by counted operations: vitad plan l2cae --preset paper...'
    """
    from vitad.plan import QUOTED, plan  # here, since that module takes `duration` from this one

    counted = [r for r in requests if data.get(r.dataset).counts_by_category(r.category, r.split)]
    if not counted:
        return ""
    plans = [plan(request) for request in counted]
    times = [f"{duration(sum(p.seconds(card) for p in plans))} on one {card.name}" for card in QUOTED]
    commands = dict.fromkeys(f"vitad plan {r.method} --preset {r.preset} --dataset {r.dataset}" for r in counted)
    return f"about {', '.join(times)}, by counted operations: {'; '.join(commands)}"


def time_left(requests: list[Request], records: Iterable[Record]) -> str:
    """What to add to a line of progress: the time that these runs will take, as far as it is known."""
    records = list(records)
    seconds = [estimate(request, records)[0] for request in requests]
    known = [s for s in seconds if s is not None]
    more = f", and {len(requests) - len(known)} runs of unknown length" if len(known) < len(requests) else ""
    return f", about {duration(sum(known))} left{more}" if known else ""


def duration(seconds: float) -> str:
    """Seconds in words, to two digits: "40 s", "12 min", "3.5 h", "2.1 days"."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds / 86400:.3g} days"


def _machine(environment: Mapping[str, Any], threads: bool = True) -> str:
    name = f"{environment['device']}, {environment['device_name']}, "
    return name + (f"{environment['threads']} thread(s)" if threads else "")


def _epochs(settings: Mapping[str, Any]) -> int:
    """Of all stages."""
    return sum(v for k, v in settings.items() if k.endswith("epochs"))
