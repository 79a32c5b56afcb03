"""Sphinx extension: reference pages from the docstrings of the library.

A comment in a page under book/ is replaced while the book is built:

    <!-- front door -->              what `import vitad` offers
    <!-- api vitad.data -->          a module, or a package with all that is in it and has no page of its own
    <!-- api others -->              every module that no other page names

Private modules (`_name`, `__main__`) are left out. A module that is added to the library appears by itself.
"""

import pkgutil
import re
from pathlib import Path

import vitad

MARKER = re.compile(r"<!-- api ([\w.]+) -->")
DIRECTIVE = """
```{{eval-rst}}
.. {directive}:: {name}
{options}
```
"""


def public_modules() -> list[str]:
    """Names of all public modules and packages of the library, packages before what is in them."""
    names = [module.name for module in pkgutil.walk_packages(vitad.__path__, "vitad.")]
    return sorted(name for name in names if not any(part.startswith("_") for part in name.split(".")))


def chosen_modules(name: str, named: set[str]) -> list[str]:
    """Modules that the marker `name` stands for; `named` are the names in the markers of all pages."""

    def below(package: str) -> list[str]:
        return [module for module in public_modules() if f"{module}.".startswith(f"{package}.")]

    if name != "others":
        apart = {module for other in named if other.startswith(f"{name}.") for module in below(other)}
        return [module for module in below(name) if module not in apart]
    elsewhere = {module for package in named for module in below(package)}
    return [module for module in public_modules() if module not in elsewhere]


def directive(kind: str, name: str, *options: str) -> str:
    return DIRECTIVE.format(directive=kind, name=name, options="\n".join(f"   :{option}:" for option in options))


def sections(name: str, named: set[str]) -> str:
    """A section for each module that the marker `name` stands for."""
    modules = chosen_modules(name, named)
    return "\n".join(f"## `{m}`\n{directive('automodule', m, 'members', 'ignore-module-all')}" for m in modules)


def front_door() -> str:
    """Each name that `vitad` exports. Its own page indexes it; here it is only shown."""
    parts = []
    for name in getattr(vitad, "__all__", ()):
        value = getattr(vitad, name)
        kind = "autoclass" if isinstance(value, type) else "autofunction"
        if callable(value):
            parts.append(f"## `vitad.{name}`\n{directive(kind, f'vitad.{name}', 'no-index')}")
    return "\n".join(parts)


def expand(app, docname, source):
    if not docname.startswith("book/"):
        return
    pages = Path(app.srcdir, "book").rglob("*.md")
    named = {name for page in pages for name in MARKER.findall(page.read_text())} - {"others"}
    text = MARKER.sub(lambda match: sections(match[1], named), source[0])
    source[0] = text.replace("<!-- front door -->", front_door())


def setup(app):
    for name in ("autodoc", "napoleon", "viewcode"):
        app.setup_extension(f"sphinx.ext.{name}")
    app.connect("source-read", expand)
    return {"parallel_read_safe": True}
