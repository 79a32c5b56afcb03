"""Paint on the lab page that `make book` has built, with the mouse and with the keyboard, in headless Chromium.

    python book/check_lab.py [CHROMIUM=/path/to/chromium] [PICTURES=folder]

Once from a file and once from a server whose root lies above the book. Every method is loaded; its map has to rise at
least threefold below the stroke; no request leaves the page's own address, and nothing is reported in the console.
PICTURES gets screenshots, wide and narrow, light and dark.
"""

import base64
import fcntl
import functools
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from execution import BUILD, options
from pdf import browser

RISE = 3  # mean of a map below the stroke, after it against before
CUT = ("hole", 14, 0, ((0.33, 0.49), (0.45, 0.6), (0.62, 0.72)))  # black, across the metal of the first gear
SOLUTIONS = (  # of the page's exercises: brush, size, brightness, stroke, which method calls it defective
    ("scratch", 3, 30, ((0.3, 0.7), (0.55, 0.64), (0.65, 0.7)), {"anovit": False, "patchknn": True}),
    ("hole", 10, 220, ((0.06, 0.9), (0.07, 0.9)), {"anovit": True, "patchknn": True}),
    ("hole", 14, 30, ((0.35, 0.5), (0.36, 0.5)), {"anovit": True}),
    ("hole", 6, 30, ((0.35, 0.5), (0.355, 0.5)), {"anovit": False}),
    ("hole", 4, 30, ((0.35, 0.5), (0.355, 0.5)), {"patchknn": True}),
)
FLAGS = ("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu")
KEYS = {" ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Chromium:
    """A page in headless Chromium that is spoken to over a pipe, so that no package is needed for it."""

    def __init__(self, program: str):
        (theirs, self.to), (self.from_, ours) = os.pipe(), os.pipe()
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [program, *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"]
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs, ours)]

        def connect():  # Chromium reads from 3 and writes to 4
            os.dup2(high[0], 3), os.dup2(high[1], 4)

        self.process = subprocess.Popen(command, close_fds=False, preexec_fn=connect, stderr=subprocess.DEVNULL)
        for end in (theirs, ours, *high):
            os.close(end)
        self.number, self.rest, self.session = 0, b"", None
        self.problems: list[str] = []  # what the console reports
        self.requests: list[str] = []  # addresses
        page = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{part}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        os.close(self.to), os.close(self.from_)
        self.folder.cleanup()

    def ask(self, method: str, **parameters) -> dict:
        """The answer to a command of the DevTools protocol. Raises `RuntimeError` where it is an error."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self.rest:
            if not (more := os.read(self.from_, 1 << 20)):
                raise RuntimeError("Chromium has ended")
            self.rest += more
        first, _, self.rest = self.rest.partition(b"\0")
        event = json.loads(first)
        about = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(about["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif event.get("method") == "Log.entryAdded" and about["entry"]["level"] in ("warning", "error"):
            self.problems.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif event.get("method") == "Runtime.consoleAPICalled" and about["type"] in ("warning", "error"):
            self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in about["args"]))
        return event

    def evaluate(self, expression: str):
        """The value of an expression in JavaScript; a promise is waited for."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", expression))
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 120):
        """Until an expression in JavaScript is true; `RuntimeError` where it does not become so."""
        held = f"""new Promise((done, failed) => {{
            const began = Date.now(), look = setInterval(() => {{
                const found = {condition};
                if (found || Date.now() - began > {1000 * seconds}) {{
                    clearInterval(look);
                    const lab = document.getElementById("lab")?.innerText;
                    found ? done(true) : failed(new Error(`not after {seconds:g} s: ${{lab}}`));
                }}
            }}, 50);
        }})"""
        self.evaluate(held)

    def open(self, address: str, width: int = 1280, dark: bool = False):
        """Go to a page in a window of this width; the mode is the reader's, as the theme keeps it."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.problems.clear(), self.requests.clear()
        self.ask("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def stroke(self, selector: str, *points: tuple[float, float]):
        """Drag the mouse through these places of an element, as shares of its width and height."""
        box = self.evaluate(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{ block: "center", behavior: "instant" }});
            return element.getBoundingClientRect().toJSON();
        }})()""")
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        kinds = ["mousePressed", *["mouseMoved"] * (len(places) - 1)]
        for kind, (x, y) in [*zip(kinds, places, strict=True), ("mouseReleased", places[-1])]:
            moves = {"button": "left", "buttons": 0 if kind == "mouseReleased" else 1, "clickCount": 1}
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **moves)

    def press(self, key: str, shift: bool = False):
        """A key of `KEYS`, to what has the focus."""
        about = {"key": key, "code": key.strip() or "Space", "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, **about)

    def picture(self, file: Path):
        """A screenshot of the whole page."""
        width, height = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        shot = self.ask("Page.captureScreenshot")
        file.write_bytes(base64.b64decode(shot["data"]))


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


def paint(page: Chromium, kind: str, size: int, brightness: int, points: tuple[tuple[float, float], ...]) -> None:
    """A stroke of the mouse, and wait until every method has looked at it."""
    page.evaluate(f"document.querySelector('#lab input[value={kind}]').click()")
    for place, value in enumerate((size, brightness)):
        page.evaluate(f"document.querySelectorAll('#lab input[type=range]')[{place}].value = {value}")
    page.stroke("#lab .lab-canvas canvas", *points)
    page.wait(QUIET)


def check(page: Chromium, address: str, own: str) -> dict[str, float]:
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


def served(folder: Path) -> http.server.ThreadingHTTPServer:
    """A server of this machine whose root is the folder, running until `shutdown`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(chromium: str, html: Path, pictures: Path | None) -> None:
    file = html / "book" / "lab.html"
    if not (html / "_static" / "lab" / "index.js").exists():
        sys.exit("lab: the page is not there. `make book` builds it.")
    server = served(html.parent)
    root = f"http://127.0.0.1:{server.server_port}/"
    with Chromium(chromium) as page:
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
    given = options("lab", sys.argv[1:], {"chromium": str, "pictures": Path})
    main(browser(given.get("chromium")), BUILD / "html", given.get("pictures"))
