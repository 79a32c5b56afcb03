"""The command line. Its help texts are built from the registries of methods, data sets and tables."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vitad.errors import UserError
from vitad.methods import METHODS

_MODELS = (
    "one, or several with commas, or 'each' for a model each; default: each of a published data set, that of the data "
    "set elsewhere; mala: all in one model"
)

SHOWN = 20  # predictions in the terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status.

    0, or 1 where data differ from what is published, runs of a table failed or an image could not be read; 2 after a
    user's mistake; 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        return args.action(args) or 0
    except UserError as e:
        print(f"vitad: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vitad: interrupted. The same command goes on from there.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


def _options(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Those of the arguments that are fields of a dataclass."""
    given = vars(args) | {"overrides": getattr(args, "set", None)}
    return {f.name: given[f.name] for f in fields(kind) if f.name in given}


def _run(args: argparse.Namespace) -> None:
    from vitad.processes import is_first
    from vitad.runs import Request, run

    run(Request(**_options(args, Request)), args.out, say=print)
    if is_first():
        _show(args)


def _show(args: argparse.Namespace) -> None:
    from vitad.runs import read_record

    record = read_record(args.out)
    where = " ".join(str(record[k]) for k in ("dataset", "category", "split") if record[k])
    e, git, counts, times = record["environment"], record["git"], record["counts"], record["timings"]
    commit = f"{git['commit'][:10]}{' with changes' if git['changed'] else ''}" if git else "unknown"
    machine = [e["device"], e["device_name"], f"{e['threads']} threads", e["precision"], *e.get("switches", [])]
    if "processes" in e:
        machine.append(f"{e['processes']} processes")
    test = f"{counts['test_good']} good + {counts['test_defective']} defective"
    rows = [
        ("method", f"{record['method']}: {record['paper']}"),
        ("data", f"{where}: {counts['train']} train, {test}"),
        ("preset", f"{record['preset']}, seed {record['seed']}"),
        ("overrides", ", ".join(f"{k}={v}" for k, v in record["overrides"].items()) or "none"),
        ("weights", record["weights"]["source"]),
        *((name, _number(value)) for name, value in record["metrics"].items()),
        *((category, _numbers(metrics)) for category, metrics in record.get("metrics_by_category", {}).items()),
        ("time", f"train {times['train_s']:.1f} s, score {times['test_images_per_s']:.1f} images/s"),
        ("machine", ", ".join(machine)),
        ("commit", commit),
        ("finished", record["finished"]),
        ("heatmaps", str(Path(args.out) / "heatmaps.png")),
    ]
    for name, value in rows:
        print(f"{name:<12} {value}")


def _number(value: float | None) -> str:
    return "no value" if value is None else f"{value:.4f}"


def _numbers(metrics: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in metrics.items())


def _compare(args: argparse.Namespace) -> None:
    from vitad.show.compare import compare

    compare(args.runs, args.out, args.data_root)
    print(f"sheet: {args.out}")


def _predict(args: argparse.Namespace) -> int:
    from vitad.predict import predict

    found = predict(args.run, args.images, args.out, args.false_alarms, args.threshold, args.good or (), args.device)
    for path in found.unreadable:
        print(f"vitad: not readable, passed over: {path}", file=sys.stderr)
    for image in found.images[:SHOWN]:
        print(f"{'defective' if image.defective else 'good':<9} {image.score:10.4g}  {image.path}")
    if (more := len(found.images) - SHOWN) > 0:
        print(f"... {more} more, with lower scores")
    print(f"{sum(image.defective for image in found.images)} of {len(found.images)} images are called defective")
    print(f"threshold: {found.threshold}")
    print(f"report: {Path(args.out) / 'report.html'}")
    return 1 if found.unreadable else 0


def _export(args: argparse.Namespace) -> None:
    from vitad.export import EXAMPLE, to_onnx

    out = to_onnx(args.run, args.out or f"{Path(args.run).resolve().name}.onnx", args.false_alarms, args.good or ())
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, the same maps and scores as torch")
    print(f"To use it with onnxruntime, numpy and pillow alone:\n\n{EXAMPLE}", end="")


def _table(args: argparse.Namespace) -> int:
    from vitad import data, runs
    from vitad.papers import cells, estimates, layout, tables

    options = _options(args, tables.Reproduction)
    records = runs.by_hash(args.runs)
    if args.name is None:
        del options["name"]
        print(tables.contents(records, **options).to_string(index=False))
        print("vitad table NAME lists its runs; where they are missing, cells show the nearest preset that is there")
        print("--dataset toy or mt asks for them on data of this book")
        return 0
    table = tables.Reproduction(**options)
    print(table.title)
    missing = [r for r in table.requests if r.hash not in records]
    first = table.requests[0]
    where_to_get = data.get(first.dataset).where_to_get(args.data_root) if missing else None
    if where_to_get and args.run:
        raise UserError(f"nothing can be run.\n{where_to_get}")
    if where_to_get:
        print(where_to_get)
    lines, left, basis = estimates.overview(table.requests, records)
    n = len(table.requests)
    print(f"runs: {n} needed, {n - len(missing)} there, {len(missing)} missing")
    print(lines.to_string(index=False))
    failed: Mapping[str, str] = {}
    if missing:
        time = f"about {estimates.duration(left)}, by" if left else "unknown so far"
        print(f"time of the missing here: {time}\n  {basis}")
        if args.run:
            failed = tables.run_missing(table.requests, records, args.runs)
        else:
            example = missing[0]
            if where_to_get and args.data_root is None:
                example = type(example).make(example, data_root="DIR")
            print("run them: the same command with --run; a single one:")
            print(" ", shlex.join(example.command(Path(args.runs) / example.folder)))
    frame = cells.cells(table, records)
    print(f"\n{layout.for_terminal(frame, shutil.get_terminal_size((120, 24)).columns)}\n")
    for line in layout.remarks(table, frame):
        print(line)
    stem = layout.write(table, frame, args.out or Path(args.runs) / "tables")
    print(f"written: {stem}.csv, {stem}.md")
    if failed:
        print(f"vitad: {len(failed)} of {len(missing)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _plan(args: argparse.Namespace) -> None:
    from vitad.papers.tables import models_of
    from vitad.plan import as_text, plan
    from vitad.runs import Request

    options = _options(args, Request)
    models = models_of(args.method, args.dataset, options.pop("category"))
    print(as_text([plan(Request(**options, category=category)) for category in models]))


def _claims(args: argparse.Namespace) -> int:
    from vitad.claims import of_the_book

    found = of_the_book()
    for c in found:
        print(f"{'holds' if c.evidence.holds else 'FALLS'}  {c.chapter}: {c.sentence}\n       {c.evidence.numbers}")
    fallen = [c for c in found if not c.evidence.holds]
    print(f"{len(found) - len(fallen)} of {len(found)} claims hold")
    return int(bool(fallen))


def _review(args: argparse.Namespace) -> int:
    from vitad.metrics import METRICS
    from vitad.review import review

    found = review(args.minutes, args.out, args.draw)
    return int(any(repeated.inside(metric) is False for repeated in found for metric in METRICS))


def _data_show(args: argparse.Namespace) -> None:
    from vitad import data
    from vitad.show import plots

    split = data.load(
        args.name, args.data_root, args.category, args.split, image_size=args.image_size, skip_bad=args.skip_bad
    )
    print(data.describe(split))
    test = split.test
    chosen = plots.examples(test.labels, test.defects, per_kind=8, good=8)
    titles = [test.defects[i] for i in chosen]
    fig = plots.contact_sheet(test.batch(chosen)["image"].numpy(), test.masks[chosen], titles)
    plots.save(fig, args.out, dpi=150)
    print(f"contact sheet: {args.out}")


def _data_download(args: argparse.Namespace) -> None:
    from vitad.data.download import download

    download(args.name, args.root, args.url, args.accept_licence)


def _data_verify(args: argparse.Namespace) -> int:
    from vitad.data.verify import verify

    report = verify(args.name, args.root, args.category)
    print(report)
    return int(bool(report.differences))


def _list(args: argparse.Namespace) -> None:
    from vitad import data, methods
    from vitad.papers.tables import TABLES

    print("methods")
    for name in METHODS:
        module = methods.get(name)
        print(f"  {name:<10} {module.PAPER}\n{'':<13}presets: {', '.join(module.PRESETS)}")
    print("data sets")
    for name, dataset in data.DATASETS.items():
        licence = f"\n{'':<13}licence: {dataset.source.licence}" if dataset.source else ""
        splits = f"\n{'':<13}splits: {', '.join(dataset.splits)}" if dataset.splits else ""
        print(f"  {name:<10} {dataset.title}{splits}{licence}")
    print("tables")
    for name, table in TABLES.items():
        print(f"  {name:<14} {table.place}, data {table.dataset}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitad", description="Visual anomaly detection with Vision Transformers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_runs(commands)
    _add_table(commands)
    _add_review(commands)
    _add_data(commands.add_parser("data", help="look at data sets, fetch and check published ones"))
    return parser


def _add_alarms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--false-alarms",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of good images that may be called defective (default %(default)s)",
    )
    parser.add_argument(
        "--good",
        nargs="+",
        metavar="IMAGES",
        help="good ones that were not trained on, for the threshold; default: those of the run's test set",
    )


def _add_runs(commands: Any) -> None:
    """`list`, `plan`, `run`, `show` and `compare`."""
    overview = commands.add_parser("list", help="list methods with their presets, data sets and tables")
    overview.set_defaults(action=_list)

    plan = commands.add_parser("plan", help="count what a run takes: memory, and time on named GPUs; computes nothing")
    plan.add_argument("method", metavar="METHOD", help=", ".join(METHODS))
    plan.add_argument("--dataset", default="mvtec", help=f"{_names()}; default mvtec. Two together: mvtec+visa")
    plan.add_argument("--category", help=_MODELS)
    plan.add_argument("--split", help=_splits())
    plan.add_argument("--preset", default="paper", help="paper (default), small, demo, ...: see vitad list")
    _set_option(plan)
    plan.set_defaults(action=_plan)

    run = commands.add_parser("run", help="train and evaluate one method on one data set")
    run.add_argument("method", metavar="METHOD", help=", ".join(METHODS))
    run.add_argument("--dataset", default="toy", help=f"{_names()}; default toy. Two together: mvtec+visa")
    _data_options(run)
    run.add_argument("--preset", default="demo", help="smoke, demo (default), small, paper, ...: see vitad list")
    run.add_argument("--seed", default=0, help="a whole number from 0 (default 0)")
    run.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    run.add_argument("--tf32", action="store_true", help="float32 products on a GPU in TF32: faster, less precise")
    run.add_argument("--compile", action="store_true", help="torch.compile for the blocks of transformers")
    run.add_argument(
        "--deterministic", action="store_true", help="only operations that repeat to the bit, on a GPU as well"
    )
    _settings_options(run)
    run.add_argument("--out", required=True, metavar="DIR", help="folder of the run; the same call again resumes it")
    run.set_defaults(action=_run)

    show = commands.add_parser("show", help="print the record of a run")
    show.add_argument("out", metavar="DIR")
    show.set_defaults(action=_show)

    new = commands.add_parser("predict", help="score new images with a finished run; write verdicts and a report")
    new.add_argument("run", metavar="RUN", help="folder of the run")
    new.add_argument("images", nargs="+", metavar="IMAGES", help="files, or folders that hold some")
    _add_alarms(new)
    new.add_argument("--threshold", type=float, metavar="SCORE", help="instead of the one for that share")
    new.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    new.add_argument("--out", default="predictions", metavar="DIR", help="what is written (default %(default)s)")
    new.set_defaults(action=_predict)
    file = commands.add_parser("export", help="write the model of a finished run as a file that needs no torch")
    file.add_argument("run", metavar="RUN", help="folder of the run")
    file.add_argument("--to", choices=("onnx",), default="onnx", help="format (default %(default)s)")
    _add_alarms(file)
    file.add_argument("--out", metavar="FILE", help="default: named after the run's folder")
    file.set_defaults(action=_export)
    sheet = commands.add_parser("compare", help="draw the same test images as several runs see them")
    sheet.add_argument("runs", nargs="+", metavar="DIR", help="folders of finished runs of one data set and split")
    sheet.add_argument("--data-root", metavar="DIR", help="folder of the data set")
    sheet.add_argument("--out", default="compare.png", metavar="FILE", help="default compare.png")
    sheet.set_defaults(action=_compare)


def _add_table(commands: Any) -> None:
    table = commands.add_parser("table", help="run a table of a paper again, and set it beside what is printed")
    table.add_argument("name", nargs="?", metavar="NAME", help="such as yang2024-6; without it all tables are listed")
    table.add_argument("--dataset", help=f"run it on this data instead of the paper's: {_names()}")
    table.add_argument(
        "--category",
        help=_MODELS,
    )
    table.add_argument("--split", help=_splits())
    table.add_argument("--data-root", metavar="DIR", help="folder of the data set; of mvtec+visa, that with both")
    table.add_argument(
        "--preset",
        help="default: that of the book's own records on toy and mt, elsewhere paper; where runs of paper are missing, "
        "cells then show those of the nearest preset that is there: near, small, small_dinov2",
    )
    table.add_argument("--seeds", default=3, metavar="N", help="number of seeds, from 0 (default 3)")
    _settings_options(table)
    table.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    table.add_argument("--runs", default="runs", metavar="DIR", help="folder of the runs (default runs)")
    table.add_argument("--run", action="store_true", help="run what is missing; the same call again goes on")
    table.add_argument("--out", metavar="DIR", help="where the table goes as CSV and Markdown (default RUNS/tables)")
    table.set_defaults(action=_table)


def _add_review(commands: Any) -> None:
    """`claims` and `review`."""
    listed = commands.add_parser(
        "claims", help="check every claim of the book against the records; status 1 if one falls"
    )
    listed.set_defaults(action=_claims)

    again = commands.add_parser("review", help="run committed records again, drawn at random, and compare")
    again.add_argument("--minutes", type=float, default=20, help="time for the runs (default 20)")
    again.add_argument("--draw", type=int, metavar="N", help="repeat the draw of an earlier review")
    again.add_argument("--out", default="runs/review", metavar="DIR", help="folder of the runs and of review.html")
    again.set_defaults(action=_review)


def _add_data(parser: argparse.ArgumentParser) -> None:
    from vitad.data import DATASETS, TEXTURE_SETS

    published = {name: d for name, d in (DATASETS | TEXTURE_SETS).items() if d.source}
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sheet = commands.add_parser("show", help="count the images and draw a contact sheet with the masks outlined")
    sheet.add_argument("name", metavar="NAME", help=_names())
    _data_options(sheet)
    sheet.add_argument("--image-size", type=int, default=192, help="side in px (default 192)")
    sheet.add_argument("--out", default="contact-sheet.png", metavar="FILE", help="default contact-sheet.png")
    sheet.set_defaults(action=_data_show)

    fetch = commands.add_parser("download", help="fetch a published data set and unpack it")
    archives = ", ".join(name for name, d in published.items() if d.source and d.source.url)
    cloned = ", ".join(name for name, d in published.items() if d.source and not d.source.url)
    fetch.add_argument("name", metavar="NAME", help=f"{archives}; {cloned} is cloned")
    fetch.add_argument("--root", required=True, metavar="DIR", help="where it goes: the --data-root of later commands")
    fetch.add_argument(
        "--url", help="address of the archive instead of the published one, or file:// of one that is here"
    )
    fetch.add_argument(
        "--accept-licence", action="store_true", help="you have read the licence, which is printed first"
    )
    fetch.set_defaults(action=_data_download)

    verify = commands.add_parser(
        "verify", help="read every file, compare with the published counts; status 1 if they differ"
    )
    verify.add_argument("name", metavar="NAME", help=", ".join(DATASETS | TEXTURE_SETS))
    verify.add_argument("--root", "--data-root", metavar="DIR", help="folder of the data set")
    verify.add_argument("--category", help="only this one")
    verify.set_defaults(action=_data_verify)


def _set_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings that differ from the preset",
    )


def _settings_options(command: argparse.ArgumentParser) -> None:
    _set_option(command)
    command.add_argument(
        "--weights",
        default="auto",
        metavar="SOURCE",
        help="of the backbone: auto (default), random, or a safetensors file; mala also takes MAE's .pth",
    )


def _data_options(command: argparse.ArgumentParser) -> None:
    from vitad.data import DATASETS

    defaults = ", ".join(f"{n}: {d.default_category}" for n, d in DATASETS.items() if d.default_category)
    variables = "".join(f", or for {n} {d.variable}" for n, d in DATASETS.items() if d.variable)
    command.add_argument(
        "--category",
        help=f"a folder of the data set, several joined with + for one model, or all; default of {defaults}",
    )
    command.add_argument("--split", help=_splits())
    command.add_argument(
        "--data-root",
        metavar="DIR",
        help=f"folder of the data set; default: its folder in that of the variable VITAD_DATA{variables}",
    )
    command.add_argument(
        "--skip-bad", action="store_true", help="leave unreadable images out and count them in the record"
    )


def _names() -> str:
    from vitad.data import DATASETS

    return ", ".join(DATASETS)


def _splits() -> str:
    from vitad.data import DATASETS

    return "; ".join(f"{n}: {', '.join(d.splits)} (default {d.splits[0]})" for n, d in DATASETS.items() if d.splits)


if __name__ == "__main__":
    sys.exit(main())
