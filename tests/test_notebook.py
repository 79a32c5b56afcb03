"""`begin`, the first call of every notebook: as papermill runs it, and in a kernel that runs a cell again."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import vitad
from vitad.errors import UserError
from vitad.show import notebook
from vitad.show.notebook import PARAMETERS, begin

CELL = """\
dataset = "toy"
category = None
data_root = None
split = None
preset = "demo"
seed = 0
device = "cpu"
weights = "auto"
out_dir = "runs"
overrides = {}
"""
FIRST = "from vitad.show import notebook\n\nrequest = notebook.begin(globals(), 'anovit')"


def namespace(*cells, **changed):
    """What a notebook's globals hold after `cells`, while a cell that calls `begin` runs."""
    names = {}
    for cell in cells:
        exec(cell, names)
    return names | {"In": ["", *cells, FIRST]} | changed


@pytest.fixture
def papermill(tmp_path):
    """Run a notebook of three cells through papermill with `-p name value ...`."""
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(FIRST.replace("'anovit'", "None")),
            nbformat.v4.new_code_cell("print('went on with', preset, overrides)"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(nb, tmp_path / "in.ipynb")

    def run(*parameters):
        words = [word for name, value in parameters for word in ("-p", name, value)]
        command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar", *words]
        environment = {
            "PYTHONPATH": str(Path(vitad.__file__).parents[1]),
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
        }
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        return result, nbformat.read(tmp_path / "out.ipynb", 4)

    return run


def test_a_misspelt_parameter_of_papermill_stops_the_first_cell(papermill):
    result, nb = papermill(("presett", "smoke"))
    assert result.returncode != 0
    assert "unknown parameter 'presett'. Did you mean 'preset'?" in result.stderr
    (error,) = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert len(error.traceback) == 1, "one line instead of a traceback"
    assert nb.cells[-1].execution_count is None


def test_known_parameters_of_papermill_are_taken(papermill):
    result, nb = papermill(("preset", "smoke"), ("seed", "3"))
    assert result.returncode == 0, result.stderr
    assert "went on with smoke" in nb.cells[-1].outputs[0].text
    begun = next(c for c in nb.cells if "begin(globals()" in c.source).outputs[0].text
    assert "preset='smoke' · seed=3" in begun
    assert f"vitad {vitad.__version__}" in begun and "device cpu" in begun


def test_a_line_too_many_in_the_parameters_cell_is_named():
    with pytest.raises(UserError, match="unknown parameter 'split_name'. Did you mean 'split'?"):
        begin(namespace(CELL + 'split_name = "grouped"\n'))


def test_a_missing_parameter_is_named():
    with pytest.raises(UserError, match="does not set weights"):
        begin(namespace(CELL.replace('weights = "auto"\n', "")))


def test_imports_functions_and_values_of_other_cells_are_no_parameters(capsys):
    other = "from math import pi\nimport os\nn = 3\n\n\ndef half(x):\n    return x / 2\n\n\nclass Small:\n    pass\n"
    assert begin(namespace(other, CELL, "plain = 1", exit=None, Out={}, quit=None, _ih=[])) is None
    assert "dataset='toy'" in capsys.readouterr().out


def test_the_cells_can_be_run_again_after_the_typo_is_corrected(capsys):
    wrong = CELL + "presett = 1\n"
    with pytest.raises(UserError):
        begin(namespace(wrong))
    again = namespace(wrong)
    again["In"] += [CELL, FIRST]
    assert begin(again) is None


def test_a_method_gets_its_request(monkeypatch, capsys):
    from vitad import runs

    given = {}
    monkeypatch.setattr(runs, "Request", lambda method, **values: given.update(values, method=method), raising=False)
    begin(namespace(CELL.replace("overrides = {}", "overrides = ['lr=0.5']")), "anovit")
    assert given.pop("overrides") == {"lr": "0.5"}
    assert given.pop("method") == "anovit"
    assert set(given) == set(PARAMETERS) - {"out_dir", "overrides"}


def test_an_error_of_the_request_has_no_traceback_either(monkeypatch, capsys):
    from vitad import runs

    def refuse(method, **values):
        raise UserError("unknown preset 'dmeo'. Did you mean 'demo'?")

    monkeypatch.setattr(runs, "Request", refuse, raising=False)
    with pytest.raises(notebook.ParameterError, match="dmeo") as caught:
        begin(namespace(CELL), "anovit")
    assert caught.value._render_traceback_() == ["ParameterError: unknown preset 'dmeo'. Did you mean 'demo'?"]


def test_an_ablation_has_three_seeds_but_one_with_the_smallest_preset(capsys):
    assert list(notebook.ablation_seeds(4, "demo")) == [4, 5, 6]
    assert list(notebook.ablation_seeds(4, "smoke")) == [4]
    assert capsys.readouterr().out.splitlines()[1] == "seeds of each row: 4 (preset smoke: a single one)"


def test_variants_that_change_nothing_are_left_out_and_named(capsys):
    from vitad.runs import Request

    request = Request("ssltok", preset="smoke")
    variants = {"last block": {"blocks": [6]}, "untrained": {"pretrained": False}}
    assert notebook.changing(request, variants) == {"last block": {"blocks": [6]}}
    assert capsys.readouterr().out == "left out: untrained, since preset smoke has it anyway\n"
    assert notebook.changing(Request("ssltok"), variants) == variants


def test_the_source_that_a_page_shows_runs_and_has_no_docstrings():
    from vitad.methods import vitmem

    shown = notebook.source(vitmem.Memory.forward, vitmem.shrunk, vitmem.Memory).data
    assert '"""' not in shown and "class Memory" in shown and shown.startswith("def forward")
    compile(shown, "shown", "exec")
    lines = Path(vitmem.__file__).read_text()
    assert all(line in lines for line in shown.splitlines())
