"""Which runs fill the cells of a printed table: those that it asks for, else the nearest to the paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from vitad import data, methods
from vitad.data.dataset import JOIN
from vitad.papers.tables import Reproduction, usual_preset
from vitad.runs import Request
from vitad.runs.record import Record

PRESETS = ("paper", "near", "small", "small_dinov2")  # by how near they come to the paper
Runs = list[tuple[Request, Record]]


def candidates(table: Reproduction, records: Mapping[str, Record]) -> dict[str, list[Runs]]:
    """The runs that are there for a table.

    Returns
    -------
    {column: list of `Runs`}
        First those that the table asks for, then what may stand in for them: where no preset is asked for, runs of
        the next of `PRESETS`; for one model of all categories, a model of several of them.
    """
    found = {}
    for column, requests in table.columns.items():
        changes = [
            {"preset": preset, **model}
            for preset in _presets(table, requests[0])
            for model in ({}, *_smaller_models(requests[0], records.values()))
        ]
        ways = [requests, *(_changed(requests, change, records.values()) for change in changes[1:])]
        found[column] = [[(r, records[r.hash]) for r in way if r.hash in records] for way in ways]
    return found


def nearest(table: Reproduction, found: Mapping[str, list[Runs]], categories: list[str | None]) -> dict[str, Runs]:
    """{column: runs} for the mean of some categories: of the `candidates` that are found, the first that have them all.

    Columns of one method are its variants, to be compared with each other. So they all take the same candidates: the
    first that fill most of these columns.
    """
    columns_of: dict[str, list[str]] = {}
    for column, (method, _) in table.table.columns.items():
        columns_of.setdefault(method, []).append(column)
    chosen = {}
    for columns in columns_of.values():
        together = zip(*(found[column] for column in columns), strict=True)
        best = max(together, key=lambda variants: sum(_complete(runs, categories) for runs in variants))
        for column, runs in zip(columns, best, strict=True):
            chosen[column] = [run for run in runs if set(tested(run[0])) & set(categories)]
    return chosen


def tested(request: Request) -> list[str | None]:
    """Categories that a run is tested on."""
    return data.get(request.dataset).members(request.category)


def _presets(table: Reproduction, request: Request) -> list[str]:
    """That of the request, and where it is the paper's by default, those nearest to it."""
    if table.preset or usual_preset(request.method, request.dataset) != PRESETS[0]:
        return [request.preset]
    return [preset for preset in PRESETS if preset in methods.get(request.method).PRESETS]


def _smaller_models(request: Request, records: Iterable[Record]) -> list[dict[str, Any]]:
    """Where one model of many categories is asked for: data set and category of models of fewer, the largest first."""
    parts = request.dataset.split(JOIN)
    same_method = [r for r in records if r["method"] == request.method and r["dataset"] in parts]
    sizes = {(r["dataset"], r["category"]): len(r.get("metrics_by_category", ())) for r in same_method}
    smaller = [model for model, n in sizes.items() if 1 < n < len(tested(request))]
    smaller.sort(key=lambda model: -sizes[model])
    return [{"dataset": dataset, "category": category} for dataset, category in smaller]


def _changed(requests: list[Request], change: dict[str, Any], records: Iterable[Record]) -> list[Request]:
    """Changed requests, without those that surely have no record: a thousand of them would take a second."""
    kind = requests[0].method, change["preset"]
    made = {(r["category"], r["seed"]) for r in records if (r["method"], r["preset"]) == kind}
    return [replace(r, **change) for r in requests if (change.get("category", r.category), r.seed) in made]


def _complete(runs: Runs, categories: list[str | None]) -> bool:
    """Whether some seed has all categories."""
    by_seed: dict[int, set[str | None]] = {}
    for request, _ in runs:
        by_seed.setdefault(request.seed, set()).update(tested(request))
    return any(set(categories) <= there for there in by_seed.values())
