"""The tables of what departs from the papers."""

import inspect
from dataclasses import fields

import pytest

from vitad import methods
from vitad.runs import Request
from vitad.show.departures import comments, departures, is_ours


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_setting_is_the_sources_or_in_the_table(method):
    settings = methods.get(method).Settings
    beside = comments(settings)
    assert list(beside) == [field.name for field in fields(settings)]
    assert " = (\n" not in inspect.getsource(settings)  # the formatter wraps a long line, and its comment is lost
    table = departures(Request(method, preset="paper"))
    assert set(table["departs"]) <= {"ours"}  # nothing is changed from itself
    assert set(beside) - set(table.index) == {name for name, comment in beside.items() if not is_ours(comment)}


def test_the_table_shows_what_the_preset_changes_and_what_the_paper_leaves_open():
    table = departures(Request("vitmem", preset="demo", overrides={"items": 20}))
    assert table.loc["image_size"].tolist() == ["384", "96", "changed here", "sec. 4.2"]
    assert table.loc["items"].tolist() == ["100", "20", "ours, changed here", "ours: N is not given"]
    assert table.loc["lambda_ssim", "departs"] == "ours"
    assert "lambda_ent" not in table.index  # sec. 4.2, and unchanged


@pytest.mark.parametrize(
    ("comment", "ours"),
    [
        ("sec. 4.2, Adam", False),
        ("authors' code", False),
        ("abstract: a self-supervised ViT", False),
        ("ours: Eq. 14 lacks its minus sign", True),
        ("sec. IV-C, AdamW; ours: also in stage 2", True),
        ("share of the steps", True),  # no source
        ("", True),
    ],
)
def test_a_comment_without_a_source_is_ours(comment, ours):
    assert is_ours(comment) == ours


def test_a_run_of_one_category_has_a_table():
    table = departures(Request("vitmem", "mvtec", "bottle", preset="small"))
    assert table.loc["epochs", "departs"].endswith("changed here")
