"""Paint on the lab page that `make book` has built, with the mouse and with the keyboard, in a headless browser.

    python book/check_lab.py [BROWSER=firefox] [PICTURES=folder]

Once from a file and once from a server whose root lies above the book. Every method is loaded; its map has to rise at
least threefold below the stroke; no request leaves the page's own address, and nothing is reported in the console.
BROWSER is Chromium where none is named. PICTURES gets its screenshots, wide and narrow, light and dark.
"""

import sys
from pathlib import Path

from browsers import Page, browser, opened, served
from execution import BUILD, options

RISE = 3  # mean of a map below the stroke, after it against before
CUT = ("hole", 14, 0, ((0.33, 0.49), (0.45, 0.6), (0.62, 0.72)))  # black, across the metal of the first gear
SOLUTIONS = (  # of the page's exercises: brush, size, brightness, stroke, which method calls it defective
    ("scratch", 3, 30, ((0.3, 0.7), (0.55, 0.64), (0.65, 0.7)), {"anovit": False, "patchknn": True}),
    ("hole", 10, 220, ((0.06, 0.9), (0.07, 0.9)), {"anovit": True, "patchknn": True}),
    ("hole", 14, 30, ((0.35, 0.5), (0.36, 0.5)), {"anovit": True}),
    ("hole", 6, 30, ((0.35, 0.5), (0.355, 0.5)), {"anovit": False}),
    ("hole", 4, 30, ((0.35, 0.5), (0.355, 0.5)), {"patchknn": True}),
)


LAB = "document.getElementById('lab').lab"
QUIET = f"{LAB}.methods.every((m) => !m.session || m.seen === {LAB}.picture.pixels)"
BELOW = f"""(() => {{  // mean of each map below the last stroke
    const {{ picture, methods }} = {LAB}, side = picture.side;
    return Object.fromEntries(methods.filter((m) => m.map).map((m) => {{
        const S = Math.sqrt(m.map.length);
        let sum = 0, n = 0;
        for (let i = 0; i < S * S; i++) {{
            const x = Math.floor((i % S + 0.5) * side / S), y = Math.floor((Math.floor(i / S) + 0.5) * side / S);
            if (picture.stroke[y * side + x] > 0.5) [sum, n] = [sum + m.map[i], n + 1];
        }}
        return [m.name, sum / n];
    }}));
}})()"""


def paint(page: Page, kind: str, size: int, brightness: int, points: tuple[tuple[float, float], ...]) -> None:
    """A stroke of the mouse, and wait until every method has looked at it."""
    page.evaluate(f"document.querySelector('#lab input[value={kind}]').click()")
    for place, value in enumerate((size, brightness)):
        page.evaluate(f"document.querySelectorAll('#lab input[type=range]')[{place}].value = {value}")
    page.stroke("#lab .lab-canvas canvas", *points)
    page.wait(QUIET)


def check(page: Page, address: str, own: str) -> dict[str, float]:
    """How much each map rises below a stroke of the mouse. Ends with a message where the page fails."""
    page.open(address)
    page.wait(LAB)
    for button in range(page.evaluate(f"{LAB}.methods.length")):
        page.evaluate(f"{LAB}.methods[{button}].button.click()")
        page.wait(f"{LAB}.methods[{button}].map")
    paint(page, *CUT)
    after = page.evaluate(BELOW)
    page.evaluate(f"{LAB}.picture.undo()")  # the stroke's place stays known
    page.wait(QUIET)
    before = page.evaluate(BELOW)
    rise = {name: after[name] / before[name] for name in after}

    wrong = []
    for kind, size, brightness, points, expected in SOLUTIONS:
        paint(page, kind, size, brightness, points)
        said = page.evaluate(f"Object.fromEntries({LAB}.methods.map((m) => [m.name, m.score > m.threshold]))")
        differ = [name for name in expected if said[name] != expected[name]]
        wrong += [f"{kind} of {size} px: {name} says otherwise than the page" for name in differ]
        page.evaluate(f"{LAB}.picture.undo()")

    page.evaluate("document.querySelector('#lab .lab-canvas canvas').focus()")
    untouched = page.evaluate(f"Array.from({LAB}.picture.pixels).join()")
    for key in ["ArrowRight"] * 3 + ["ArrowUp"]:
        page.press(key, shift=True)
    page.press("ArrowDown")
    page.press(" ")
    page.wait(QUIET)
    painted = page.evaluate(f"Array.from({LAB}.picture.pixels).join()")

    problems = [f"the map of {name} rises only {by:.1f}-fold" for name, by in rise.items() if not by >= RISE]
    problems += wrong + ["keys do not paint"] * (painted == untouched)
    problems += [f"asks {a}" for a in page.requests if not a.startswith((own, "data:", "blob:"))]
    problems += [f"console: {text}" for text in page.problems]
    if problems:
        sys.exit("\n".join([f"lab: {address}", *problems]))
    return rise


def main(program: str, html: Path, pictures: Path | None) -> None:
    file = html / "book" / "lab.html"
    if not (html / "_static" / "lab" / "index.js").exists():
        sys.exit("lab: the page is not there. `make book` builds it.")
    server = served(html.parent)
    root = f"http://127.0.0.1:{server.server_port}/"
    with opened(program) as page:
        for address, own in ((file.as_uri(), "file://"), (f"{root}{html.name}/book/lab.html", root)):
            rise = check(page, address, own)
            print(f"lab: {address}: " + ", ".join(f"{name} {by:.1f}-fold" for name, by in rise.items()))
        for width in (1280, 390) if pictures else ():
            for dark in (False, True):
                pictures.mkdir(parents=True, exist_ok=True)
                name = f"{width}-{'dark' if dark else 'light'}"
                page.open(file.as_uri(), width, dark)
                page.wait(LAB)
                page.picture(pictures / f"{name}-before.png")
                for button in range(page.evaluate(f"{LAB}.methods.length")):
                    page.evaluate(f"{LAB}.methods[{button}].button.click()")
                    page.wait(f"{LAB}.methods[{button}].map")
                paint(page, *CUT)
                page.picture(pictures / f"{name}-after.png")
    server.shutdown()


if __name__ == "__main__":
    given = options("lab", sys.argv[1:], {"browser": str, "pictures": Path})
    main(browser(given.get("browser"), "BROWSER"), BUILD / "html", given.get("pictures"))
