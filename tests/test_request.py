"""One identity: a request, its record, its folder and its committed records are told by one hash."""

import json
import shutil

import pytest

import vitad
from vitad import evidence, runs
from vitad.errors import UserError
from vitad.methods.rivals import patchknn
from vitad.metrics import METRICS
from vitad.papers.cells import cells
from vitad.papers.tables import TABLES, Reproduction
from vitad.runs import Request, by_hash, committed, committed_seeds, hash_of
from vitad.runs import record as record_module
from vitad.show import tables

RECORDS = committed()


def request_of(record, **fields):
    """The request that a record answers, from its own words."""
    words = ("method", "dataset", "category", "split", "preset", "seed", "overrides")
    return Request(**{k: record[k] for k in words} | fields)


@pytest.fixture
def read_once(monkeypatch):
    """The committed records are read from the disk once, since these tests ask for them hundreds of times."""
    monkeypatch.setattr(
        record_module, "committed", lambda dataset=None: [r for r in RECORDS if dataset in (None, r["dataset"])]
    )


def test_every_committed_record_is_found_by_the_words_that_made_it(read_once):
    for record in RECORDS:
        request = request_of(record)
        assert hash_of(record) == request.hash, record["folder"]
        assert runs.find_or_run(request, out="never-made") is record


def test_no_two_committed_records_are_of_the_same_run():
    assert len(RECORDS) >= 186
    assert len({hash_of(r) for r in RECORDS}) == len(RECORDS)


def test_every_table_on_data_of_the_book_is_filled_from_committed_records():
    records = by_hash()
    for dataset in ("toy", "mt"):
        table = Reproduction("yang2024-6", dataset)
        assert all(r.hash in records for r in table.requests)
        assert cells(table, records)["reproduced"].notna().all()
    assert set(TABLES) >= {"yang2024-3", "yang2024-4", "yang2024-5", "yang2024-6", "mala2023-1", "anovit-mvtec"}


def test_where_and_how_a_run_is_made_are_no_part_of_it(tmp_path):
    request = Request("patchknn")
    assert request == Request("patchknn", data_root=tmp_path, device="cpu", skip_bad=True)
    assert len({request, Request("patchknn", device="cpu")}) == 1
    assert request != Request("patchknn", seed=1) and request != "patchknn"


def test_words_and_values_ask_for_the_same_run():
    typed = Request("patchknn", overrides={"sigma": 2.0, "blocks": (4, 6)}, seed=1)
    assert typed == Request("patchknn", overrides=["sigma=2", "blocks=4,6"], seed="1")
    assert typed == Request("patchknn", seed=1).override(sigma=2).override(blocks=[4, 6])
    assert typed.override(sigma=3).overrides == {"sigma": 3.0, "blocks": [4, 6]}


def test_weights_count_by_their_contents(tmp_path):
    one, copy, other = (tmp_path / name for name in ("one.safetensors", "copy.safetensors", "other.safetensors"))
    one.write_bytes(b"first")
    shutil.copy(one, copy)
    other.write_bytes(b"second")
    by_file = {f.stem: Request("patchknn", weights=str(f)) for f in (one, copy, other)}
    assert by_file["one"] == by_file["copy"] != by_file["other"]
    assert by_file["one"] != Request("patchknn") != Request("patchknn", weights="random")
    record = {"weights": {"asked": "/elsewhere/one.safetensors", "sha256": by_file["one"].identity["weights"]}}
    described = {k: getattr(by_file["one"], k) for k in ("method", "dataset", "category", "split", "seed", "settings")}
    assert hash_of(described | record) == by_file["one"].hash


def test_a_misspelt_field_is_named():
    with pytest.raises(UserError, match="unknown field of a run 'presett'. Did you mean 'preset'"):
        vitad.run("patchknn", presett="smoke", out="never-made")


def test_a_user_without_categories_asks_for_the_same_run_with_none_and_with_all(tmp_path):
    assert Request("patchknn", "folder", category="all") == Request("patchknn", "folder")


def test_a_record_of_an_older_version_still_claims_its_folder(toy_root, tmp_path):
    """Before version 0.2 the data were known by the names and sizes of their files."""
    request = Request("patchknn", preset="smoke", data_root=toy_root, device="cpu")
    record = vitad.run(request, tmp_path / "run")
    assert record["protocol"]["data_files"] == "contents"
    found = vitad.data.find("toy", toy_root)
    older = record | {"protocol": record["protocol"] | {"data_sha256": found.names_sha256()}}
    del older["protocol"]["data_files"]
    (tmp_path / "run" / "record.json").write_text(json.dumps(older))
    assert vitad.run(request, tmp_path / "run") == older
    older["protocol"]["data_sha256"] = "0" * 64
    (tmp_path / "run" / "record.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match="holds another run: data is"):
        vitad.run(request, tmp_path / "run")


def test_a_method_that_trains_otherwise_is_another_run(toy_root, tmp_path, monkeypatch):
    """Records of the revision before do not count, and their folder is not taken."""
    request = Request("patchknn", preset="smoke", data_root=toy_root, device="cpu")
    record = vitad.run(request, tmp_path / "run")
    assert record["revision"] == 1 and hash_of(record) == request.hash
    older = {k: v for k, v in record.items() if k != "revision"}  # as before there were revisions
    assert hash_of(older) == request.hash
    monkeypatch.setattr(patchknn.Model, "revision", 2)
    after = Request("patchknn", preset="smoke", data_root=toy_root, device="cpu")
    assert hash_of(record) == hash_of(older) != after.hash
    with pytest.raises(UserError, match="holds another run: revision is 1 there and 2 here"):
        vitad.run(after, tmp_path / "run")
    assert hash_of(vitad.run(after, tmp_path / "again")) == after.hash


def test_a_changed_byte_is_other_data(toy_root, tmp_path):
    root = tmp_path / "mine"
    for part in ("train", "test"):
        shutil.copytree(toy_root / "weave" / part, root / part)
    request = Request("patchknn", "folder", preset="smoke", data_root=root, device="cpu")
    vitad.run(request, tmp_path / "run")
    image = root / "train" / "good" / "000.png"
    content = bytearray(image.read_bytes())
    content[-5] ^= 1  # in the checksum of the file's end: the size stays, and so does the picture
    image.write_bytes(content)
    with pytest.raises(UserError, match="holds another run: data is"):
        vitad.run(request, tmp_path / "run")


def test_a_metric_that_is_added_later_reads_as_not_measured(monkeypatch):
    """In every table and comparison of older records."""
    monkeypatch.setitem(METRICS, "f1_max", "F1")
    toy = committed_seeds(Request("vitmem"))
    variants = {"full": toy, "base": committed_seeds(Request("vitmem").override(memory=False, coord_att=False))}
    assert set(tables.over_seeds(RECORDS)["F1"]) == {"not measured"}
    assert set(tables.by_category(RECORDS)["F1"]) == {"not measured"}
    assert set(tables.ablation(variants)["F1"]) == {"not measured"}
    assert tables.by_run(toy)["F1"].isna().all()
    assert tables.expectation(Request("vitmem")).loc["F1", ""] == "never run so far"
    assert evidence.expected(toy, "f1_max")[2] == 0
    assert evidence.contrast(variants, {"full": 1, "base": -1}, "f1_max").n_seeds == 0
    frame = cells(Reproduction("yang2024-6", "toy"), by_hash())
    assert frame["reproduced"].notna().all()
