"""pyproject.toml, constraints.txt, environment.yml, the Makefile and CITATION.cff say the same."""

import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import vitad

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOUNDATIONS = [
    "jupyterlab",
    "jupyter-book",
    "papermill",
    "torch",
    "timm",
    "matplotlib",
    "seaborn",
    "ipywidgets",
    "nbval",
]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements():
    listed = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    return [Requirement(line) for line in listed]


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    pinned = pins()
    for requirement in requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is missing from constraints.txt"
        assert version in requirement.specifier, f"constraints.txt pins {requirement.name} {version}: {requirement}"


def test_every_package_that_these_bring_along_is_pinned():
    """torch's own requirements are left to torch, which pins its CUDA packages itself."""
    todo = [(r.name, r.extras) for r in requirements()] + [("torchvision", set())]
    seen, missing, pinned = set(), set(), pins()
    while todo:
        name, extras = todo.pop()
        if canonicalize_name(name) not in pinned:
            missing.add(name)
        if name == "torch" or (name, *sorted(extras)) in seen:
            continue
        seen.add((name, *sorted(extras)))
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in (*extras, "")):
                todo.append((needed.name, needed.extras))
    assert not missing, f"missing from constraints.txt: {sorted(missing)}"


def test_the_packages_that_the_book_is_built_on_are_required():
    names = {canonicalize_name(r.name) for r in requirements()}
    assert not [name for name in FOUNDATIONS if name not in names]


def test_jupyter_book_stays_below_two():
    assert [r for r in requirements() if r.name == "jupyter-book" and "2.0" not in r.specifier]


def test_conda_installs_the_same_versions():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = SpecifierSet(next(line for line in listed if str(line).startswith("python")).removeprefix("python"))
    allowed = [f"3.{minor}.{patch}" for minor in range(8, 20) for patch in range(20) if f"3.{minor}.{patch}" in python]
    assert allowed and all(version in SpecifierSet(PROJECT["requires-python"]) for version in allowed)
    pip = next(line["pip"] for line in listed if isinstance(line, dict))
    assert "-c constraints.txt" in pip
    others = [Requirement(line) for line in pip if not line.startswith("-")]
    assert {r.name for r in others} == {"torch", "torchvision"}
    assert all(pins()[r.name] in r.specifier for r in others)


def test_make_looks_for_a_python_that_is_allowed():
    smallest = PROJECT["requires-python"].removeprefix(">=")
    assert f"sys.version_info < ({smallest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()


def test_conda_and_make_install_the_same_extras():
    extras = {name: re.findall(r"\.\[(.*?)\]", (ROOT / name).read_text()) for name in ("Makefile", "environment.yml")}
    assert extras["Makefile"] == extras["environment.yml"] == [",".join(PROJECT["optional-dependencies"])]


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == citation["version"] == vitad.__version__
    assert PROJECT["license"] == citation["license"] == "MIT"


def test_make_hands_on_what_was_set_on_the_command_line_in_one_piece():
    given = ["SEED=3", "OVERRIDES=lr=1e-4 text='a b'", "DATA_ROOT=/a b", "PYTHON=python3"]
    command = ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/.ready", "book", *given]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(shlex.split(lines[-1])[2:]) == sorted(given[:-1])


def test_hooks_use_installed_tools_and_are_valid(tmp_path):
    config = ROOT / ".pre-commit-config.yaml"
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", config], check=True)
    hooks = {hook["id"]: hook for repo in yaml.safe_load(config.read_text())["repos"] for hook in repo["hooks"]}
    assert {hook["language"] for hook in hooks.values()} == {"system"}, "no hook needs a network"
    for name, size in (("small", 3 * 2**20), ("large", 3 * 2**20 + 1)):
        (tmp_path / name).write_bytes(bytes(size))
        command = [sys.executable, *shlex.split(hooks["no-large-files"]["entry"])[1:], tmp_path / name]
        assert subprocess.run(command, capture_output=True).returncode == (name == "large")


def test_continuous_integration_runs_the_two_commands_of_the_readme():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    commands = re.search(r"## Two commands.*?```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    for line in commands.splitlines():
        assert [step for step in steps if step.startswith(line.partition("#")[0].strip())]


def test_the_changelog_has_this_version():
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
