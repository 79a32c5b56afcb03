"""The library as its reader meets it: everything public is documented, typed and on a page, and the examples run."""

import doctest
import importlib
import inspect
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

import vitad

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import vitad_api  # noqa: E402  book/_ext/vitad_api.py

MODULES = ["vitad", *vitad_api.public_modules()]
SECTIONS = ("Parameters", "Returns", "Raises", "Attributes")
WITH_EXAMPLES = ["load", "run", "evaluate"]  # of the front door


def functions_of(kind):
    """(name, function) of the public methods and properties that a class defines, and of its own `__init__`."""
    for name, value in vars(kind).items():
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        written = getattr(value, "__module__", None) == kind.__module__ and not hasattr(kind, "__dataclass_fields__")
        if inspect.isfunction(value) and (not name.startswith("_") or (name == "__init__" and written)):
            yield f"{kind.__module__}.{kind.__qualname__}.{name}", value


def public_objects(module):
    """(full name, object) of the public functions, classes and methods that a module defines."""
    module = importlib.import_module(module)
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            yield f"{module.__name__}.{name}", value
            yield from functions_of(value)
        elif callable(value):
            yield f"{module.__name__}.{name}", inspect.unwrap(value)


def documentation(name, value):
    """Docstring of an object; a method without one has that of the method which it overrides."""
    if inspect.isclass(value):  # dataclasses and exceptions without a docstring have one that nobody wrote
        written = vars(value).get("__doc__") or ""
        return "" if written.startswith(f"{value.__name__}(") else written
    if inspect.getdoc(value) or name.endswith(".__init__"):
        return inspect.getdoc(value) or "of the class"
    kind = getattr(sys.modules[value.__module__], value.__qualname__.partition(".")[0])
    return inspect.getdoc(getattr(kind, name.rpartition(".")[2], None)) if inspect.isclass(kind) else None


def untyped(function):
    """Parameters of a function without an annotation, and `return`."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    missing = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
    no_return = signature.return_annotation is inspect.Signature.empty and function.__name__ != "__init__"
    return missing + ["return"] * no_return


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module):
    assert importlib.import_module(module).__doc__
    missing = [name for name, value in public_objects(module) if not documentation(name, value)]
    assert not missing, f"without a docstring: {missing}"
    bars = [name for name, value in public_objects(module) if re.search(r"\|\w[^|`\n]*\|", documentation(name, value))]
    assert not bars, f"Sphinx takes |x| for a substitution: {bars}"


def sentences_as_types(docstring):
    """Entries of a numpydoc section that have a sentence where a type belongs (`name : type`)."""
    sections = re.split(r"^(\w+)\n-{3,}$", docstring, flags=re.MULTILINE)
    bodies = [body for name, body in zip(sections[1::2], sections[2::2], strict=True) if name in SECTIONS]
    entries = re.findall(r"^\S.* : .*", "\n".join(bodies), flags=re.MULTILINE)
    return [entry for entry in entries if entry.endswith(".") or ". " in entry]


@pytest.mark.parametrize("module", MODULES)
def test_descriptions_stand_below_the_names_that_they_describe(module):
    documented = {name: inspect.getdoc(value) or "" for name, value in public_objects(module)}
    wrong = {name: sentences_as_types(text) for name, text in documented.items() if sentences_as_types(text)}
    assert not wrong, f"the page would show these sentences as types: {wrong}"


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_annotated(module):
    functions = [(name, value) for name, value in public_objects(module) if inspect.isfunction(value)]
    missing = {name: untyped(value) for name, value in functions if untyped(value)}
    assert not missing, f"without annotations: {missing}"


def test_every_public_module_is_on_one_page_of_the_reference():
    pages = sorted((ROOT / "book" / "api").glob("*.md"))
    named = [name for page in pages for name in vitad_api.MARKER.findall(page.read_text())]
    assert named.count("others") == 1
    shown = Counter(module for name in named for module in vitad_api.chosen_modules(name, set(named) - {"others"}))
    assert shown == Counter(MODULES[1:])


def examples(module, **names):
    """Docstrings of a module that hold examples; `names` are known in them."""
    found = doctest.DocTestFinder().find(importlib.import_module(module), extraglobs=names)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = []
    for test in examples(module, getfixture=request.getfixturevalue):  # as pytest --doctest-modules has it
        runner.run(test, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_front_door_has_examples(name):
    assert doctest.DocTestFinder().find(getattr(vitad, name), name)[0].examples


def test_metrics_have_examples():
    assert examples("vitad.metrics")
