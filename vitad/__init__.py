"""Visual anomaly detection with Vision Transformers: the library behind a reproducible research book.

The front door. What a first notebook needs is here, and is imported when it is first used:

>>> import vitad
>>> gears = vitad.load("toy", category="gear", image_size=64)
>>> len(gears.train), len(gears.test)
(60, 52)
>>> vitad.Request("patchknn", preset="smoke").settings["image_size"]
64
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitad.data import load
    from vitad.errors import UserError
    from vitad.metrics import evaluate
    from vitad.runs import Request, find_or_run, load_model, read_maps, read_record, run

__version__ = "0.2.0"
_PLACES = {
    "load": "data",
    "evaluate": "metrics",
    "UserError": "errors",
    **dict.fromkeys(("Request", "find_or_run", "load_model", "read_maps", "read_record", "run"), "runs"),
}
__all__ = ["Request", "UserError", "evaluate", "find_or_run", "load", "load_model", "read_maps", "read_record", "run"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'vitad' has no attribute '{name}'")
    return getattr(import_module(f"vitad.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
