"""Sentences about results that are checked against the committed records whenever they are shown.

A sentence of a chapter that says what results show is a call of `claim`. It renders as the sentence with its numbers,
and raises where the records do not support it. The evidence is written with the functions of this module and literals
alone, so that `vitad claims` finds every claim in the notebooks and checks it without running them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import vitad
from vitad.errors import UserError
from vitad.evidence import Difference, Estimate, difference, estimate
from vitad.metrics import METRICS
from vitad.runs.record import Record, committed, committed_seeds
from vitad.runs.request import Request, hash_of
from vitad.show.tables import by_kind


@dataclass(frozen=True)
class Runs:
    """The committed runs of one request with all their seeds, and what to call them."""

    name: str
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Evidence:
    """Whether the records support a statement, the numbers that say so, and the hashes of the records."""

    holds: bool
    numbers: str
    rests_on: frozenset[str]


@dataclass(frozen=True)
class Claim:
    """A sentence of a chapter with its evidence."""

    chapter: str
    sentence: str
    evidence: Evidence
    before: str = ""


class ClaimError(AssertionError):
    """The records do not support a sentence."""


def claim(sentence: str, evidence: Evidence, before: str = "") -> Any:
    """Show a sentence with its numbers, if the records support it.

    Parameters
    ----------
    sentence : str
        What the results show, in plain words, with a full stop.
    evidence : Evidence
        Made by the functions of this module from literals alone.
    before : str
        What the book said before other records changed the answer; shown on the page of claims.

    Returns
    -------
    IPython.display.Markdown
        The sentence and, in brackets, its numbers.

    Raises
    ------
    ClaimError
        The records do not support the sentence; the message has the sentence and its numbers.
    """
    from IPython.display import Markdown

    if not evidence.holds:
        raise ClaimError(f"the records do not support this: {sentence} ({evidence.numbers})")
    return Markdown(f"{sentence} <span class='evidence'>({evidence.numbers})</span>")


# --- what evidence is made of ---------------------------------------------------------------------------------------


def runs_of(
    method: str,
    dataset: str = "toy",
    name: str = "",
    seeds: int | None = None,
    records: list[Record] | None = None,
    **request: Any,
) -> Runs:
    """The committed runs of a method.

    Parameters
    ----------
    method, dataset : str
        As in `Request`.
    name : str
        What to call them in the numbers; by default the method.
    seeds : int, optional
        Only the first so many seeds.
    records : list of records, optional
        All committed records, where they are already read.
    request : further fields of `Request`

    Raises
    ------
    UserError
        There are no such records.
    """
    asked = Request(method, dataset, **request)
    found = committed_seeds(asked, records)[:seeds]
    if not found:
        raise UserError(f"no committed record of {asked.name}.")
    return Runs(name or method, tuple(found))


def of_kind(runs: Runs, kind: str) -> Runs:
    """The same runs, tested on one kind of defect and all good images; only image AUROC is known, from `scores.csv`."""
    found = []
    for r in runs.records:
        without_resamples = {k: v for k, v in r.items() if k != "folder"}
        found.append(without_resamples | {"metrics": {"image_auroc": by_kind(r).get(kind)}})
    return Runs(f"{runs.name} ({kind})", tuple(found))


def above(first: Runs, second: Runs, metric: str) -> Evidence:
    """The first is above the second: the 95 % interval of the paired difference lies above 0."""
    return _compared(first, second, metric, "above")


def undecided(first: Runs, second: Runs, metric: str) -> Evidence:
    """The two cannot be told apart: the 95 % interval of the paired difference holds 0."""
    return _compared(first, second, metric, "undecided")


def at_least(runs: Runs, metric: str, value: float) -> Evidence:
    """The 95 % interval of the metric lies at or above a value, as a fraction."""
    return _bounded(runs, metric, lambda low, high: low >= value)


def at_most(runs: Runs, metric: str, value: float) -> Evidence:
    """The 95 % interval of the metric lies at or below a value, as a fraction."""
    return _bounded(runs, metric, lambda low, high: high <= value)


def near_chance(runs: Runs, metric: str = "image_auroc", margin: float = 0.1) -> Evidence:
    """The mean is within `margin` of guessing, 0.5: for AUROC."""
    found = estimate(runs.records, metric)
    return _evidence(abs(found.value - 0.5) <= margin, _shown(runs, metric), runs)


def all_of(*evidence: Evidence) -> Evidence:
    """Everything holds."""
    rests_on = frozenset().union(*(e.rests_on for e in evidence))
    return Evidence(all(e.holds for e in evidence), "; ".join(e.numbers for e in evidence), rests_on)


def _compared(first: Runs, second: Runs, metric: str, verdict: str) -> Evidence:
    d = difference(first.records, second.records, metric)
    numbers = f"{_shown(first, metric)}, {_shown(second, metric, title=False)}, "
    numbers += f"difference {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], {_sources(d)}"
    return _evidence(d.verdict == verdict, numbers, first, second)


def _bounded(runs: Runs, metric: str, inside: Callable[[float, float], bool]) -> Evidence:
    found = estimate(runs.records, metric)
    numbers = f"{_shown(runs, metric)} [{found.low:.3f}, {found.high:.3f}], {_sources(found)}"
    return _evidence(inside(found.low, found.high), numbers, runs)


def _shown(runs: Runs, metric: str, title: bool = True) -> str:
    return f"{METRICS[metric] + ' ' if title else ''}{runs.name} {estimate(runs.records, metric).value:.3f}"


def _sources(found: Estimate | Difference) -> str:
    """How many seeds an interval rests on, and whether the doubt of the test images is in it."""
    seeds = f"{found.n_seeds} seed{'s' * (found.n_seeds != 1)}"
    return seeds + ("" if found.complete else ", without the doubt of the test images")


def _evidence(holds: bool, numbers: str, *runs: Runs) -> Evidence:
    return Evidence(bool(holds), numbers, frozenset(hash_of(r) for one in runs for r in one.records))


VOCABULARY = {f.__name__: f for f in (runs_of, of_kind, above, undecided, at_least, at_most, near_chance, all_of)}


# --- all claims of the book -----------------------------------------------------------------------------------------


def of_the_book(folder: Path | None = None) -> list[Claim]:
    """All claims of the notebooks, in their order, each evaluated on the committed records.

    Parameters
    ----------
    folder : path, optional
        Folder of the notebooks; by default that of the source tree.
    """
    folder = folder or Path(vitad.__file__).parent.parent / "notebooks"
    found, records = [], committed()
    for path in sorted(folder.glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                found += [replace(c, chapter=path.stem) for c in in_code("".join(cell["source"]), records)]
    return found


def in_code(source: str, records: list[Record] | None = None) -> Iterator[Claim]:
    """The claims that a cell makes; calls of `claim` may stand anywhere in it. `records` as in `runs_of`.

    Raises
    ------
    UserError
        A claim is not made of literals and the functions of this module.
    """
    try:
        tree = ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines()))
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "claim":
            try:
                given = eval(  # names outside of the vocabulary do not exist there
                    compile(ast.Expression(node), "<claim>", "eval"),
                    {"__builtins__": {}},
                    VOCABULARY | {"claim": _made, "runs_of": partial(runs_of, records=records)},
                )
            except NameError as e:
                raise UserError(f"{ast.unparse(node)}: {e}. Use literals and the functions of vitad.claims.") from e
            yield given


def _made(sentence: str, evidence: Evidence, before: str = "") -> Claim:
    return Claim("", sentence, evidence, before)
