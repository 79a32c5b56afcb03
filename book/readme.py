"""Write the lists of methods and data sets into README.md, from what the library knows of itself.

    python book/readme.py

Each list stands between two comments, such as `<!-- methods -->` and `<!-- /methods -->`.
"""

import re
from pathlib import Path

from vitad import data, methods

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def summary(module) -> str:
    """First line of a docstring, without its full stop."""
    return module.__doc__.splitlines()[0].removesuffix(".")


def method_table() -> str:
    rows = [row("name", "method", "source"), row("---", "---", "---")]
    for name in methods.METHODS:
        module = methods.get(name)
        file = f"{module.__name__.replace('.', '/')}.py"
        rows.append(row(f"[`{name}`]({file})", summary(module), module.PAPER))
    return "\n".join(rows)


def dataset_table() -> str:
    rows = [row("name", "data set", "licence"), row("---", "---", "---")]
    for name, dataset in (data.DATASETS | data.TEXTURE_SETS).items():
        source = dataset.source
        title = f"[{dataset.title}]({source.page})" if source else dataset.title
        licence = re.sub(r" \(https?:[^)]*\)", "", source.licence) if source else "–"
        rows.append(row(f"`{name}`", title, licence))
    return "\n".join(rows)


LISTS = {"methods": method_table, "datasets": dataset_table}


def updated(text: str) -> str:
    """`text` with every list as it is today."""
    for name, table in LISTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, table=table: f"{match[1]}\n{table()}\n\n{match[2]}", text)
        assert count == 1, f"README.md needs the comments <!-- {name} --> and <!-- /{name} --> once"
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
