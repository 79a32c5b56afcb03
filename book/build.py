"""Run every notebook with papermill, then build the HTML book from the executed copies.

    python book/build.py [JOBS=2] [PRESET=paper] [DATASET=mt] [DATA_ROOT=DIR] [SPLIT=] [CATEGORY=] [SEED=] [DEVICE=]

The committed notebooks are read, never written. Under book/_build come
    work/NAME-RUN/            where a notebook runs, and so its `out_dir = "runs"`; RUN hashes library and parameters
    executed/NAME-KEY.ipynb   a finished notebook; KEY hashes the notebook as well, and what is unchanged is not rerun
    source/                   the book's source, with the executed notebooks in place of the committed ones
    html/index.html           the pages
"""

import difflib
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError, strip_color
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "book" / "_build"
TYPES = dict(dataset=str, category=str, data_root=Path, split=str, preset=str, seed=int, device=str, jobs=int)


def options(arguments: list[str]) -> dict:
    """NAME=value arguments as {name: value}; empty values are left out, unknown names and wrong types refused."""
    chosen = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name.lower() not in TYPES:
            near = difflib.get_close_matches(name.lower(), TYPES, n=1)
            sys.exit(f"book: unknown parameter {name}" + (f"; did you mean {near[0].upper()}?" if near else ""))
        if value:
            try:
                chosen[name.lower()] = TYPES[name.lower()](value)
            except ValueError:
                sys.exit(f"book: {name}={value} is not a whole number")
    if "data_root" in chosen:  # notebooks run elsewhere, so a path must not depend on the folder
        chosen["data_root"] = str(chosen["data_root"].expanduser().resolve())
    return chosen


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def sources() -> list[bytes]:
    """What notebooks depend on beside themselves: the library, the committed records, the versions."""
    folders = [ROOT / name for name in ("vitad", "results", "experiments")]
    files = [ROOT / "constraints.txt", *(file for folder in folders for file in sorted(folder.rglob("*")))]
    kept = [f for f in files if f.is_file() and f.suffix != ".pyc"]
    return [str(f.relative_to(ROOT)).encode() + f.read_bytes() for f in kept]


def error_of(error: Exception) -> str:
    """A notebook's failure in a few lines: the cell, its failing line, the deepest line, the error."""
    if not isinstance(error, PapermillExecutionError):
        return f"{type(error).__name__}: {error}"
    lines = strip_color("\n".join(error.traceback)).splitlines()
    arrows = [line for line in lines if line.startswith("--") and "> " in line]
    return "\n    ".join([f"cell In [{error.exec_count}]", *dict.fromkeys(arrows[:1] + arrows[-1:]), lines[-1]])


def execute(notebook: Path, work: Path, done: Path, parameters: dict) -> str | None:
    """Run one notebook in the folder `work` and move it to `done` when it is whole; otherwise say what went wrong."""
    work.mkdir(parents=True, exist_ok=True)
    partial = work / notebook.name
    line = int(multiprocessing.current_process().name.rpartition("-")[2])  # SpawnProcess-1, -2: below the bar of all
    bar = dict(desc=f"  {notebook.stem}", position=line, leave=False, disable=None)
    try:
        declared = papermill.inspect_notebook(notebook)
        nb = papermill.execute_notebook(
            notebook,
            partial,
            {name: value for name, value in parameters.items() if name in declared},
            kernel_name="python3",
            cwd=work,
            progress_bar=bar,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # else every kernel warns of unencrypted sockets
        )
    except Exception as error:
        return f"{error_of(error)}\n    as far as it came: {partial}"
    for part in [nb, *nb.cells]:  # papermill's notes hold paths of this machine
        part.metadata.pop("papermill", None)
    nbformat.write(nb, partial)
    done.parent.mkdir(exist_ok=True)
    partial.replace(done)
    return None


def run_notebooks(parameters: dict, jobs: int | None) -> dict[Path, Path]:
    """Execute what changed, several at a time; {notebook: executed copy}. Exits with every failure named."""
    shared = [repr(sorted(parameters.items())).encode(), *sources()]
    executed, todo = {}, []
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        done = BUILD / "executed" / f"{notebook.stem}-{digest(notebook.read_bytes(), *shared)}.ipynb"
        executed[notebook] = done
        if not done.exists():
            todo.append((notebook, BUILD / "work" / f"{notebook.stem}-{digest(*shared)}", done, parameters))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = max(1, min(jobs or min(cores, 4), len(todo)))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // jobs))  # kernels inherit it
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, not a user's own
    chosen = ", ".join(f"{name}={value}" for name, value in parameters.items()) or "the notebooks' defaults"
    print(f"{len(executed)} notebooks, {len(todo)} to run, {jobs} at a time; parameters: {chosen}", flush=True)

    spawn, failures = multiprocessing.get_context("spawn"), []
    tqdm.set_lock(spawn.RLock())
    with (
        ProcessPoolExecutor(jobs, spawn, tqdm.set_lock, [tqdm.get_lock()]) as pool,
        tqdm(total=len(executed), initial=len(executed) - len(todo), desc="notebooks", unit="notebook") as bar,
    ):
        running = {pool.submit(execute, *job): job[0] for job in todo}
        for future in as_completed(running):
            if future.cancelled():
                continue
            if failure := future.result():
                failures.append(f"{running[future].relative_to(ROOT)}: {failure}")
                tqdm.write(f"FAILED {failures[-1]}")
                pool.shutdown(wait=False, cancel_futures=True)
            else:
                bar.update()
    if failures:
        sys.exit(f"book: stopped, {len(failures)} of {len(todo)} notebooks failed; those that finished are kept")
    return executed


def build_html(executed: dict[Path, Path]) -> None:
    """Jupyter Book over a copy of the source; warnings are errors, and every page of the contents must be there."""
    source, html = BUILD / "source", BUILD / "html"
    for folder in (source, html, BUILD / ".doctrees"):  # a page that is not built again does not warn again
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "book", source / "book", ignore=shutil.ignore_patterns("_build", "__pycache__"))
    shutil.copy(ROOT / "_config.yml", source)
    if (ROOT / "results").exists():
        shutil.copytree(ROOT / "results", source / "results")
    (source / "notebooks").mkdir()
    for notebook, done in executed.items():
        shutil.copy(done, source / "notebooks" / notebook.name)

    toc, tool = source / "book" / "_toc.yml", Path(sys.executable).with_name("jupyter-book")
    command = [tool, "build", source, "--toc", toc, "--path-output", ROOT / "book", "-W", "-n", "--keep-going", "-q"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{result.stdout}{result.stderr}book: Jupyter Book reported the problems above")

    contents = yaml.safe_load(toc.read_text())
    pages = [contents["root"], *(c["file"] for part in contents["parts"] for c in part["chapters"])]
    missing = [page for page in pages if not (html / f"{page}.html").exists()]
    if missing:
        sys.exit(f"book: {len(missing)} of {len(pages)} pages are missing: {', '.join(missing)}")
    print(f"book: {len(pages)} pages of {len(pages)} in the contents\n{html / 'index.html'}")


if __name__ == "__main__":
    parameters = options(sys.argv[1:])
    jobs = parameters.pop("jobs", None)
    build_html(run_notebooks(parameters, jobs))
