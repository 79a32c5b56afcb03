"""Waiting for an answer of the network."""

import threading
import time

import pytest

from vitad.network import answer_within


def test_an_answer_in_time_is_handed_through():
    assert answer_within(5, lambda: 7) == 7
    assert answer_within(5, lambda: None) is None


def test_an_error_of_the_function_is_raised_here():
    def refuse():
        raise ConnectionRefusedError("refused")

    def time_out():
        raise TimeoutError("timed out")

    with pytest.raises(ConnectionRefusedError, match="refused"):
        answer_within(5, refuse)
    with pytest.raises(TimeoutError, match="timed out"):
        answer_within(5, time_out)


def test_a_function_that_is_late_is_not_waited_for():
    stop, begun = threading.Event(), time.monotonic()
    with pytest.raises(TimeoutError, match="no answer"):
        answer_within(0.1, lambda: stop.wait(30))
    assert time.monotonic() - begun < 5
    stop.set()
