"""Execute committed notebooks again, in place: by default those that lag behind what their outputs depend on.

    python book/notebooks.py [ONLY="anovit mala"] [ALL=1] [JOBS=2]

A notebook keeps digests of these in its metadata (`vitad.sources`), and lags when one of them differs:
    cells      the source of its code cells
    library    each module of `vitad` that it imports, directly or not: its code without comments and docstrings, or its
               full text where the notebook shows it, and the data files that it names
    records    the record.json files below results/ and the JSON files below experiments/
Each notebook runs in a new folder under book/_build/notebooks and is replaced when it is whole. Its large pictures are
kept as JPEG, which is a fifth of their bytes: the history keeps every version, and `make book` draws them anew.
"""

import ast
import base64
import hashlib
import io
import shutil
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import nbformat
from execution import BUILD, ROOT, Task, execute_all, options, whole_number
from PIL import Image

METHODS = "vitad.methods."
LARGE = 100_000  # bytes of a picture, in base64


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def modules() -> dict[str, Path]:
    """{name: file} of the library's modules and packages."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in (ROOT / "vitad").rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in files.items()}


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def code(node) -> str:
    """A syntax tree as text, the same in all versions of Python (`ast.dump` is not)."""
    if isinstance(node, ast.AST):
        fields = [f"{name}={code(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
        return f"{type(node).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(code, node))}]" if isinstance(node, list) else repr(node)


def without_docstrings(tree: ast.Module) -> ast.Module:
    """A copy of `tree` without its docstrings."""
    tree = ast.parse(ast.unparse(tree))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, but not what is imported for a type checker or when a package is asked for a name."""
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not for_types and not (isinstance(child, ast.FunctionDef) and child.name == "__getattr__"):
            yield child
            yield from statements(child)


def origin(package: str, name: str) -> str:
    """Module that `from package import name` takes `name` from."""
    if f"{package}.{name}" in modules():
        return f"{package}.{name}"
    if package != "vitad":
        return package
    for node in ast.walk(parsed(package)):  # the front door imports its names late
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return node.module or package
        if isinstance(node, ast.Dict):
            for entry in zip(node.keys, node.values, strict=True):
                words = {c.value for part in entry if part for c in ast.walk(part) if isinstance(c, ast.Constant)}
                if name in words:
                    return next((m for m in modules() if m in words or m.removeprefix("vitad.") in words), package)
    return package


def imports(tree: ast.AST, package: str = "") -> Iterator[tuple[str, str]]:
    """(name in the importing code, module of the library) for each import in `tree`, a module of `package`."""
    for node in statements(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name, alias.name) for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            if base in modules():
                yield from ((alias.asname or alias.name, origin(base, alias.name)) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vitad":
            yield node.attr, origin("vitad", node.attr)


@cache
def imported_by(module: str) -> set[str]:
    tree, package = parsed(module), module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    return {name for _, name in imports(tree, package)} | registered(tree)


def registered(tree: ast.Module) -> set[str]:
    """Modules imported as `import_module(f"package.{name}")`, with the names as texts of the same module.

    Methods do not count here: a notebook depends on those that it names itself.
    """
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func)
    ]
    starts = {node.value for call in calls for node in ast.walk(call) if isinstance(node, ast.Constant)} - {METHODS}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {f"{start}{text}" for start in starts for text in texts if start != "vitad."} & set(modules())


@cache
def version(module: str, in_full: bool) -> str:
    """Digest of a module, and of the data files whose name or folder stands in it in quotes."""
    text = modules()[module].read_text()
    files = sorted(file for file in (ROOT / "vitad").rglob("*.*") if file.suffix not in (".py", ".pyc"))
    data = [
        file.read_text(errors="replace")
        for file in files
        if f'"{file.name}"' in text or f'"{file.parent.name}"' in text
    ]
    return digest("\0".join([text if in_full else code(without_docstrings(parsed(module))), *data]))


def uses(notebook: ast.Module) -> tuple[set[str], set[str]]:
    """Modules and packages that a notebook uses by name, and those among them whose source it may show."""
    imported = list(imports(notebook))
    names = {node.id for node in ast.walk(notebook) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(notebook) if isinstance(node, ast.Attribute)}
    texts = {node.value for node in ast.walk(notebook) if isinstance(node, ast.Constant)}
    methods = {m for m in modules() if m.startswith(METHODS) and ("METHODS" in names or m.rpartition(".")[2] in texts)}
    calls = [
        node
        for node in ast.walk(notebook)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("getsource", "source")
    ]
    shown = {node.id for call in calls for node in ast.walk(call) if isinstance(node, ast.Name)}
    in_full = {module for name, module in imported if name in shown or module.startswith(METHODS)}
    if "departures" in names:  # this table shows the comments beside the settings
        in_full |= methods
    return {module for _, module in imported} | methods, in_full


def sources(nb: nbformat.NotebookNode) -> dict:
    """Digests of what the outputs of a notebook depend on."""
    cells = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    plain = ["\n".join(line for line in cell.splitlines() if not line.startswith(("%", "!"))) for cell in cells]
    todo, in_full = uses(ast.parse("\n".join(plain)))
    library: dict[str, str] = {}
    while todo:
        module = todo.pop()
        library[module] = version(module, any(f"{module}.".startswith(f"{shown}.") for shown in in_full))
        todo |= imported_by(module) - set(library)
    return {"cells": digest("\0".join(cells)), "library": dict(sorted(library.items())), "records": records()}


@cache
def records() -> str:
    files = sorted([*(ROOT / "results").rglob("record.json"), *(ROOT / "experiments").rglob("*.json")])
    return digest("\0".join(f"{file.relative_to(ROOT)}\0{file.read_text()}" for file in files))


def changes(nb: nbformat.NotebookNode) -> list[str]:
    """What differs from when the notebook was executed; empty if nothing does."""
    then, now = nb.metadata.get("vitad", {}).get("sources"), sources(nb)
    if then is None:
        return ["it was not executed with make notebooks"]
    library = sorted(m for m in {*then["library"], *now["library"]} if then["library"].get(m) != now["library"].get(m))
    return [*(part for part in ("cells", "records") if then[part] != now[part]), *library]


def lagging() -> dict[Path, list[str]]:
    """{notebook: what changed} for the committed notebooks that lag."""
    found = {path: changes(nbformat.read(path, 4)) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    return {path: changed for path, changed in found.items() if changed}


def chosen(only: str | None, everything: bool) -> list[Path]:
    """Notebooks to execute; exits when a name of `only` is unknown."""
    paths = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    if only:
        for name in only.split():
            if name not in paths:
                near = get_close_matches(name, paths, n=1)
                sys.exit(f"notebooks: no notebook {name}" + (f"; did you mean {near[0]}?" if near else ""))
        return [paths[name] for name in only.split()]
    if everything:
        return list(paths.values())
    behind = lagging()
    for path, changed in behind.items():
        print(f"{path.stem} lags: {', '.join(changed)}")
    return list(behind)


def with_small_pictures(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with its PNG pictures of more than `LARGE` bytes as JPEG, where that is smaller."""
    shown = [output.data for cell in nb.cells for output in cell.get("outputs", []) if "data" in output]
    for data in shown:
        if len(text := data.get("image/png", "")) > LARGE:
            small = io.BytesIO()
            Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").save(small, "JPEG", quality=88, optimize=True)
            packed = base64.b64encode(small.getvalue()).decode()
            if len(packed) < len(text):
                del data["image/png"]
                data["image/jpeg"] = packed
    return nb


def main(arguments: list[str]) -> None:
    given = options("notebooks", arguments, {"only": str, "all": bool, "jobs": whole_number})
    tasks = []
    for path in chosen(given.get("only"), given.get("all", False)):
        folder = BUILD / "notebooks" / path.stem
        shutil.rmtree(folder, ignore_errors=True)
        metadata = {"vitad": {"sources": sources(nbformat.read(path, 4))}}
        tasks.append(Task(path, folder, path, metadata=metadata, finish=with_small_pictures))
    if not tasks:
        print("notebooks: all are up to date")
        return
    failures = execute_all(tasks, given.get("jobs"), len(tasks), go_on=True)
    if failures:
        sys.exit(f"notebooks: {len(failures)} of {len(tasks)} failed and are as before; the others are written")


if __name__ == "__main__":
    main(sys.argv[1:])
