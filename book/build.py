"""Run every notebook with papermill's parameters, then build the HTML book from the executed copies.

    python book/build.py [JOBS=2] [PRESET=paper] [DATASET=mt] [DATA_ROOT=DIR] [SPLIT=] [CATEGORY=] [SEED=] [DEVICE=]
        [WEIGHTS=FILE] [OVERRIDES="batch_size=4"] [REPOSITORY=https://...] [SITE=https://...]

The committed notebooks are read, never written (book/notebooks.py writes them). Under book/_build come
    work/NAME-RUN/            where a notebook runs, and so its `out_dir = "runs"`; RUN hashes library and parameters
    executed/NAME-KEY.ipynb   a finished notebook; KEY hashes the notebook as well, and what is unchanged is not rerun
    source/                   the book's source, with the executed notebooks in place of the committed ones
    lab-KEY/                  what the lab computes with, see book/lab.py
    html/index.html           the pages

REPOSITORY and SITE stand in for those of book/facts.yml: where the source is, and where the pages will be.
"""

import hashlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from execution import BUILD, ROOT, Task, execute_all, options, whole_number, without_outputs
from facts import address, facts, installing_cell, published, repository
from lighten import lighten


def path(text: str) -> str:
    """A path that holds in every folder, because the notebooks run elsewhere."""
    return str(Path(text).expanduser().resolve())


def weights(text: str) -> str:
    return text if text in ("auto", "random") else path(text)


def overrides(text: str) -> dict[str, str]:
    """`key=value key=value` as a dict. A value with a space stands in quotes."""
    pairs = [pair.partition("=") for pair in shlex.split(text)]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("is not a list such as OVERRIDES='lr=1e-4 epochs=3'")
    return {key: value for key, _, value in pairs}


TYPES = {
    "dataset": str,
    "category": str,
    "data_root": path,
    "split": str,
    "preset": str,
    "seed": whole_number,
    "device": str,
    "weights": weights,
    "overrides": overrides,
    "jobs": whole_number,
    "repository": repository,
    "site": address,
}


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def sources() -> list[bytes]:
    """What notebooks depend on beside themselves: the library, the committed records, the versions."""
    folders = [ROOT / name for name in ("vitad", "results", "experiments")]
    files = [ROOT / "constraints.txt", *(file for folder in folders for file in sorted(folder.rglob("*")))]
    kept = [f for f in files if f.is_file() and f.suffix != ".pyc"]
    return [str(f.relative_to(ROOT)).encode() + f.read_bytes() for f in kept]


def run_notebooks(parameters: dict, jobs: int | None) -> dict[Path, Path]:
    """Execute what changed; {notebook: executed copy}. Exits with every failure named."""
    shared = [repr(sorted(parameters.items())).encode(), *sources()]
    executed, tasks = {}, []
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        done = BUILD / "executed" / f"{notebook.stem}-{digest(notebook.read_bytes(), *shared)}.ipynb"
        executed[notebook] = done
        if not done.exists():
            tasks.append(Task(notebook, BUILD / "work" / f"{notebook.stem}-{digest(*shared)}", done, parameters))
    chosen = ", ".join(f"{name}={value}" for name, value in parameters.items()) or "the notebooks' defaults"
    print(f"parameters: {chosen}")
    failures = execute_all(tasks, jobs, len(executed), go_on=False)
    if failures:
        sys.exit(f"book: stopped, {len(failures)} of {len(tasks)} notebooks failed; those that finished are kept")
    return executed


def pages_of(contents: dict) -> list[str]:
    """Names of all pages of a table of contents, in its order."""
    return [contents["root"], *(c["file"] for part in contents["parts"] for c in part["chapters"])]


def files_of_the_lab(parameters: dict) -> Path | None:
    """The folder with what the lab page computes with; None where the page is not in the contents."""
    if "book/lab" not in pages_of(yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())):
        return None
    import lab  # and with it torch

    runs = BUILD / "work"
    of_this_build = runs.glob(f"*-{digest(repr(sorted(parameters.items())).encode(), *sources())}")
    key = digest((ROOT / "book" / "lab.py").read_bytes(), *sources())
    return lab.make(sorted(of_this_build), runs / f"lab-{key}", BUILD / f"lab-{key}")


def build_html(executed: dict[Path, Path], about: dict, lab: Path | None = None) -> None:
    """Jupyter Book over a copy of the source; warnings are errors, and every page of the contents must be there.

    `lab` is the folder that `files_of_the_lab` gives.
    """
    source, html = BUILD / "source", BUILD / "html"
    for folder in (source, html, BUILD / ".doctrees"):  # a page that is not built again does not warn again
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "book", source / "book", ignore=shutil.ignore_patterns("_build", "__pycache__"))
    config = published(yaml.safe_load((ROOT / "_config.yml").read_text()), about)
    (source / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
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

    pages = pages_of(yaml.safe_load(toc.read_text()))
    missing = [page for page in pages if not (html / f"{page}.html").exists()]
    if missing:
        sys.exit(f"book: {len(missing)} of {len(pages)} pages are missing: {', '.join(missing)}")
    lighten(html)
    if lab:
        shutil.copytree(lab, html / "_static" / "lab")
    (html / ".nojekyll").touch()  # or GitHub Pages would leave out folders such as _static
    if about["site"]:
        (html / "robots.txt").write_text(f"User-agent: *\nAllow: /\nSitemap: {about['site']}/sitemap.xml\n")
    if about["repository"]:
        write_for_colab(executed, about, html / "colab")
    print(f"book: {len(pages)} pages of {len(pages)} in the contents\n{html / 'index.html'}")


def write_for_colab(executed: dict[Path, Path], about: dict, folder: Path) -> None:
    """The notebooks with a first cell that installs the library, and without outputs."""
    folder.mkdir()
    for notebook, done in executed.items():
        nb = without_outputs(nbformat.read(done, 4))
        nb.cells.insert(0, nbformat.v4.new_code_cell(installing_cell(about), id="install"))
        nbformat.write(nb, folder / notebook.name)


if __name__ == "__main__":
    parameters = options("book", sys.argv[1:], TYPES)
    jobs = parameters.pop("jobs", None)
    about = facts(**{name: parameters.pop(name) for name in ("repository", "site") if name in parameters})
    executed = run_notebooks(parameters, jobs)
    build_html(executed, about, files_of_the_lab(parameters))
