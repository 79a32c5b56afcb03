"""The command line: `vitad run`, `vitad show`, `vitad compare`, `vitad table`, `vitad data show|download|verify`."""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from vitad.errors import UserError
from vitad.methods import METHODS


def main(argv=None):
    """Entry point; returns the exit status: 0, 2 after a user's mistake.

    1 where data differ from what is published, or where runs of a table failed.
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


def _run(args):
    from vitad.runs import run

    run(
        args.method,
        args.dataset,
        category=args.category,
        split=args.split,
        data_root=args.data_root,
        preset=args.preset,
        seed=args.seed,
        device=args.device,
        overrides=args.set,
        weights=args.weights,
        out=args.out,
        skip_bad=args.skip_bad,
        say=print,
    )
    _show(args)


def _show(args):
    from vitad.runs import read_record

    record = read_record(args.out)
    where = " ".join(str(record[k]) for k in ("dataset", "category", "split") if record[k])
    weights = record["weights"]["source"]
    e, git, counts, times = record["environment"], record["git"], record["counts"], record["timings"]
    commit = f"{git['commit'][:10]}{' with changes' if git['changed'] else ''}" if git else "unknown"
    rows = [
        ("method", f"{record['method']}: {record['paper']}"),
        (
            "data",
            f"{where}: {counts['train']} train, {counts['test_good']} good + {counts['test_defective']} defective",
        ),
        ("preset", f"{record['preset']}, seed {record['seed']}"),
        ("overrides", ", ".join(f"{k}={v}" for k, v in record["overrides"].items()) or "none"),
        ("weights", weights),
        *((name, "no value" if value is None else f"{value:.4f}") for name, value in record["metrics"].items()),
        *((category, _figures(metrics)) for category, metrics in record.get("metrics_by_category", {}).items()),
        ("time", f"train {times['train_s']:.1f} s, score {times['test_images_per_s']:.1f} images/s"),
        ("machine", f"{e['device']}, {e['device_name']}, {e['threads']} threads, {e['precision']}"),
        ("commit", commit),
        ("finished", record["finished"]),
        ("heatmaps", str(Path(args.out) / "heatmaps.png")),
    ]
    for name, value in rows:
        print(f"{name:<12} {value}")


def _figures(metrics):
    return ", ".join(f"{name} {'no value' if value is None else f'{value:.4f}'}" for name, value in metrics.items())


def _compare(args):
    from vitad.runs import compare

    compare(args.runs, args.out, args.data_root)
    print(f"sheet: {args.out}")


def _table(args):
    from vitad import reproduce

    options = {k: getattr(args, k) for k in ("dataset", "category", "split", "preset", "seeds", "weights")}
    options["overrides"] = args.set
    found = reproduce.existing(args.runs)
    if args.name is None:
        print(reproduce.contents(found, **options).to_string(index=False))
        print("vitad table NAME lists its runs; --dataset toy or mt asks for them on data of this book")
        return 0
    asked = reproduce.requests(args.name, **options)
    title = reproduce.title(args.name, asked)
    print(title)
    missing = [r for r in asked if r.digest not in found]
    wanted = reproduce.data_missing(asked[0].dataset, args.data_root) if missing else None
    if wanted and args.run:
        raise UserError(f"nothing can be run.\n{wanted}")
    if wanted:
        print(wanted)
    lines, left, basis = reproduce.overview(asked, found, args.device)
    print(f"runs: {len(asked)} needed, {len(asked) - len(missing)} there, {len(missing)} missing")
    print(lines.to_string(index=False))
    failed = {}
    if missing:
        time = f"about {reproduce.duration(left)}, by" if left else "unknown so far"
        print(f"time of the missing here: {time}\n  {basis}")
        if args.run:
            failed = reproduce.run_missing(asked, found, args.runs, args.data_root, args.device)
        else:
            root = args.data_root or ("DIR" if wanted else None)
            print("run them: the same command with --run; a single one:")
            print(" ", shlex.join(missing[0].command(Path(args.runs) / missing[0].folder, root)))
    frame = reproduce.cells(args.name, found, **options)
    print(f"\n{reproduce.text(frame, shutil.get_terminal_size((120, 24)).columns)}\n")
    for line in reproduce.remarks(args.name, frame):
        print(line)
    stem = Path(args.out or Path(args.runs) / "tables") / reproduce.stem(args.name, asked, args.category, args.set)
    reproduce.write(frame, args.name, title, stem)
    print(f"written: {stem}.csv, {stem}.md")
    if failed:
        print(f"vitad: {len(failed)} of {len(missing)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _data_show(args):
    from vitad import data, plots

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


def _data_download(args):
    from vitad.data.download import download

    download(args.name, args.root, args.url, args.accept_licence)


def _data_verify(args):
    from vitad.data.verify import verify

    report = verify(args.name, args.root)
    print(report)
    return int(bool(report.differences))


def _parser():
    parser = argparse.ArgumentParser(prog="vitad", description="Visual anomaly detection with Vision Transformers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train and evaluate one method on one data set")
    run.add_argument("method", metavar="METHOD", help=", ".join(METHODS))
    _data_options(run.add_argument, "--dataset")
    run.add_argument(
        "--preset", default="demo", help="smoke, demo (default), small or paper; anovit also legacy, mala small_dinov2"
    )
    run.add_argument("--seed", default=0, help="a whole number from 0 (default 0)")
    run.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    _settings_options(run)
    run.add_argument("--out", required=True, metavar="DIR", help="folder of the run; the same call again resumes it")
    run.set_defaults(action=_run)

    show = commands.add_parser("show", help="print the record of a run")
    show.add_argument("out", metavar="DIR")
    show.set_defaults(action=_show)

    sheet = commands.add_parser("compare", help="draw the same test images as several runs see them")
    sheet.add_argument("runs", nargs="+", metavar="DIR", help="folders of finished runs of one data set and split")
    sheet.add_argument("--data-root", metavar="DIR", help="folder of the data set")
    sheet.add_argument("--out", default="compare.png", metavar="FILE", help="default compare.png")
    sheet.set_defaults(action=_compare)

    table = commands.add_parser("table", help="run a table of a paper again, and set it beside what is printed")
    table.add_argument("name", nargs="?", metavar="NAME", help="such as yang2024-6; without it all tables are listed")
    table.add_argument("--dataset", help="run it on this data instead of the paper's: toy, mt, ...")
    table.add_argument(
        "--category",
        help="one, or several with commas, or 'each' for a model each; default: each of a published data set, that of "
        "the data set elsewhere; mala: all in one model",
    )
    table.add_argument("--split", help="mt: grouped (default), differnet or mala100 (default of mala2023-mt)")
    table.add_argument("--data-root", metavar="DIR", help="folder of the data set; of mvtec+visa, that with both")
    table.add_argument("--preset", help="default: that of the book's own records on toy and mt, elsewhere paper")
    table.add_argument("--seeds", default=3, metavar="N", help="number of seeds, from 0 (default 3)")
    _settings_options(table)
    table.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    table.add_argument("--runs", default="runs", metavar="DIR", help="folder of the runs (default runs)")
    table.add_argument("--run", action="store_true", help="run what is missing; the same call again goes on")
    table.add_argument("--out", metavar="DIR", help="where the table goes as CSV and Markdown (default RUNS/tables)")
    table.set_defaults(action=_table)

    data = commands.add_parser("data", help="look at data sets, fetch and check published ones").add_subparsers(
        required=True, metavar="COMMAND"
    )
    sheet = data.add_parser("show", help="count the images and draw a contact sheet with the masks outlined")
    _data_options(sheet.add_argument, "name")
    sheet.add_argument("--image-size", type=int, default=192, help="side in px (default 192)")
    sheet.add_argument("--out", default="contact-sheet.png", metavar="FILE", help="default contact-sheet.png")
    sheet.set_defaults(action=_data_show)
    fetch = data.add_parser("download", help="fetch a published data set and unpack it")
    fetch.add_argument("name", metavar="NAME", help="mvtec, btad, visa, ksdd2 or dtd (textures); mt is cloned")
    fetch.add_argument("--root", required=True, metavar="DIR", help="where it goes: the --data-root of later commands")
    fetch.add_argument(
        "--url", help="address of the archive instead of the published one, or file:// of one that is here"
    )
    fetch.add_argument(
        "--accept-licence", action="store_true", help="you have read the licence, which is printed first"
    )
    fetch.set_defaults(action=_data_download)
    verify = data.add_parser(
        "verify", help="read every file, compare with the published counts; status 1 if they differ"
    )
    verify.add_argument("name", metavar="NAME", help="mvtec, btad, visa, ksdd2, mt, dtd, folder or toy")
    verify.add_argument("--root", "--data-root", metavar="DIR", help="folder of the data set")
    verify.set_defaults(action=_data_verify)
    return parser


def _settings_options(command):
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings that differ from the preset",
    )
    command.add_argument(
        "--weights",
        default="auto",
        metavar="SOURCE",
        help="of the backbone: auto (default), random, or a safetensors file; mala also takes MAE's .pth",
    )


def _data_options(add, name):
    if name.startswith("-"):
        add(name, default="toy", help="toy (default), mt, mvtec, btad, visa, ksdd2 or folder; mvtec+visa for both")
    else:
        add(name, metavar="NAME", help="toy, mt, mvtec, btad, visa, ksdd2 or folder")
    add("--category", help="one of the folders of the data set, or all; toy: gear (default; mala: all), grain, weave")
    add("--split", help="mt: grouped (default), differnet or mala100")
    add("--data-root", metavar="DIR", help="folder of the data set; for mt also the variable VITAD_MT_ROOT")
    add("--skip-bad", action="store_true", help="leave unreadable images out and count them in the record")


if __name__ == "__main__":
    sys.exit(main())
