"""A user's mistake, said in one line: what is wrong, with which value, and how to mend it."""

from difflib import get_close_matches


class UserError(ValueError):
    """Raised for bad input. The command line prints its message without a traceback."""


def unknown(what, value, choices):
    """`UserError` for a name that is not among `choices`, with the nearest one that is."""
    choices = [str(c) for c in choices]
    near = get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    shown = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
    return UserError(f"unknown {what} '{value}'.{hint} Choose from: {shown}.")
