"""Make a built site smaller, without a change to what is seen.

* Pictures become WebP where that is smaller: a third of their bytes and less.
* Notebooks to download come without outputs, which their pages show.
* What only the authors of the theme use goes: maps of its scripts, its templates and translations.
* Icons come as WOFF2, which every browser of the last ten years reads, and not as TrueType beside it.
* Names and punctuation in code, which have the colour of plain text, get no element of their own: a fifth of the HTML.
"""

import re
import shutil
from pathlib import Path

import nbformat
from execution import without_outputs
from PIL import Image

QUALITY = 88  # of WebP, where it is lossy: no difference is seen in photographs and plots at twice their size
TRUETYPE = re.compile(r""",\s*url\(["']?[^)"']+\.ttf["']?\)\s*format\(["']truetype["']\)""")  # as a second choice


def lighten(html: Path) -> None:
    """Change the site in the folder `html` in place."""
    for notebook in (html / "_sources").rglob("*.ipynb"):
        nbformat.write(without_outputs(nbformat.read(notebook, 4)), notebook)
    for pattern in ("*.map", "*macros.html"):
        for needless in (html / "_static").rglob(pattern):
            needless.unlink()
    shutil.rmtree(html / "_static" / "locales", ignore_errors=True)
    for style in (html / "_static").rglob("*.css"):
        style.write_text(TRUETYPE.sub("", style.read_text()))
    for font in (html / "_static").rglob("*.ttf"):
        if font.with_suffix(".woff2").exists():
            font.unlink()
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
    png = re.compile(r"(?<=_images/)[\w.-]+\.png")
    plain = re.compile(rf'<span class="(?:{"|".join(plain_classes(html)) or "-"})">([^<]*)</span>')
    for page in html.rglob("*.html"):
        text = page.read_text()
        changed = plain.sub(r"\1", png.sub(lambda match: names.get(match[0], match[0]), text))
        if changed != text:
            page.write_text(changed)


def plain_classes(html: Path) -> list[str]:
    """Classes of code whose only rule, light and dark, is the colour that code has anyway."""
    style = html / "_static" / "pygments.css"
    if not style.exists():
        return []
    rules = re.findall(
        r'^html\[data-theme="(\w+)"\] \.highlight ?(?:\.(\w+) )?\{(.*?)\}', style.read_text(), re.MULTILINE
    )
    colours = {scheme: body.split("color:")[1].strip() for scheme, name, body in rules if not name}
    found: dict[str, list[bool]] = {}
    for scheme, name, body in rules:
        if name:
            found.setdefault(name, []).append(body.strip() == f"color: {colours.get(scheme)}")
    return sorted(name for name, same in found.items() if len(same) == len(colours) and all(same))
