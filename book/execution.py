"""Execute notebooks, several at a time, each with a kernel and a folder of its own."""

import asyncio
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import nbformat
import papermill
from nbclient import NotebookClient
from papermill.exceptions import strip_color
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "book" / "_build"


def whole_number(text: str) -> int:
    """Type of an option, whose message a reader understands."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("is not a whole number") from None


def options(script: str, arguments: list[str], types: dict[str, Callable]) -> dict:
    """`NAME=value` arguments as `{name: value}`. Leaves out empty values, refuses unknown names and wrong types."""
    chosen = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name.lower() not in types:
            near = get_close_matches(name.lower(), types, n=1)
            sys.exit(f"{script}: unknown parameter {name}" + (f"; did you mean {near[0].upper()}?" if near else ""))
        if value:
            try:
                chosen[name.lower()] = types[name.lower()](value)
            except ValueError as error:
                sys.exit(f"{script}: {name}={value} {error}")
    return chosen


@dataclass
class Task:
    """One notebook to execute."""

    notebook: Path  # read, and written only where `done` is the same file
    folder: Path  # where its kernel runs
    done: Path  # the finished notebook
    parameters: dict = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)  # for the finished notebook
    finish: Callable = lambda nb: nb  # notebook -> notebook: the last change before it is written
    kernel: int | None = None  # process id


def execute_all(tasks: list[Task], jobs: int | None, total: int, go_on: bool, threads: int | None = None) -> list[str]:
    """Execute `tasks` and return the failures in words. The cores are shared among the kernels.

    After a failure no further notebook is started, unless `go_on`; those that run are finished in any case.
    `total` also counts the notebooks that did not have to run, for the progress bar. `threads` are those of a kernel,
    by default the cores that it has to itself.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tasks = sorted(tasks, key=lambda task: "ablation" not in task.notebook.stem)  # the longest first
    jobs = max(1, min(jobs or min(cores, 4), len(tasks)))
    os.environ["OMP_NUM_THREADS"] = str(threads or max(1, cores // jobs))  # kernels inherit it
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, not a user's own
    print(f"{total} notebooks, {len(tasks)} to run, {jobs} at a time", flush=True)
    failures = []
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=total, initial=total - len(tasks), desc="notebooks", unit="notebook") as bar,
    ):
        running = {pool.submit(execute, task): task.notebook for task in tasks}
        try:
            for future in as_completed(running):
                if future.cancelled():
                    continue
                try:
                    failure = future.result()
                except Exception as error:  # a file that is no notebook, for instance
                    failure = f"{type(error).__name__}: {error}"
                if failure:
                    failures.append(f"{running[future].relative_to(ROOT)}: {failure}")
                    tqdm.write(f"FAILED {failures[-1]}")
                    if not go_on:
                        pool.shutdown(wait=False, cancel_futures=True)
                else:
                    bar.update()
        except BaseException:  # Ctrl-C does not reach the kernels, and the pool would wait for them
            pool.shutdown(wait=False, cancel_futures=True)
            for task in tasks:
                if task.kernel:
                    with suppress(ProcessLookupError):
                        os.kill(task.kernel, signal.SIGKILL)
            raise
    return failures


def without_outputs(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as if it had never been run, with all that was drawn left out."""
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nb


def execute(task: Task) -> str | None:
    """Execute one notebook and move it to `task.done` when it is whole. Returns what went wrong, or `None`.

    A cell with the parameters is added when there are any, as papermill does; names that the notebook does not
    declare are left out.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    partial = task.folder / task.notebook.name
    nb = nbformat.read(task.notebook, 4)
    if task.parameters:
        declared = papermill.inspect_notebook(str(task.notebook))
        parameters = {name: value for name, value in task.parameters.items() if name in declared}
        nb = parameterize_notebook(load_notebook_node(str(task.notebook)), parameters, kernel_name="python3")
    nb = without_outputs(nb)  # an unfinished notebook shows no old ones
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    client = NotebookClient(
        nb,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(task.folder)}},
        extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # else every kernel warns of unencrypted sockets
    )
    with tqdm(total=len(code), desc=f"  {task.notebook.stem}", unit="cell", leave=False, disable=None) as bar:
        client.on_cell_executed = lambda **_: bar.update()
        client.on_notebook_start = lambda **_: setattr(task, "kernel", client.km.provisioner.pid)
        try:
            asyncio.run(client.async_execute())
        except Exception as error:
            nbformat.write(tidy(nb, task.folder), partial)
            return f"cell In [{client.code_cells_executed}]{describe(nb, error)}\n    as far as it came: {partial}"
        finally:
            task.kernel = None
    nb.metadata.update(task.metadata)
    nbformat.write(task.finish(tidy(nb, task.folder)), partial)
    task.done.parent.mkdir(exist_ok=True)
    replace(partial, task.done)
    return None


def describe(nb: nbformat.NotebookNode, error: Exception) -> str:
    """A failure in a few lines: the failing line of the cell, the deepest line, the error."""
    outputs = [output for cell in nb.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    if not outputs:  # the kernel died, for instance
        return f"\n    {type(error).__name__}: {error}"
    lines = strip_color("\n".join(outputs[-1].traceback)).splitlines()
    arrows = [line for line in lines if line.startswith("--") and "> " in line]
    return "".join(f"\n    {line}" for line in [*dict.fromkeys(arrows[:1] + arrows[-1:]), lines[-1]])


def tidy(nb: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Remove papermill's notes, timings, and folders of this machine from an executed notebook."""
    for part in [nb, *nb.cells]:
        for name in ("papermill", "execution"):
            part.metadata.pop(name, None)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.from_dict(without_paths(output, folder)) for output in cell.outputs]
    return nb


def without_paths(value, folder: Path):
    """`value` with each text in it freed from the folders of this machine."""
    if isinstance(value, dict):
        return {k: v if k.startswith("image/") else without_paths(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [without_paths(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(re.escape(tempfile.gettempdir()) + r"/ipykernel_\d+/\d+\.py", "<cell>", value)
    for path, short in ((folder, "."), (Path(sys.prefix), ".venv"), (ROOT, "."), (Path.home(), "~")):
        if len(path.parts) > 1:
            value = re.sub(rf"{re.escape(str(path))}(?![\w.-])", short, value)
    return value


def replace(new: Path, old: Path) -> None:
    """Put `new` in the place of `old` at once, also from another file system."""
    beside = old.with_name(f".{old.name}.tmp")
    shutil.copyfile(new, beside)
    beside.replace(old)
    new.unlink()
