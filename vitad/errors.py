"""Errors that a user can correct, each said in one line: what is wrong, with which value, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Raised for bad input. The command line prints its message without a traceback."""


def unknown(what: str, value: object, choices: Iterable[object]) -> UserError:
    """Make the error for a name that is not among `choices`; it suggests the nearest one.

    Examples
    --------
    >>> unknown("preset", "papr", ["smoke", "demo", "paper"])
    UserError("unknown preset 'papr'. Did you mean 'paper'? Choose from: smoke, demo, paper.")
    """
    names = [str(c) for c in choices]
    near = get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return UserError(f"unknown {what} '{value}'.{hint} Choose from: {shown}.")
