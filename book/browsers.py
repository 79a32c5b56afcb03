"""Browsers without a window: where they are, a page that does what a script says, and a server for it to ask."""

import base64
import fcntl
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FIREFOX = ("firefox", "firefox-esr")
FLAGS = ("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu")
KEYS = {" ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def browser(asked: str | None, option: str = "CHROMIUM") -> str:
    """The program to start: the one that the option asks for, or the first of `NAMES` that is there."""
    names = FIREFOX if asked == "firefox" else (asked,) if asked else NAMES
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        script = Path(sys.argv[0]).stem
        package = "firefox-esr" if asked and "firefox" in asked else "chromium"
        sys.exit(
            f"{script}: no {asked or 'Chromium'} here (Debian: apt install {package}). Name it with {option}=PATH."
        )
    return found


class Page:
    """What both browsers do in the same way. A page keeps what it asked for and reported since it was opened."""

    def __init__(self):
        self.problems: list[str] = []  # what the console reports
        self.requests: list[str] = []  # addresses

    def __enter__(self):
        return self

    def wait(self, condition: str, seconds: float = 120):
        """Until an expression in JavaScript is true; `RuntimeError` where it does not become so."""
        held = f"""new Promise((done, failed) => {{
            const began = Date.now(), look = setInterval(() => {{
                const found = {condition};
                if (found || Date.now() - began > {1000 * seconds}) {{
                    clearInterval(look);
                    const shown = document.querySelector("main")?.innerText;
                    found ? done(true) : failed(new Error(`not after {seconds:g} s: ${{shown}}`));
                }}
            }}, 50);
        }})"""
        self.evaluate(held)

    def places(self, selector: str, points: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
        """Where these places of an element, shares of its width and height, lie in the window (px)."""
        box = self.evaluate(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{ block: "center", behavior: "instant" }});
            return element.getBoundingClientRect().toJSON();
        }})()""")
        return [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]


class Chromium(Page):
    """A page in headless Chromium that is spoken to over a pipe, so that no package is needed for it."""

    def __init__(self, program: str):
        super().__init__()
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
        page = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{part}.enable")

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
        places = self.places(selector, points)
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


class Firefox(Page):
    """A page in headless Firefox that is spoken to over WebDriver BiDi."""

    KEYS = {
        "ArrowLeft": "\ue012",
        "ArrowUp": "\ue013",
        "ArrowRight": "\ue014",
        "ArrowDown": "\ue015",
        "Shift": "\ue008",
    }

    def __init__(self, program: str):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [program, "--headless", "--no-remote", "--profile", self.folder.name, "--remote-debugging-port=0"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        said = []
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"WebDriver BiDi listening on (ws://\S+)", line):
                break
        else:
            raise RuntimeError(f"{program} did not start: {''.join(said)[-2000:]}")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # a full pipe would stop it
        self.socket = websocket.create_connection(f"{found[1]}/session", suppress_origin=True)
        self.number = 0
        self.ask("session.new", capabilities={})
        self.context = self.ask("browsingContext.getTree")["contexts"][0]["context"]
        self.ask("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])

    def __exit__(self, *_):
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()

    def ask(self, method: str, **parameters) -> dict:
        """The answer to a command. Raises `RuntimeError` where it is an error."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            about = answer.get("params", {})
            if answer.get("method") == "network.beforeRequestSent":
                self.requests.append(about["request"]["url"])
            elif answer.get("method") == "log.entryAdded" and about["level"] in ("warn", "error"):
                self.problems.append(f"{about['text']} {(about.get('source') or {}).get('url', '')}")
        if answer["type"] == "error":
            raise RuntimeError(f"{method}: {answer['message']}")
        return answer["result"]

    def evaluate(self, expression: str):
        """The value of an expression in JavaScript; a promise is waited for."""
        held = f"Promise.resolve({expression}).then((found) => JSON.stringify(found))"
        answer = self.ask("script.evaluate", expression=held, target={"context": self.context}, awaitPromise=True)
        if answer["type"] == "exception":
            raise RuntimeError(answer["exceptionDetails"]["text"])
        return json.loads(answer["result"].get("value", "null"))

    def open(self, address: str, width: int = 1280, dark: bool = False):
        """Go to a page in a window of this width."""
        self.ask("browsingContext.setViewport", context=self.context, viewport={"width": width, "height": 1000})
        self.problems.clear(), self.requests.clear()
        self.ask("browsingContext.navigate", context=self.context, url=address, wait="complete")
        if dark:  # the protocol has no word for what a reader prefers
            self.evaluate("document.documentElement.dataset.theme = 'dark'")

    def stroke(self, selector: str, *points: tuple[float, float]):
        """Drag the mouse through these places of an element, as shares of its width and height."""
        moves = [{"type": "pointerMove", "x": round(x), "y": round(y)} for x, y in self.places(selector, points)]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        self._act({"type": "pointer", "id": "mouse", "actions": actions})

    def press(self, key: str, shift: bool = False):
        """A key of `KEYS`, to what has the focus."""
        pressed = [self.KEYS["Shift"]] * shift + [self.KEYS.get(key, key)]
        actions = [{"type": "keyDown", "value": k} for k in pressed]
        actions += [{"type": "keyUp", "value": k} for k in reversed(pressed)]
        self._act({"type": "key", "id": "keys", "actions": actions})

    def _act(self, source: dict):
        self.ask("input.performActions", context=self.context, actions=[source])

    def picture(self, file: Path):
        """A screenshot of the whole page."""
        shot = self.ask("browsingContext.captureScreenshot", context=self.context, origin="document")
        file.write_bytes(base64.b64decode(shot["data"]))


def opened(program: str) -> Chromium | Firefox:
    """A page in this browser."""
    return (Firefox if "firefox" in Path(program).name else Chromium)(program)


def served(folder: Path) -> http.server.ThreadingHTTPServer:
    """A server of this machine whose root is the folder, running until `shutdown`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
