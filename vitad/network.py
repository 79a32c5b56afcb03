"""Waiting for the network, but not for long."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def answer_within(seconds: float, function: Callable[[], T]) -> T:
    """Result of `function()`, which asks the network for something, if it comes within `seconds`.

    The function runs in a thread, because the timeout of a socket does not cover the name lookup: a dead name server
    would hold up longer than any timeout. A function that is late goes on in the background, and its result is dropped.

    Raises
    ------
    TimeoutError
        "no answer", where the function has not returned in time.
    Exception
        Whatever the function raises.
    """
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(function())
        except Exception as e:
            answer.set_exception(e)

    Thread(target=ask, daemon=True).start()  # a daemon does not keep the process alive
    try:
        return answer.result(timeout=seconds)
    except TimeoutError:
        if answer.done():  # the function's own TimeoutError
            raise
        raise TimeoutError("no answer") from None
