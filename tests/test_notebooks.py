"""The committed notebooks hold the outputs of today's library and records."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))

import notebooks  # noqa: E402  book/notebooks.py


def test_committed_notebooks_are_up_to_date():
    behind = notebooks.lagging()
    lines = [f"  {path.stem}: {', '.join(changed)}" for path, changed in behind.items()]
    assert not behind, "\n".join(["these notebooks lag; `make notebooks` executes them again:", *lines])
