"""The book's shell: its contents, the committed notebooks, and book/build.py on throw-away notebooks."""

import ast
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import yaml

from vitad.show.notebook import PARAMETERS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-"
CLAIM = """def shown():  # claims are found in the code, this one is not run
    return claim("Frozen features win.", above(runs_of("patchknn"), runs_of("l2cae"), "image_auroc"))"""


def contents():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def test_contents_and_notebooks_match():
    entries = contents()
    assert len(entries) == len(set(entries))
    missing = [e for e in entries if not any((ROOT / f"{e}{suffix}").exists() for suffix in (".md", ".ipynb"))]
    assert not missing, f"in book/_toc.yml but not in the tree: {missing}"
    left_out = [n.name for n in NOTEBOOKS if f"notebooks/{n.stem}" not in entries]
    assert not left_out, f"not in book/_toc.yml: {left_out}"


def test_the_readme_lists_the_methods_and_data_sets_of_today():
    sys.path.insert(0, str(ROOT / "book"))
    import readme

    assert readme.updated(readme.README.read_text()) == readme.README.read_text(), "`make readme` brings it up to date"


def test_jupyter_book_executes_nothing():
    assert yaml.safe_load((ROOT / "_config.yml").read_text())["execute"]["execute_notebooks"] == "off"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestCommittedNotebook:
    def test_parameters_are_the_contract_and_plain_literals(self, path):
        cells = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
        assert len(cells) == 1
        found = {}
        for statement in ast.parse(cells[0].source).body:
            assert isinstance(statement, ast.Assign) and len(statement.targets) == 1
            found[statement.targets[0].id] = ast.literal_eval(statement.value)
        assert tuple(found) == PARAMETERS
        assert (found["dataset"], found["preset"], found["out_dir"]) == ("toy", "demo", "runs")

    def test_was_run_from_top_to_bottom_without_error(self, path):
        code = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code" and c.source.strip()]
        assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
        assert any(c.outputs for c in code)
        assert not [c.source for c in code for o in c.outputs if o.output_type == "error"]

    def test_has_outputs_that_nbval_compares(self, path):
        checked = [c for c in nbformat.read(path, 4).cells if "# NBVAL_CHECK_OUTPUT" in c.source]
        assert checked
        assert all(c.outputs for c in checked), "a marked cell without a stored output passes unchecked"

    def test_stores_the_state_of_its_widgets(self, path):
        nb = nbformat.read(path, 4)
        outputs = [o.get("data", {}) for c in nb.cells if c.cell_type == "code" for o in c.outputs]
        shown = [data[WIDGET + "view+json"]["model_id"] for data in outputs if WIDGET + "view+json" in data]
        state = nb.metadata.get("widgets", {}).get(WIDGET + "state+json", {}).get("state", {})
        assert not [model for model in shown if model not in state], "a widget without its state is not in the book"

    def test_names_no_folder_of_the_machine_that_ran_it(self, path):
        nb = nbformat.read(path, 4)
        for output in (o for c in nb.cells if c.cell_type == "code" for o in c.outputs):
            for kind in [k for k in output.get("data", {}) if k.startswith("image/") and k != "image/svg+xml"]:
                del output.data[kind]  # its base64 may spell anything
        assert not re.findall(r"(?:/home/|/root/|/tmp/|/Users/|C:\\\\Users)[\w./-]*", nbformat.writes(nb))


def notebook(path, *cells):
    parameters = nbformat.v4.new_code_cell(
        'preset = "demo"\nseed = 0\nweights = "auto"\noverrides = {}', metadata={"tags": ["parameters"]}
    )
    title = nbformat.v4.new_markdown_cell(f"# {path.stem}\n\n$\\boldsymbol{{x}}^2$")
    code = [nbformat.v4.new_code_cell(source) for source in cells]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[title, parameters, *code], metadata=kernel), path)


@pytest.fixture
def tree(tmp_path):
    """A book of one page and two notebooks around the real configuration and the real build.py."""
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=shutil.ignore_patterns("_build", "__pycache__", "*.md"))
    for name in ("_config.yml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "book" / "page.md").write_text("# Page\n\n<!-- claims -->\n\n{cite:p}`lee2022anovit`")
    (tmp_path / "book" / "list.md").write_text("# List\n\n```{bibliography}\n```\n")
    chapters = [{"file": "notebooks/one"}, {"file": "notebooks/two"}, {"file": "book/list"}]
    toc = {"format": "jb-book", "root": "book/page", "parts": [{"caption": "All", "chapters": chapters}]}
    (tmp_path / "book" / "_toc.yml").write_text(yaml.safe_dump(toc))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "intro.png", tmp_path / "results")
    return tmp_path


def build(tree, *arguments):
    command = [sys.executable, tree / "book" / "build.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


class ForeignParts(HTMLParser):
    """Collects what a browser would fetch from another host to show the page; links to follow do not count."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        address = given.get("href" if tag == "link" else "src") or ""
        if given.get("rel") == "canonical":  # says where the page is, and fetches nothing
            return
        if tag in ("script", "link", "img", "iframe", "source") and re.match(r"(https?:)?//", address):
            self.found.append(address)


def test_a_failing_notebook_stops_the_build_and_the_others_are_kept(tree):
    progress = "import sys; print('9step/s', file=sys.stderr)"
    notebook(
        tree / "notebooks" / "one.ipynb",
        "print(preset, seed, weights, overrides)",
        "open('trace.txt', 'w').write('ran')",
        CLAIM,
        progress,
        "from IPython.display import HTML; HTML('<script>' + 'let x;' * 20_000 + '</script>')",
    )
    notebook(tree / "notebooks" / "two.ipynb", "def half(x):\n    return x / 0", "half(1)")
    committed = (tree / "notebooks" / "one.ipynb").read_bytes()

    given = ["SEED=3", "PRESET=", "DATASET=mt", "WEIGHTS=random", "OVERRIDES=lr=1e-4 text='a b'"]
    failed = build(tree, *given)
    assert failed.returncode == 1
    said = failed.stdout + failed.stderr
    assert "notebooks/two.ipynb: cell In [4]" in said  # papermill adds a cell with the parameters
    assert "----> 1 half(1)" in said and "ZeroDivisionError: division by zero" in said
    assert "\x1b[" not in said and "\nTraceback" not in said
    executed = list((tree / "book" / "_build" / "executed").glob("*.ipynb"))
    assert [path.stem.rpartition("-")[0] for path in executed] == ["one"]
    assert """demo 3 random {'lr': '1e-4', 'text': 'a b'}""" in executed[0].read_text()
    assert str(tree) not in executed[0].read_text()
    assert (tree / "notebooks" / "one.ipynb").read_bytes() == committed
    assert not list((tree / "notebooks").glob("*.txt")), "notebooks run in the build folder"

    notebook(tree / "notebooks" / "two.ipynb", "1 + 1")
    places = ["REPOSITORY=https://github.com/someone/book", "SITE=https://someone.github.io/book"]
    mended = build(tree, *given, *places)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "2 notebooks, 1 to run" in mended.stdout
    assert "4 pages of 4" in mended.stdout

    html = tree / "book" / "_build" / "html"
    assert (html / "index.html").exists()
    words = re.sub(r"<[^>]+>", " ", (html / "book" / "page.html").read_text()).split()
    assert "Frozen features win. (image AUROC patchknn" in " ".join(words)
    pages = list(html.rglob("*.html"))
    assert len(pages) > 4
    assert (html / "notebooks" / "one.html").read_text().count("9step/s") == 1, "the source; progress bars stay out"
    assert not [address for page in pages for address in ForeignParts(page).found]
    assert not [sheet for sheet in html.rglob("*.css") if re.search(r"url\(['\"]?(https?:)?//", sheet.read_text())]

    page = (html / "notebooks" / "one.html").read_text()
    (script,) = re.findall(r'<script src="../(_static/\w{12}.js)"></script>', page)
    assert len(page) < 100_000 < len((html / script).read_text())
    assert "colab.research.google.com/github/someone/book/blob/gh-pages/colab/one.ipynb" in page
    assert "mybinder.org/v2/gh/someone/book/main?urlpath=lab/tree/notebooks/one.ipynb" in page
    assert re.search(r"To cite this page: .* version [\d.]+.*https://someone.github.io/book/notebooks/one.html", page)
    assert re.search(r'property="og:image" content="https://someone.github.io/book/_images/.*png"', page)
    assert "book/notebooks/one.html" in (html / "sitemap.xml").read_text()
    assert 'href="/book/_static/' in (html / "404.html").read_text()
    assert (html / "colab" / "one.ipynb").exists() and (html / ".nojekyll").exists()

    (tree / "book" / "page.md").write_text("# Page\n\n{cite:p}`lee2022anovit` [nowhere](nowhere.md)\n")
    warned = build(tree, *given)
    assert warned.returncode == 1 and "0 to run" in warned.stdout
    assert "WARNING" in warned.stderr and "nowhere" in warned.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("PRSET=paper", "did you mean PRESET"),
        ("SEED=one", "SEED=one is not a whole number"),
        ("COLOUR=red", "unknown parameter"),
        ("OVERRIDES=lr", "OVERRIDES=lr is not a list such as"),
        ("SITE=book", "SITE=book is not an address such as"),
    ],
)
def test_unknown_parameters_are_refused_before_anything_runs(tree, argument, message):
    result = build(tree, argument)
    assert result.returncode == 1 and message in result.stderr
    assert not (tree / "book" / "_build").exists()
