"""book/execution.py and book/notebooks.py: what makes a notebook lag, and notebooks that are executed in place."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import vitad

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))

import notebooks  # noqa: E402  book/notebooks.py

LIBRARY = {
    "__init__": '_NAMES = {"run": "runs", "load": "data"}\n\ndef __getattr__(name):\n    raise AttributeError(name)\n',
    "alpha": '"""Alpha."""\n\nfrom vitad import beta\n\ndef double(x):\n    """Twice."""\n    return beta.two() / x\n',
    "beta": "from .gamma import TWO\n\n\ndef two():\n    return TWO\n",
    "gamma": "TWO = 2  # a number\n",
    "data": "SIZE = 3\n",
    "runs": 'TABLE = "numbers.csv"\n',
    "methods/__init__": "",
    "methods/first": '"""First."""\n',
    "methods/second": '"""Second."""\n',
}


def cells(*sources):
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources], metadata=kernel)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small library, a record and book/, in place of the real ones."""
    for name, text in LIBRARY.items():
        (tmp_path / "vitad" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vitad" / f"{name}.py").write_text(text)
    (tmp_path / "vitad" / "numbers.csv").write_text("1,2\n")
    (tmp_path / "results" / "one").mkdir(parents=True)
    (tmp_path / "results" / "one" / "record.json").write_text("{}")
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=shutil.ignore_patterns("_build", "__pycache__", "_static"))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def forget():
    for function in (
        notebooks.modules,
        notebooks.parsed,
        notebooks.imported_by,
        notebooks.version,
        notebooks.records,
    ):
        function.cache_clear()


def changes_after(tree, nb, file, old, new):
    """What `changes` says once `old` is replaced in one file of the tree."""
    forget()
    nb.metadata["vitad"] = {"sources": notebooks.sources(nb)}
    assert notebooks.changes(nb) == []
    assert old in (tree / file).read_text()
    (tree / file).write_text((tree / file).read_text().replace(old, new))
    forget()
    return notebooks.changes(nb)


def modules_of(*sources):
    return list(notebooks.sources(cells(*sources))["library"])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from vitad import alpha", ["vitad.alpha", "vitad.beta", "vitad.gamma"]),
        ("import vitad.gamma", ["vitad.gamma"]),
        ("from vitad import run", ["vitad.runs"]),
        ("import vitad\nvitad.load('toy')", ["vitad", "vitad.data"]),
        ("from vitad.methods import first", ["vitad.methods.first"]),
        ("print('second')", ["vitad.methods.second"]),
        (
            "from vitad import methods\nmethods.METHODS",
            ["vitad.methods", "vitad.methods.first", "vitad.methods.second"],
        ),
        ("%matplotlib inline\nimport os", []),
    ],
)
def test_the_modules_that_a_notebook_depends_on(tree, source, expected):
    assert modules_of(source) == expected


def test_names_of_the_front_door_come_from_where_they_are_defined():
    for name in getattr(vitad, "__all__", ()):
        defined = getattr(getattr(vitad, name), "__module__", f"vitad.{name}")
        assert defined.startswith(notebooks.origin("vitad", name))


@pytest.mark.parametrize(
    ("source", "file", "old", "new", "expected"),
    [
        ("from vitad import alpha", "vitad/gamma.py", "2  #", "3  #", ["vitad.gamma"]),
        (
            "from vitad import alpha",
            "vitad/beta.py",
            "from .gamma import TWO",
            "TWO = 2",
            ["vitad.beta", "vitad.gamma"],
        ),
        ("from vitad import alpha", "vitad/alpha.py", "Twice.", "The double.", []),
        ("from vitad import alpha", "vitad/gamma.py", "a number", "the number", []),
        ("from vitad import alpha", "vitad/data.py", "3", "4", []),
        ("from vitad import runs", "vitad/numbers.csv", "2", "3", ["vitad.runs"]),
        ("from vitad.methods import first", "vitad/methods/first.py", "First", "1st", ["vitad.methods.first"]),
        ("inspect.getsource(alpha)\nfrom vitad import alpha", "vitad/alpha.py", "Twice", "2 x", ["vitad.alpha"]),
        ("1 + 1", "results/one/record.json", "{}", "[]", ["records"]),
    ],
)
def test_what_makes_a_notebook_lag(tree, source, file, old, new, expected):
    assert changes_after(tree, cells(source), file, old, new) == expected


def test_changed_cells_and_notebooks_executed_by_other_means_lag(tree):
    nb = cells("1 + 1")
    assert notebooks.changes(nb) == ["it was not executed with make notebooks"]
    nb.metadata["vitad"] = {"sources": notebooks.sources(nb)}
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("# Prose"))
    assert notebooks.changes(nb) == []
    nb.cells[1].source = "1 + 2"
    assert notebooks.changes(nb) == ["cells"]


def execute(tree, *arguments):
    command = [sys.executable, tree / "book" / "notebooks.py", *arguments]
    environment = {"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin", "HOME": str(tree / "home")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_lagging_notebooks_are_executed_in_place_and_a_failing_one_is_named(tree):
    nbformat.write(
        cells("import os\nprint(os.getcwd())", "open('trace', 'w').close()\n2 + 2"), tree / "notebooks/one.ipynb"
    )
    nbformat.write(cells("from vitad import alpha", "alpha.double('x')"), tree / "notebooks/two.ipynb")
    failing = (tree / "notebooks/two.ipynb").read_bytes()

    first = execute(tree, "JOBS=2")
    said = first.stdout + first.stderr
    assert first.returncode == 1
    assert "one lags: it was not executed with make notebooks" in said
    assert "notebooks/two.ipynb: cell In [2]" in said and "TypeError: unsupported operand" in said
    assert "1 of 2 failed" in said and "Traceback" not in said
    assert (tree / "notebooks/two.ipynb").read_bytes() == failing
    assert sorted(path.name for path in (tree / "notebooks").iterdir()) == ["one.ipynb", "two.ipynb"]

    nb = nbformat.read(tree / "notebooks/one.ipynb", 4)
    assert [cell.execution_count for cell in nb.cells] == [1, 2]
    assert nb.cells[0].outputs[0].text == ".\n", "the folder of this machine is left out"
    assert nb.cells[1].outputs[0].data["text/plain"] == "4"
    assert all(not cell.metadata for cell in nb.cells), "no timings"

    nbformat.write(cells("3 + 3"), tree / "notebooks/two.ipynb")
    second = execute(tree)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "1 notebooks, 1 to run" in second.stdout
    third = execute(tree)
    assert third.stdout == "notebooks: all are up to date\n"


def test_an_unknown_notebook_or_option_is_refused(tree):
    nbformat.write(cells("1"), tree / "notebooks/anovit.ipynb")
    assert "no notebook anovt; did you mean anovit?" in execute(tree, "ONLY=anovt").stderr
    assert "unknown parameter ONYL; did you mean ONLY?" in execute(tree, "ONYL=anovit").stderr


def test_widgets_keep_their_state(tmp_path):
    execution = importlib.import_module("execution")
    shown = "import ipywidgets\nipywidgets.IntSlider(3)"
    nbformat.write(cells(shown), tmp_path / "in.ipynb")
    task = execution.Task(tmp_path / "in.ipynb", tmp_path / "work", tmp_path / "out.ipynb")
    assert execution.execute(task) is None
    nb = nbformat.read(task.done, 4)
    state = nb.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    assert nb.cells[0].outputs[0].data["application/vnd.jupyter.widget-view+json"]["model_id"] in state


def test_a_kernel_that_dies_is_a_failure_with_its_cell(tmp_path):
    execution = importlib.import_module("execution")
    nbformat.write(cells("1", "import os\nos._exit(1)"), tmp_path / "in.ipynb")
    task = execution.Task(tmp_path / "in.ipynb", tmp_path / "work", tmp_path / "out.ipynb")
    failure = execution.execute(task)
    assert "cell In [2]" in failure and "DeadKernelError" in failure
    assert not task.done.exists()
