"""What departs from a paper: one table for each method, made of its settings and the comments beside them."""

from __future__ import annotations

import inspect
import io
import re
import tokenize
from typing import Any

import pandas as pd

from vitad import methods
from vitad.runs import Request

COLUMNS = ["paper", "here", "departs", "comment in our code"]
OURS = re.compile(r"\bours\b")
SOURCE = re.compile(r"\b(sec\.|Eq\.|Table|Fig\.|abstract|code|fork|log|et al\.|AnomalyDINO|PatchCore)")


def departures(request: Request) -> pd.DataFrame:
    """The settings of a run that its paper leaves open, and those that differ from the preset `paper`.

    Returns
    -------
    DataFrame
        A row for each setting: its value in the preset `paper` and in this run, what departs, and the comment beside
        the setting in the code, which names the source.
    """
    module = methods.get(request.method)
    paper = Request(request.method, request.dataset, request.category, preset="paper").settings
    rows = {}
    for name, comment in comments(module.Settings).items():
        differs = request.settings[name] != paper[name]
        departs = ["ours"] * is_ours(comment) + ["changed here"] * differs
        if departs:
            values = (_shown(paper[name]), _shown(request.settings[name]))
            rows[name] = dict(zip(COLUMNS, (*values, ", ".join(departs), comment.replace("`", "")), strict=True))
    return pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)


def is_ours(comment: str) -> bool:
    """Whether a setting's comment says that it is ours, or names no source."""
    return bool(OURS.search(comment)) or not SOURCE.search(comment)


def comments(settings: type[Any]) -> dict[str, str]:
    """{setting: comment beside it} of a dataclass of settings, "" where there is none."""
    lines = inspect.getsource(settings).splitlines()
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(settings)).readline):
        if token.type == tokenize.COMMENT and not lines[token.start[0] - 1].lstrip().startswith("#"):
            beside[token.start[0]] = token.string.lstrip("# ")
    return {
        match[1]: beside.get(number, "")
        for number, line in enumerate(lines, 1)
        if (match := re.match(r"    (\w+): ", line))
    }


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
