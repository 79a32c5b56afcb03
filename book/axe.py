"""Check the pages that `make book` has built for what shuts readers out: axe-core in headless Chromium, both schemes.

    python book/axe.py [CHROMIUM=/path/to/chromium] [ONLY="anovit metrics"]

axe-core is fetched with npm once. Findings that it calls serious or critical are printed, and make it fail.
"""

import json
import re
import subprocess
import sys
import tarfile
from html import unescape
from pathlib import Path

from browsers import browser
from execution import BUILD, options
from tqdm import tqdm

AXE = "axe-core@4.14.1"
SCHEMES = ("light", "dark")
# Chromium writes the page as it is when the virtual time is over: widgets are drawn, and axe is done.
FLAGS = ("--headless=new", "--no-sandbox", "--window-size=1280,900", "--virtual-time-budget=60000", "--dump-dom")
CHECK = """<script>localStorage.mode = localStorage.theme = document.documentElement.dataset.mode = "{scheme}"</script>
<script>{axe}</script>
<script>addEventListener("load", () => setTimeout(async () => {{
    const found = (await axe.run(document, {{ resultTypes: ["violations"] }})).violations;
    const bad = found.filter((v) => ["serious", "critical"].includes(v.impact)).map((v) => ({{
        rule: v.id, help: v.help, places: v.nodes.map((n) => n.html.slice(0, 200))
    }}));
    const answer = document.createElement("pre");
    answer.id = "axe";
    answer.textContent = JSON.stringify(bad);
    document.body.replaceChildren(answer);
}}, 8000))</script>"""


def axe() -> str:
    """The source of axe-core."""
    folder = BUILD / "axe"
    packed = folder / f"{AXE.replace('@', '-')}.tgz"
    if not packed.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"axe: npm could not fetch {AXE}: {error}")
    with tarfile.open(packed) as package:
        return package.extractfile("package/axe.min.js").read().decode()


def findings(page: Path, scheme: str, source: str, chromium: str) -> list[dict]:
    """Serious findings on a page: `rule`, `help`, and `places` as HTML."""
    checked = page.with_name(f".axe-{page.name}")
    check = CHECK.format(scheme=scheme, axe=source)
    checked.write_text(page.read_text().replace("<head>", f"<head>{check}", 1))
    try:
        done = subprocess.run([chromium, *FLAGS, checked.as_uri()], capture_output=True, text=True)
    finally:
        checked.unlink()
    found = re.search(r'<pre id="axe">(.*?)</pre>', done.stdout, re.DOTALL)
    if not found:
        sys.exit(f"axe: it did not finish on {page}:\n{done.stderr[-2000:]}")
    return json.loads(unescape(found[1]))


def main(chromium: str, only: list[str]) -> None:
    pages = [p for folder in ("book", "notebooks") for p in sorted((BUILD / "html" / folder).glob("*.html"))]
    pages = [p for p in pages if not only or p.stem in only]
    if not pages:
        sys.exit("axe: no page is there. `make book` builds them.")
    source, count = axe(), 0
    for page in tqdm(pages, "axe", unit="page"):
        for scheme in SCHEMES:
            for found in findings(page, scheme, source, chromium):
                count += len(found["places"])
                tqdm.write(f"{page.stem}, {scheme}: {found['help']} ({found['rule']})")
                for place in found["places"][:3]:
                    tqdm.write(f"    {place}")
    print(f"axe: {count} serious findings on {len(pages)} pages")
    sys.exit(count > 0)


if __name__ == "__main__":
    given = options("axe", sys.argv[1:], {"chromium": str, "only": str.split})
    main(browser(given.get("chromium")), given.get("only", []))
