"""Run the committed notebooks under other arithmetic, and name what does not hold there.

    python book/robust.py [SETTINGS="avx2 default"] [ONLY="anovit mala"] [JOBS=2]

With other instructions, or another number of threads, a training adds in another order, so it rounds differently and
ends elsewhere. What a page checks has to hold all the same: as in nbval, the cells marked `# NBVAL_CHECK_OUTPUT` must
print what is committed, and no cell may fail. The last setting is not arithmetic: `smoke` runs the notebooks with the
smallest preset on real images, where it only counts that no cell fails.
"""

import difflib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from execution import BUILD, Task, execute_all, options, whole_number

from notebooks import chosen
from vitad import data
from vitad.errors import UserError

SETTINGS: dict[str, dict[str, str]] = {  # variables of the kernels
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "default": {"ATEN_CPU_CAPABILITY": "default"},  # no vector instructions
    "onednn": {"DNNL_MAX_CPU_ISA": "AVX2"},
    "threads": {},  # two threads instead of one
    "smoke": {},
}
BOOKS = ({"dataset": "mvtec", "category": "bottle"}, {"dataset": "mt"})  # for `smoke`, the first that is there


def settings(text: str) -> list[str]:
    """Type of the option SETTINGS."""
    for name in text.split():
        if name not in SETTINGS:
            raise ValueError(f"names {name}, which is none of {', '.join(SETTINGS)}")
    return text.split()


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """`os.environ` without any variable of `SETTINGS` but these; kernels inherit it."""
    before = dict(os.environ)
    for name in {name for others in SETTINGS.values() for name in others}:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def smoke_book() -> dict | None:
    """Parameters of a book of real images; None where there are none."""
    for book in BOOKS:
        try:
            if data.get(book["dataset"]).locate().is_dir():
                return {"preset": "smoke", **book}
        except UserError:
            continue
    return None


def checked(nb: nbformat.NotebookNode) -> dict[int, list[str]]:
    """{index of a cell that nbval compares: lines of its output}, without progress bars, which show times."""
    found = {}
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and "# NBVAL_CHECK_OUTPUT" in cell.source:
            shown = [output for output in cell.outputs if output.get("name") != "stderr"]
            texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in shown]
            found[index] = "".join(texts).splitlines()
    return found


def differences(committed: Path, executed: Path) -> list[str]:
    """The checked cells that print something else than the committed notebook, line by line."""
    before, after = (nbformat.read(path, 4) for path in (committed, executed))
    lines, now = [], checked(after)
    for index, was in checked(before).items():
        if now[index] != was:
            changed = [line for line in difflib.ndiff(was, now[index]) if line[0] in "-+"]
            lines += [f"cell In [{before.cells[index].execution_count}] prints", *(f"    {line}" for line in changed)]
    return lines


def run(setting: str, notebooks: list[Path], jobs: int | None) -> dict[str, str] | None:
    """{notebook: ok, differs or fails} under a setting, which is None where it cannot be run here."""
    parameters = {}
    if setting == "smoke" and (parameters := smoke_book()) is None:
        print("smoke: skipped, since VITAD_DATA names no folder with mvtec/ or mt/")
        return None
    folder = BUILD / "robust" / setting
    shutil.rmtree(folder, ignore_errors=True)
    tasks = [Task(path, folder / path.stem, folder / path.name, parameters) for path in notebooks]
    print(f"\n{setting}: {' '.join(f'{k}={v}' for k, v in (parameters or SETTINGS[setting]).items())}", flush=True)
    start = time.monotonic()
    with environment(SETTINGS[setting]):
        execute_all(tasks, jobs, len(tasks), go_on=True, threads=2 if setting == "threads" else 1)
    print(f"{setting}: {(time.monotonic() - start) / 60:.1f} minutes")
    results = {}
    for task in tasks:
        changed = differences(task.notebook, task.done) if task.done.exists() and not parameters else []
        results[task.notebook.stem] = "differs" if changed else "ok" if task.done.exists() else "fails"
        if changed:
            print(f"{task.notebook.stem} differs under {setting}", *changed, sep="\n  ")
    return results


def main(arguments: list[str]) -> None:
    given = options("robust", arguments, {"settings": settings, "only": str, "jobs": whole_number})
    notebooks = chosen(given.get("only"), everything=True)
    results = {name: run(name, notebooks, given.get("jobs")) for name in given.get("settings", SETTINGS)}
    results = {name: found for name, found in results.items() if found is not None}
    width = max(len(path.stem) for path in notebooks)
    print("\n" + " " * width, *(f"{name:<8}" for name in results))
    for path in notebooks:
        print(f"{path.stem:<{width}}", *(f"{found[path.stem]:<8}" for found in results.values()))
    if any(word != "ok" for found in results.values() for word in found.values()):
        sys.exit("robust: not everything holds; the executed notebooks are in book/_build/robust")


if __name__ == "__main__":
    main(sys.argv[1:])
