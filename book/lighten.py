"""Make a built site smaller, without a change to what is seen.

* Pictures become WebP where that is smaller: a third of their bytes and less.
* Notebooks to download come without outputs, which their pages show.
* What only the authors of the theme use goes: maps of its scripts, its templates and translations.
"""

import re
import shutil
from pathlib import Path

import nbformat
from execution import without_outputs
from PIL import Image

QUALITY = 88  # of WebP, where it is lossy: no difference is seen in photographs and plots at twice their size


def lighten(html: Path) -> None:
    """Change the site in the folder `html` in place."""
    for notebook in (html / "_sources").rglob("*.ipynb"):
        nbformat.write(without_outputs(nbformat.read(notebook, 4)), notebook)
    for pattern in ("*.map", "*macros.html"):
        for needless in (html / "_static").rglob(pattern):
            needless.unlink()
    shutil.rmtree(html / "_static" / "locales", ignore_errors=True)
    names = {}
    for picture in sorted((html / "_images").glob("*.png")):
        small = picture.with_suffix(".webp")
        with Image.open(picture) as image:
            image.save(small, quality=QUALITY)
        if small.stat().st_size < picture.stat().st_size:
            names[picture.name] = small.name
            picture.unlink()
        else:
            small.unlink()
    pattern = re.compile(r"(?<=_images/)[\w.-]+\.png")
    for page in html.rglob("*.html"):
        text = page.read_text()
        changed = pattern.sub(lambda match: names.get(match[0], match[0]), text)
        if changed != text:
            page.write_text(changed)
