"""book/robust.py: notebooks under other arithmetic, on throw-away notebooks."""

import os
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))

import execution  # noqa: E402  book/execution.py
import robust  # noqa: E402  book/robust.py

MARK = "# NBVAL_CHECK_OUTPUT\n"


def notebook(path, *cells):
    """A notebook of (source, printed text) pairs."""
    code = [
        nbformat.v4.new_code_cell(
            source, execution_count=n, outputs=[nbformat.v4.new_output("stream", text=text)] if text else []
        )
        for n, (source, text) in enumerate(cells, 1)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=kernel), path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(robust, "BUILD", tmp_path / "build")
    monkeypatch.setattr(execution, "ROOT", tmp_path)
    return tmp_path


def test_what_changes_and_what_fails_is_named(folder, capsys):
    ask = "import os\nprint('a')\nprint(os.environ.get('ATEN_CPU_CAPABILITY'))"
    notebooks = [
        notebook(folder / "same.ipynb", (MARK + "print(1)", "1\n"), (ask, "not compared\n")),
        notebook(folder / "other.ipynb", ("1", None), (MARK + ask, "a\nNone\n")),
        notebook(folder / "broken.ipynb", ("assert 1 > 2", None)),
    ]
    before = dict(os.environ)
    found = robust.run("avx2", notebooks, 1)
    assert found == {"same": "ok", "other": "differs", "broken": "fails"}
    said = capsys.readouterr().out
    assert "other differs under avx2\n  cell In [2] prints\n      - None\n      + avx2\n" in said
    assert "FAILED broken.ipynb: cell In [1]" in said and "AssertionError" in said
    assert os.environ.get("ATEN_CPU_CAPABILITY") == before.get("ATEN_CPU_CAPABILITY")


def test_a_setting_has_its_variables_and_none_of_another(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    with robust.environment(robust.SETTINGS["onednn"]):
        assert "ATEN_CPU_CAPABILITY" not in os.environ and os.environ["DNNL_MAX_CPU_ISA"] == "AVX2"
    assert os.environ["ATEN_CPU_CAPABILITY"] == "avx2"


def test_threads_are_those_of_the_setting(folder):
    ask = notebook(folder / "ask.ipynb", (MARK + "import os\nprint(os.environ['OMP_NUM_THREADS'])", "1\n"))
    assert robust.run("native", [ask], 1) == {"ask": "ok"}
    assert robust.run("threads", [ask], 1) == {"ask": "differs"}


def test_the_smallest_preset_runs_on_the_real_images_that_are_there(folder, monkeypatch, capsys):
    for variable in ("VITAD_DATA", "VITAD_MT_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    asks = notebook(
        folder / "asks.ipynb", ("preset, dataset = 'demo', 'toy'", None), (MARK + "print(dataset)", "toy\n")
    )
    nb = nbformat.read(asks, 4)
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, asks)
    assert robust.run("smoke", [asks], 1) is None
    assert "smoke: skipped" in capsys.readouterr().out

    monkeypatch.setenv("VITAD_DATA", str(folder))
    (folder / "mt").mkdir()
    assert robust.run("smoke", [asks], 1) == {"asks": "ok"}, "other data prints other text"
    assert "smoke: preset=smoke dataset=mt" in capsys.readouterr().out
    (folder / "mvtec").mkdir()
    assert robust.smoke_book() == {"preset": "smoke", "dataset": "mvtec", "category": "bottle"}


def test_unknown_settings_and_notebooks_are_refused():
    with pytest.raises(SystemExit, match="SETTINGS=avx3 names avx3, which is none of native, avx2"):
        robust.main(["SETTINGS=avx3"])
    with pytest.raises(SystemExit, match="no notebook anovt; did you mean anovit?"):
        robust.main(["ONLY=anovt"])


def test_one_setting_that_does_not_hold_is_an_error(folder, monkeypatch, capsys):
    good, bad = notebook(folder / "good.ipynb", ("1", None)), notebook(folder / "bad.ipynb", ("1 / 0", None))
    monkeypatch.setattr(robust, "chosen", lambda only, everything: [good])
    robust.main(["SETTINGS=native avx2"])
    assert "native" in (table := capsys.readouterr().out.splitlines()[-2:])[0] and table[1].split() == [
        "good",
        "ok",
        "ok",
    ]
    monkeypatch.setattr(robust, "chosen", lambda only, everything: [good, bad])
    with pytest.raises(SystemExit, match="not everything holds"):
        robust.main(["SETTINGS=native"])


def test_progress_bars_are_not_compared():
    cell = nbformat.v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint('done')")
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="100%|####| 8/8 [00:06<00:00, 1.47batch/s]\n"),
        nbformat.v4.new_output("stream", name="stdout", text="done\n"),
    ]
    assert robust.checked(nbformat.v4.new_notebook(cells=[cell])) == {0: ["done"]}
