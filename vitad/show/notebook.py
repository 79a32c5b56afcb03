"""What notebooks call: the check of their parameters, the library's own code, the seeds of an ablation."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vitad.errors import UserError, unknown

if TYPE_CHECKING:
    from IPython.display import Code

    from vitad.runs import Request

PARAMETERS = (
    "dataset",
    "category",
    "data_root",
    "split",
    "preset",
    "seed",
    "device",
    "weights",
    "out_dir",
    "overrides",
)


class ParameterError(UserError):
    """A parameter of the notebook that is wrong. IPython prints it as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def begin(namespace: dict[str, Any], method: str | None = None) -> Request | None:
    """Check a notebook's parameters, and print versions, device and settings.

    papermill adds a cell with the values that were given to it, and accepts names that the notebook does not have. A
    misspelt name would leave the default in place, so it is an error here.

    Parameters
    ----------
    namespace
        `globals()` of the notebook.
    method
        Name of the method that the chapter runs. Chapters about several methods leave it out.

    Returns
    -------
    Request | None
        The run that the parameters ask for; `None` without a method.

    Raises
    ------
    ParameterError
        A parameter is misspelt or missing, or has a value that the method or the data set does not have.

    Examples
    --------
    The first code cell after the parameters::

        request = notebook.begin(globals(), "vitmem")
    """
    import pandas as pd

    from vitad import runs
    from vitad.settings import parse_overrides

    try:
        for name in _assigned(namespace.get("In", ())):
            if name not in PARAMETERS:
                raise unknown("parameter", name, PARAMETERS)
        missing = [name for name in PARAMETERS if name not in namespace]
        if missing:
            raise UserError(f"the parameters cell does not set {', '.join(missing)}. Add the missing lines.")
        pd.set_option("display.precision", 4)  # digits of numbers in tables
        values = {name: namespace[name] for name in PARAMETERS}
        values["overrides"] = parse_overrides(values["overrides"])
        runs.describe_environment(**values)
        if method is None:
            return None
        return runs.Request(method, **{name: value for name, value in values.items() if name != "out_dir"})
    except UserError as error:
        raise ParameterError(str(error)) from None


def source(*parts: type | Callable) -> Code:
    """The library's own code of classes and functions, without their docstrings: what a page shows is what runs."""
    from IPython.display import Code

    return Code("\n\n".join(map(_bare, parts)), language="python")


def _bare(part: type | Callable) -> str:
    """The source of a class or function, with neither docstrings nor indentation."""
    lines = textwrap.dedent(inspect.getsource(part)).splitlines()
    left_out = set()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            after = node.body[0].end_lineno or 0
            left_out |= set(range(node.body[0].lineno - 1, after))
            if after < len(lines) and not lines[after]:
                left_out.add(after)
    return "\n".join(line for k, line in enumerate(lines) if k not in left_out)


def ablation_seeds(first: int, preset: str | None) -> range:
    """Seeds of each row of an ablation: three, but one with the preset `smoke`, which only tests that a page runs.

    Prints which.
    """
    seeds = range(first, first + (1 if preset == "smoke" else 3))
    print("seeds of each row:", *seeds, "(preset smoke: a single one)" if len(seeds) == 1 else "")
    return seeds


def changing(request: Request, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The variants `{name: overrides}` that differ from `request`. Prints those that its preset has anyway."""
    kept = {name: changed for name, changed in variants.items() if request.override(**changed) != request}
    for name in [name for name in variants if name not in kept]:
        print(f"left out: {name}, since preset {request.preset} has it anyway")
    return kept


def _assigned(cells: list[str]) -> Iterator[str]:
    """Names that the parameters cell and papermill's cell assign.

    `cells` is IPython's `In`, whose last item is the cell that is running. What ran before an earlier call of `begin`
    does not count, so that a corrected notebook can be run again in the same kernel.
    """
    for cell in reversed(cells[:-1]):
        if "begin(globals()" in cell:
            return
        names = _literals(cell)
        if cell.startswith("# Parameters") or not set(PARAMETERS).isdisjoint(names):
            yield from names


def _literals(cell: str) -> list[str]:
    """Names of a cell that holds only lines `name = literal`; of any other cell none."""
    names = []
    try:
        for statement in ast.parse(cell).body:
            if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
                return []
            ast.literal_eval(statement.value)
            names.append(statement.targets[0].id)
    except (SyntaxError, ValueError):
        return []
    return names
