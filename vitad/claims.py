"""Sentences about results that are checked against the committed records and experiments whenever they are shown.

A sentence of a chapter that says what results show is a call of `claim`. It renders as the sentence with its numbers,
and raises where the records do not support it. The evidence is written with the functions of this module and literals
alone, so that `vitad claims` finds every claim in the notebooks and checks it without running them.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import vitad
from vitad.errors import UserError
from vitad.evidence import Difference, Estimate, contrast, difference, estimate
from vitad.evidence import of_category as record_of_category
from vitad.metrics import METRICS
from vitad.runs.folder import image_resamples_from_scores
from vitad.runs.record import Record, committed, committed_seeds
from vitad.runs.record import experiment as rows_of
from vitad.runs.request import Request, hash_of
from vitad.show.tables import by_kind, core_minutes, fastest, interval_text


@dataclass(frozen=True)
class Runs:
    """The committed runs of one request with all their seeds, and what to call them.

    `category` is the one that they were tested on, where it is not that of the request, such as `toy/gear`.
    """

    name: str
    records: tuple[Record, ...]
    category: str = ""


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


class MissingRecords(UserError):
    """A claim speaks of runs that have no committed record."""


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
    MissingRecords
        There are no such records.
    """
    asked = Request(method, dataset, **request)
    found = committed_seeds(asked, records)[:seeds]
    if not found:
        raise MissingRecords(f"no committed record of {asked.name}")
    return Runs(name or method, tuple(found))


def of_kind(runs: Runs, kind: str, category: str | None = None) -> Runs:
    """The same runs, tested on one kind of defect and all good images; only image AUROC is known, from `scores.csv`.

    Of runs over several categories only the images of `category`, the name of its folder, are counted, or all.
    """
    found = []
    for r in runs.records:
        resamples = image_resamples_from_scores(r["folder"], kind, category)
        found.append(r | {"metrics": {"image_auroc": by_kind(r, category).get(kind)}, "resamples": resamples})
    return Runs(f"{runs.name} ({kind})", tuple(found), category or runs.category)


def of_category(runs: Runs, category: str) -> Runs:
    """The same runs over several categories, tested on one of them, such as `toy/gear`."""
    return Runs(f"{runs.name} ({category})", tuple(record_of_category(r, category) for r in runs.records), category)


def above(first: Runs, second: Runs, metric: str) -> Evidence:
    """The first is above the second: the 95 % interval of the paired difference lies above 0."""
    return _compared(first, second, metric, "above")


def undecided(first: Runs, second: Runs, metric: str) -> Evidence:
    """The two cannot be told apart: the 95 % interval of the paired difference holds 0."""
    return _compared(first, second, metric, "undecided")


def gains_at_most(first: Runs, second: Runs, metric: str, value: float) -> Evidence:
    """The first is better by no more than `value`: the 95 % interval of the paired difference lies at or below it."""
    first, second = _common_seeds(first, second)
    found = difference(first.records, second.records, metric)
    return _of_difference(found.n_seeds > 1 and found.high <= value, found, first, second, metric)


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


def by_all_metrics(comparison: Callable[..., Evidence], first: Runs, second: Runs, *value: float) -> Evidence:
    """A comparison, `above`, `undecided` or `gains_at_most` with its `value`, holds by each of the four metrics."""
    return all_of(*(comparison(first, second, metric, *value) for metric in METRICS))


def above_on_average(firsts: list[Runs], seconds: list[Runs], metric: str) -> Evidence:
    """The mean over several data sets is above that of others: the 95 % interval of the difference lies above 0.

    The two lists are of the same data sets, in the same order; each pair shares its test images, and all have a seed in
    common.
    """
    terms = [(sign * k, runs) for sign, side in ((1, firsts), (-1, seconds)) for k, runs in enumerate(side, 1)]
    weights = {str(k): math.copysign(1 / len(firsts), k) for k, _ in terms}
    d = contrast({str(k): runs.records for k, runs in terms}, weights, metric)
    what = " minus ".join(f"mean of {', '.join(r.name for r in side)}" for side in (firsts, seconds)) + ":"
    numbers = f"{METRICS[metric]}, {what} {d.value:+.3f} {interval_text(d.low, d.high, '+.3f')}, {_sources(d)}"
    return _evidence(d.verdict == "above", numbers, *firsts, *seconds)


def interaction_undecided(both: Runs, first: Runs, second: Runs, neither: Runs, metric: str) -> Evidence:
    """Whether two parts give more together than the sum of what each gives alone: the 95 % interval holds 0."""
    variants = {"both": both, "first": first, "second": second, "neither": neither}
    weights = {"both": 1, "first": -1, "second": -1, "neither": 1}
    d = contrast({name: runs.records for name, runs in variants.items()}, weights, metric)
    formula = f"{both.name} − {first.name} − {second.name} + {neither.name}"
    numbers = f"{METRICS[metric]} {formula} {d.value:+.3f} {interval_text(d.low, d.high, '+.3f')}, {_sources(d)}"
    return _evidence(d.verdict == "undecided", numbers, *variants.values())


def counted(runs: Runs, what: str, low: float, high: float, of: str = "") -> Evidence:
    """In every run, an entry of `counts` lies within bounds; with `of`, its share of another entry."""
    values = [r["counts"][what] / (r["counts"][of] if of else 1) for r in runs.records]
    numbers = f"{what}{' / ' * bool(of)}{of} {runs.name} {min(values):g} to {max(values):g}, {_seeds(len(values))}"
    return _evidence(low <= min(values) and max(values) <= high, numbers, runs)


def minutes_at_most(runs: Runs, value: float) -> Evidence:
    """One core took no more minutes, the shortest of the seeds, see `vitad.show.tables.core_minutes`."""
    found = core_minutes(runs.records)
    processor = fastest(runs.records)["environment"]["device_name"]
    numbers = f"minutes {runs.name} {found:.1f}, {_seeds(len(runs.records))}, {processor}"
    return _evidence(found <= value, numbers, runs)


def measured(experiment: str, metric: str, low: float, high: float, **values: Any) -> Evidence:
    """In each row of an experiment that has these values, the 95 % interval of a metric lies within bounds.

    Rows are those of `experiments/<experiment>.json`, with `metrics` and `intervals` as in a record. The other texts of
    a row say what it is of; `seed` and `run`, the hash of the record that it rests on, may be None. Rows that differ in
    the seed alone are shown together: their mean, and the outer bounds of their intervals.
    """
    rows = [r for r in rows_of(experiment) if all(r.get(name) == v for name, v in values.items())]
    if not rows:
        raise MissingRecords(f"experiments/{experiment}.json has no row with {values}")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        name = ", ".join([v for k, v in r.items() if isinstance(v, str) and k != "run"])
        by_name.setdefault(name, []).append(r)
    holds, shown = True, []
    for name, seeds in by_name.items():
        value = sum(r["metrics"][metric] for r in seeds) / len(seeds)
        bounds = [bound for r in seeds for bound in r["intervals"][metric]]
        least, most = min(bounds), max(bounds)
        holds &= low <= least and most <= high
        n = "" if seeds[0]["seed"] is None else f", {_seeds(len(seeds))}"
        shown.append(f"{name} {value:.3f} {interval_text(least, most)}{n}")
    return Evidence(holds, f"{METRICS[metric]} {'; '.join(shown)}", frozenset(r["run"] for r in rows if r["run"]))


def above_on_each(experiment: str, first: str, second: str, metric: str, kind: str) -> Evidence:
    """On each data set of an experiment, one candidate has a higher metric than another: of one seed, without interval.

    Rows are those of `experiments/<experiment>.json`, with the `name` of a candidate, `dataset`, `category`, and the
    `metrics` of each kind of damage.
    """
    rows = rows_of(experiment)
    here, there = (
        {r["category"] or r["dataset"]: r["metrics"][kind][metric] for r in rows if r["name"] == name}
        for name in (first, second)
    )
    if not here or here.keys() != there.keys():
        raise MissingRecords(f"experiments/{experiment}.json does not have both {first} and {second} on each data set")
    shown = ", ".join(f"{data} {here[data]:.3f} and {there[data]:.3f}" for data in here)
    numbers = f"{METRICS[metric]}, {first} and {second}: {shown}, one seed, no interval"
    return Evidence(all(here[data] > there[data] for data in here), numbers, frozenset())


def all_of(*evidence: Evidence) -> Evidence:
    """Everything holds; numbers that several have in common are shown once."""
    rests_on = frozenset().union(*(e.rests_on for e in evidence))
    return Evidence(all(e.holds for e in evidence), "; ".join(dict.fromkeys(e.numbers for e in evidence)), rests_on)


def _compared(first: Runs, second: Runs, metric: str, verdict: str) -> Evidence:
    first, second = _common_seeds(first, second)
    found = difference(first.records, second.records, metric)
    return _of_difference(found.verdict == verdict, found, first, second, metric)


def _tested_on(runs: Runs) -> str:
    """Data set and category of the test images; a category alone, such as `gear`, is one of the runs' data set."""
    (of_request,) = {(r["dataset"], r["category"]) for r in runs.records}
    dataset, category = of_request
    return runs.category if "/" in runs.category else f"{dataset}/{runs.category or category}"


def _common_seeds(first: Runs, second: Runs) -> tuple[Runs, Runs]:
    """Both without the seeds that only one has, since a difference is paired; as they are where none is common.

    Categories of one model may be compared with each other. Runs of different models have to be tested on the same.
    """
    tested = [_tested_on(runs) for runs in (first, second)]
    of_one_model = {hash_of(r) for r in first.records} & {hash_of(r) for r in second.records}
    if tested[0] != tested[1] and not of_one_model:
        raise UserError(f"{first.name} and {second.name} are tested on {' and '.join(tested)}; see `of_category`")
    common = {r["seed"] for r in first.records} & {r["seed"] for r in second.records}
    if not common:
        return first, second

    def kept(runs: Runs) -> Runs:
        return replace(runs, records=tuple(r for r in runs.records if r["seed"] in common))

    return kept(first), kept(second)


def _of_difference(holds: bool, found: Difference, first: Runs, second: Runs, metric: str) -> Evidence:
    numbers = f"{_shown(first, metric)}, {_shown(second, metric, title=False)}, "
    numbers += f"difference {found.value:+.3f} {interval_text(found.low, found.high, '+.3f')}, {_sources(found)}"
    return _evidence(holds, numbers, first, second)


def _bounded(runs: Runs, metric: str, inside: Callable[[float, float], bool]) -> Evidence:
    found = estimate(runs.records, metric)
    numbers = f"{_shown(runs, metric)} {interval_text(found.low, found.high)}, {_sources(found)}"
    return _evidence(inside(found.low, found.high), numbers, runs)


def _shown(runs: Runs, metric: str, title: bool = True) -> str:
    return f"{METRICS[metric] + ' ' if title else ''}{runs.name} {estimate(runs.records, metric).value:.3f}"


def _sources(found: Estimate | Difference) -> str:
    """How many seeds an interval rests on, and what it leaves out."""
    lacking = f", not counting what other {'seeds' if found.n_seeds == 1 else 'test images'} would change"
    return _seeds(found.n_seeds) + ("" if found.complete else lacking)


def _seeds(n: int) -> str:
    return f"{n}\u00a0seed{'s' * (n != 1)}"


def _evidence(holds: bool, numbers: str, *runs: Runs) -> Evidence:
    return Evidence(bool(holds), numbers, frozenset(hash_of(r) for one in runs for r in one.records))


VOCABULARY = {
    f.__name__: f
    for f in (
        runs_of,
        of_kind,
        of_category,
        above,
        above_on_average,
        above_on_each,
        undecided,
        by_all_metrics,
        interaction_undecided,
        gains_at_most,
        at_least,
        at_most,
        near_chance,
        counted,
        minutes_at_most,
        measured,
        all_of,
    )
}


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

    One whose records are missing does not hold.

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
            except MissingRecords as e:
                given = _made(ast.literal_eval(node.args[0]), Evidence(False, str(e), frozenset()))
            yield given


def _made(sentence: str, evidence: Evidence, before: str = "") -> Claim:
    return Claim("", sentence, evidence, before)
