"""The reviewer's command: committed records are run again and compared."""

import pytest

from vitad import claims, review, runs
from vitad.cli import main
from vitad.errors import UserError
from vitad.runs.request import hash_of

SECONDS = 10.0


@pytest.fixture(scope="module")
def book():
    """(all committed records, all claims of the book), which take seconds."""
    return runs.committed(), claims.of_the_book()


@pytest.fixture
def instant(monkeypatch, book):
    """Runs that take no time: the committed record again, with its image AUROC moved by `instant.moved`."""

    class Instant:
        moved, made = 0.0, []

    state = Instant()
    state.made = []

    def run(request, out):
        state.made.append(request)
        (record,) = [r for r in runs.committed_seeds(request, book[0]) if r["seed"] == request.seed]
        return record | {"metrics": record["metrics"] | {"image_auroc": record["metrics"]["image_auroc"] - state.moved}}

    monkeypatch.setattr(review.runs, "run", run)
    monkeypatch.setattr(review, "estimate", lambda request, records: (SECONDS, "made up"))
    monkeypatch.setattr(review, "_possible", lambda: [r for r in book[0] if r["dataset"] == "toy"][:12])
    monkeypatch.setattr(review.claims, "of_the_book", lambda: book[1])
    return state


def test_records_within_their_tolerance_pass(instant, tmp_path):
    found = review.review(5, tmp_path, seed=3, say=lambda line: None)
    assert len(found) == 12 and all(r.inside("image_auroc") for r in found)
    assert [hash_of(r.again) for r in found] == [r.hash for r in instant.made]
    page = (tmp_path / "review.html").read_text()
    assert "draw 3" in page and "48 of 48 metrics lie within" in page and "OUTSIDE" not in page


def test_the_draw_is_random_and_can_be_repeated(instant, tmp_path):
    orders = []
    for seed in (3, 3, 4):
        instant.made.clear()
        review.review(5, tmp_path, seed=seed, say=lambda line: None)
        orders.append([r.name for r in instant.made])
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def test_a_record_outside_is_named_with_the_claims_that_rest_on_it(instant, tmp_path, monkeypatch, capsys):
    instant.moved = 3.0
    rests_on = frozenset(hash_of(r) for r in runs.committed("toy")[:1])
    made = claims.Claim("anovit", "It finds <teeth>.", claims.Evidence(True, "0.9", rests_on))
    monkeypatch.setattr(review.claims, "of_the_book", lambda: [made])
    assert main(["review", "--minutes", "5", "--draw", "3", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count("OUTSIDE OF the tolerance") == 12 and said.count("rests on it: anovit: It finds <teeth>.") == 1
    page = (tmp_path / "review.html").read_text()
    assert "It finds &lt;teeth&gt;." in page and "36 of 48 metrics lie within" in page


def test_only_what_fits_the_time_is_run(instant, tmp_path):
    with pytest.raises(UserError, match="no committed record can be run here in 0.1 minutes"):
        review.review(0.1, tmp_path, say=lambda line: None)
    assert not instant.made
