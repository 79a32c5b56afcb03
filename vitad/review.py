"""A reviewer's one command: run some committed records again, and say which claims rest on them."""

from __future__ import annotations

import html
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitad import claims, data, runs
from vitad.errors import UserError
from vitad.evidence import expected
from vitad.files import atomic_write
from vitad.metrics import METRICS
from vitad.papers.estimates import duration, estimate
from vitad.runs.record import Record
from vitad.runs.request import Request, hash_of


@dataclass(frozen=True)
class Repeated:
    """A committed record, the record of the same run made again, and the claims that rest on it."""

    committed: Record
    again: Record
    tolerance: dict[str, float]  # by metric, from all seeds of the run
    claims: list[claims.Claim]

    def inside(self, metric: str) -> bool | None:
        """Whether the new value lies within the tolerance of the committed one; None where one is not defined."""
        old, new = (r["metrics"].get(metric) for r in (self.committed, self.again))
        return None if old is None or new is None else abs(new - old) <= self.tolerance[metric]


def review(
    minutes: float, out: str | Path = "runs/review", seed: int | None = None, say: Callable[[str], None] = print
) -> list[Repeated]:
    """Run again as many committed records as fit the time, drawn at random, and write `review.html`.

    Parameters
    ----------
    minutes : float
        Time for the runs. A run is begun only if its estimate fits what is left.
    out : path
        Folder of the runs and of the page.
    seed : int, optional
        Of the draw; it is printed, so that a review can be repeated.
    say : callable
        Called with lines of text.

    Raises
    ------
    UserError
        No committed record can be run here in that time.
    """
    seed = random.randrange(2**32) if seed is None else seed
    out, deadline, pace = Path(out), time.monotonic() + 60 * minutes, 1.0
    drawn = sorted(_possible(), key=lambda r: hash_of(r))
    random.Random(seed).shuffle(drawn)
    every, of_book, found = runs.committed(), claims.of_the_book(), []
    say(f"draw {seed}: {len(drawn)} committed records have their data here")
    for record in drawn:
        request = request_of(record)
        seconds, _ = estimate(request, every)
        if seconds is None or time.monotonic() + pace * seconds > deadline:
            continue
        say(f"{request.name}, about {duration(pace * seconds)}")
        began = time.monotonic()
        again = runs.run(request, out / request.folder)
        pace = max(time.monotonic() - began, 0.1) / seconds  # this machine against that of the records
        same = runs.committed_seeds(request, every) + runs.on_other_processors(request)
        tolerance = {metric: expected(same, metric)[1] for metric in METRICS}
        resting = [c for c in of_book if hash_of(record) in c.evidence.rests_on]
        found.append(Repeated(record, again, tolerance, resting))
        say(as_text(found[-1]))
    if not found:
        raise UserError(f"no committed record can be run here in {minutes:g} minutes. Give more with --minutes.")
    page = out / "review.html"
    with atomic_write(page) as temporary:
        temporary.write_text(as_html(found, seed))
    say(f"page: {page}")
    return found


def request_of(record: Record) -> Request:
    """The request that a record answers."""
    fields = ("method", "dataset", "category", "split", "preset", "seed", "overrides")
    return Request(**{name: record[name] for name in fields}, weights=record["weights"]["asked"])


def _possible() -> list[Record]:
    """Committed records whose data are at hand and whose weights any machine can find."""
    at_hand = {name: data.get(name).where_to_get() is None for name in {r["dataset"] for r in runs.committed()}}
    return [r for r in runs.committed() if at_hand[r["dataset"]] and r["weights"]["asked"] in ("auto", "random")]


def as_text(repeated: Repeated) -> str:
    """One line a metric, and the claims."""
    lines = []
    for metric, old, new, verdict in _rows(repeated):
        lines.append(f"  {METRICS[metric]:<12} committed {old}, again {new}, {verdict}")
    return "\n".join(lines + [f"  rests on it: {c.chapter}: {c.sentence}" for c in repeated.claims])


def _rows(repeated: Repeated) -> list[tuple[str, str, str, str]]:
    """(metric, committed, again, verdict) as text, for each metric that both have."""
    rows = []
    for metric in METRICS:
        inside = repeated.inside(metric)
        if inside is not None:
            old, new = (f"{r['metrics'][metric]:.3f}" for r in (repeated.committed, repeated.again))
            tolerance = f"{repeated.tolerance[metric]:.3f}"
            rows.append((metric, old, new, f"{'within' if inside else 'OUTSIDE OF'} the tolerance of {tolerance}"))
    return rows


def as_html(found: Sequence[Repeated], seed: int) -> str:
    """One page to hand in."""
    total = [repeated.inside(metric) for repeated in found for metric in METRICS]
    inside, judged = total.count(True), len(total) - total.count(None)
    e = found[0].again["environment"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>vitad review</title>",
        "<style>body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "td,th{padding:.2rem .8rem;text-align:left}.out{font-weight:bold}</style>",
        f"<h1>Review of vitad {e['vitad']}</h1>",
        f"<p>{len(found)} committed records were drawn at random (draw {seed}) and run again on {e['device_name']}, "
        f"torch {e['torch']}. {inside} of {judged} metrics lie within their tolerance.</p>",
    ]
    for repeated in found:
        name = html.escape(request_of(repeated.committed).name)
        parts.append(f"<h2>{name}</h2><table><tr><th>metric<th>committed<th>again<th>verdict</tr>")
        for metric, old, new, verdict in _rows(repeated):
            mark = " class=out" if verdict.startswith("OUTSIDE") else ""
            parts.append(f"<tr{mark}><td>{METRICS[metric]}<td>{old}<td>{new}<td>{verdict}</tr>")
        parts.append("</table>")
        if repeated.claims:
            items = "".join(f"<li>{html.escape(f'{c.chapter}: {c.sentence}')}" for c in repeated.claims)
            parts.append(f"<p>Claims that rest on it:</p><ul>{items}</ul>")
    return "\n".join(parts) + "\n"
