"""Records of runs: `record.json` as it is read and written, and which records are of the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import vitad
from vitad.errors import UserError
from vitad.files import atomic_write
from vitad.runs.request import Request, hash_of, identity

Record = dict[str, Any]  # what `record.json` holds; `folder` is added where it was read together with others
PROCESSORS = "processors"  # folder in `results/` of the book's runs once more, under other arithmetic


def read_record(folder: str | Path) -> Record:
    """`record.json` of a run's folder, as a dict."""
    path = Path(folder) / "record.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no record.json: not a finished run. Give the --out folder of one.")
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is not readable ({e}). Run it again into another folder.") from e


def write_record(record: Record, folder: Path) -> None:
    """Write `record.json`, whole or not at all."""
    with atomic_write(folder / "record.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def read_records(folder: str | Path) -> list[Record]:
    """All records below a folder, sorted by path; each also holds its `folder`."""
    paths = sorted(Path(folder).rglob("record.json"))
    return [read_record(p.parent) | {"folder": p.parent} for p in paths]


def results_folder() -> Path:
    """`results/` of the source tree; it does not exist where vitad was installed without it."""
    return Path(vitad.__file__).parent.parent / "results"


def experiment(name: str) -> list[dict[str, Any]]:
    """The rows of `experiments/<name>.json` of the source tree. Raises `UserError` where there is no such file."""
    path = results_folder().parent / "experiments" / f"{name}.json"
    if not path.is_file():
        raise UserError(f"{path} is not there. Run experiments/{name}.py, or start in the source tree of vitad.")
    return json.loads(path.read_text())


def committed(dataset: str | None = None, results: Path | None = None) -> list[Record]:
    """Records that come with the book, below `results/` of the source tree or another folder of that kind.

    Those of `on_other_processors` do not count: they repeat runs that are there.
    """
    results = results or results_folder()
    records = [r for r in read_records(results) if PROCESSORS not in r["folder"].relative_to(results).parts]
    return [r for r in records if dataset in (None, r["dataset"])]


def committed_seeds(request: Request, records: list[Record] | None = None) -> list[Record]:
    """Committed records of this run with any seed, sorted by seed. The data need not be there.

    Who asks for many runs reads `committed()` once, and gives it as `records`.
    """
    return _any_seed(request, committed() if records is None else records)


def on_other_processors(request: Request) -> list[Record]:
    """Committed records of this run with any seed, made again under other arithmetic; `make processors` writes them.

    Their `environment` names the processor and its instructions (`device_name`, `cpu_capability`).
    """
    return _any_seed(request, read_records(results_folder() / PROCESSORS))


def _any_seed(request: Request, records: list[Record]) -> list[Record]:
    """Those of `records` that are of this run with any seed, sorted by seed."""
    wanted = request.identity | {"seed": None}
    told_at_once = ("method", "dataset", "split")  # before the settings, which take longer
    alike = [r for r in records if all(r[name] == wanted[name] for name in told_at_once)]
    same = [r for r in alike if identity(r) | {"seed": None} == wanted]
    return sorted(same, key=lambda r: r["seed"])


def by_hash(folder: str | Path | None = None) -> dict[str, Record]:
    """{hash: record} of the runs at hand: those of the book, then those below `folder`, which replace them.

    JSON files of the same name that are no records are passed over.
    """
    more = read_records(folder) if folder is not None and Path(folder).is_dir() else []
    return {hash_of(r): r for r in [*committed(), *more] if "asked" in r.get("weights", {})}
