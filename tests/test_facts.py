"""The facts of the book: files that repeat them, pages that point nowhere without a place, and what a site adds."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
import build  # noqa: E402
import facts  # noqa: E402

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
PUBLIC = {"repository": "https://github.com/someone/book", "site": "https://someone.github.io/book"}


@pytest.mark.parametrize("name", facts.FILES)
def test_a_file_that_repeats_them_is_up_to_date(name):
    text = facts.FILES[name](facts.facts())
    assert (ROOT / name).read_text() == text, "`make facts` brings it up to date"
    assert "" not in (json.loads(text) if name.endswith("json") else yaml.safe_load(text)).values()


def test_without_a_public_place_nothing_points_to_one():
    f = facts.facts(repository="", site="")
    changed = facts.published(CONFIG, f)
    assert changed.pop("sphinx")["config"] == CONFIG["sphinx"]["config"] | {"vitad_facts": f}
    assert changed == {name: value for name, value in CONFIG.items() if name != "sphinx"}


def test_a_repository_gives_buttons_and_a_site_what_others_show_of_it():
    with_repository = facts.published(CONFIG, facts.facts(repository=PUBLIC["repository"], site=""))
    assert with_repository["repository"]["url"] == PUBLIC["repository"]
    assert {"binderhub_url", "colab_url"} <= with_repository["launch_buttons"].keys()
    assert with_repository["html"]["use_edit_page_button"] and "baseurl" not in with_repository["html"]
    elsewhere = facts.published(CONFIG, facts.facts(repository="https://gitlab.com/someone/book", site=""))
    assert "colab_url" not in elsewhere["launch_buttons"], "Colab opens nothing else than GitHub"
    with_site = facts.published(CONFIG, facts.facts(repository="", site=PUBLIC["site"]))
    assert with_site["html"]["baseurl"] == "https://someone.github.io/book/"
    assert with_site["sphinx"]["config"]["notfound_urls_prefix"] == "/book/"
    assert "launch_buttons" not in with_site


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("https://github.com/a/b", True),
        ("https://github.com/a/b.git", True),
        ("github.com/a/b", False),
        ("https://github.com/a", False),
        ("https://github.com/a/b c", False),
    ],
)
def test_an_address_that_is_none_is_refused(text, right):
    if right:
        assert facts.repository(text) == "https://github.com/a/b"
    else:
        with pytest.raises(ValueError, match="is not"):
            facts.repository(text)


def test_a_notebook_for_colab_installs_the_library_of_this_commit_first(tmp_path):
    notebook = ROOT / "notebooks" / "quickstart.ipynb"
    f = facts.facts(**PUBLIC) | {"commit": "0123456789"}
    build.write_for_colab({notebook: notebook}, f, tmp_path / "colab")
    nb = nbformat.read(tmp_path / "colab" / "quickstart.ipynb", 4)
    nbformat.validate(nb)
    assert "git+https://github.com/someone/book@0123456789" in nb.cells[0].source
    sources = [cell.source for cell in nbformat.read(notebook, 4).cells]
    assert [cell.source for cell in nb.cells[1:]] == sources
    assert not any(cell.get("outputs") for cell in nb.cells)


def test_workflows_keep_to_the_schema_of_github():
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    linter = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*linter, *files], capture_output=True, text=True)
    assert len(files) == 2 and done.returncode == 0, done.stdout


def test_tests_run_on_two_systems_and_two_pythons():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"] == {"os": ["ubuntu-latest", "macos-latest"], "python": ["3.11", "3.12"]}
    assert [s["run"].split()[1] for s in job["steps"] if "run" in s] == ["book", "test"]


def test_the_workflow_that_publishes_calls_targets_of_make():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())["jobs"]
    called = [s["run"].split()[1] for job in jobs.values() for s in job["steps"] if s.get("run", "").startswith("make")]
    assert called == ["test", "book", "axe", "lab", "crawl", "zip", "pdf"]
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in targets for target in called)
