"""Anomaly detectors: one file for each paper, and in `rivals` one for each system that the papers compare with.

A method is a file of one of these two folders. Its module defines

PAPER      who published it and where
CATEGORY   the category of the data that it is trained on by default; None: that of the data set
Settings   a frozen dataclass; its defaults are the paper's
PRESETS    {name: {field: value}}, named differences from the defaults
VARIANTS   {name: {field: value}}, the rows of the paper's ablation; {"full": {}} where there is none
Model      a `vitad.methods.base.Method`, made by `Model(settings, weights="auto")`
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from vitad.errors import unknown

_FOLDER = Path(__file__).parent
_PACKAGES = {"vitad.methods": _FOLDER, "vitad.methods.rivals": _FOLDER / "rivals"}
_MODULES = {
    file.name: f"{package}.{file.name}"
    for package, folder in _PACKAGES.items()
    for file in iter_modules([str(folder)])
    if not file.ispkg and file.name != "base"
}
METHODS = tuple(_MODULES)


class MethodModule(Protocol):
    """What the module of a method defines."""

    PAPER: str
    CATEGORY: str | None
    Settings: type[Any]
    PRESETS: dict[str, dict[str, Any]]
    VARIANTS: dict[str, dict[str, Any]]
    Model: type[Any]  # a subclass of Method: (settings, weights="auto")


def get(name: str) -> MethodModule:
    """Module of the method `name`.

    Raises
    ------
    UserError
        There is no such method; the message names the nearest.

    Examples
    --------
    >>> from vitad import methods
    >>> methods.get("anovit").PAPER
    'Lee & Kang 2022, AnoViT, IEEE Access 10, 46717-46724'
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return cast(MethodModule, import_module(_MODULES[name]))
