"""The walkthroughs of CONTRIBUTING.md, followed step by step on a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = re.findall(r"^### (A .*?): (\d+) files?\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S)
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)


def apply(block: str, file: Path) -> None:
    """Apply a `diff` block: lines of context and removed ones stand together, once, in the file."""
    lines = block.splitlines()
    assert all(line[:1] in " +-" for line in lines)
    before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " -")
    after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " +")
    text = file.read_text()
    assert text.count(before) == 1, f"the lines of the walkthrough do not stand in {file}:\n{before}"
    file.write_text(text.replace(before, after))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what git tracks."""
    root = tmp_path_factory.mktemp("project")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    run = dict(cwd=root, check=True, capture_output=True)
    subprocess.run(["git", "init", "-q"], **run)
    subprocess.run(["git", "add", "-A"], **run)
    return root


def test_there_are_five_and_none_touches_more_than_four_files():
    assert [title for title, _, _ in SECTIONS] == [
        "A new data set",
        "A new method",
        "A new metric",
        "A new printed table",
        "A changed figure in a chapter",
    ]
    assert all(int(count) <= 4 for _, count, _ in SECTIONS)


@pytest.mark.parametrize(("title", "count", "steps"), SECTIONS, ids=[title for title, *_ in SECTIONS])
def test_a_walkthrough_works_as_written(title, count, steps, project):
    edited = set()
    for language, name, block in BLOCK.findall(steps):
        if language == "diff":
            apply(block, project / name)
        elif name:
            assert not (project / name).exists()
            (project / name).write_text(block)
        else:
            environment = os.environ | {"PYTHONPATH": str(project), "PATH": path_of_this_python()}
            command = ["bash", "-euo", "pipefail", "-c", block]
            done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=250)
            assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            edited |= {f for f in re.findall(r"notebooks/\w+\.ipynb", block)}
        if name and not name.startswith("tests/"):
            edited.add(name)
    assert len(edited) == int(count), edited


def path_of_this_python():
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
