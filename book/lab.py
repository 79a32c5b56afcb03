"""What the lab page computes with, as scripts: models of the book's runs, pictures to paint on, and the runtime.

    python book/lab.py ONNXRUNTIME=1.30.0    book/_static/vendor/onnxruntime-web/runtime.js again, from npm

A page that was opened from a file may load scripts and nothing else. So each of these files is a script that hands an
object to the function `labFile` of _static/lab.js. Its `parts` are bytes, as gzip in text that is a fifth smaller than
base64: 15 bits a character, in UTF-16. book/build.py calls `make` when the notebooks have run:

    index.js     what the page shows before anything is loaded: pictures, colours, and of each method the scores of the
                 test images, the threshold, and the size of its file
    METHOD.js    the ONNX file of `vitad export`, its weights stored in int8
"""

import gzip
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import onnx
import onnxruntime
from execution import ROOT, options
from onnx import helper, numpy_helper
from PIL import Image

from vitad import data, runs
from vitad.export import to_onnx
from vitad.files import atomic_write
from vitad.metrics import auroc
from vitad.predict import Threshold
from vitad.show.plots import HEAT, heat_range

FORMAT = 1  # goes up by one where lab.js would have to change
RUNTIME = ROOT / "book" / "_static" / "vendor" / "onnxruntime-web" / "runtime.js"
LARGE = 4096  # weights; fewer stay as they are
LEVELS = 127  # of a weight, on either side of 0
FALSE_ALARMS = 0.05
LOST = 0.01  # image AUROC that storing the weights may cost
METHODS = {  # what is run, unless a chapter has, and what the page says about it
    "l2cae": (
        {},
        "l2cae: a convolutional autoencoder",
        "It squeezes the picture through 100 numbers and draws it again. What it cannot draw stands out.",
    ),
    "anovit": (
        {},
        "anovit: a Transformer autoencoder",
        "A Vision Transformer reads the patches, a decoder draws the picture again from its tokens.",
    ),
    "vitmem": (
        {},
        "vitmem: the same with a memory",
        "Each token is replaced by a mixture of tokens of good gears, so that a defect should not pass.",
    ),
    "patchknn": (
        # One block in place of three, the middle one: the network ends there, and its file is a third smaller.
        {"blocks": (6,), "sampling": "coreset", "bank_size": 1000},
        "patchknn: neighbours among tokens",
        "It draws nothing. It compares the DINOv2 token of each patch with 1,000 tokens of good gears.",
    ),
}
PRESET = "demo"
PICTURES = {"good gear 1": "gear/test/good/000.png", "good gear 2": "gear/test/good/007.png"}


def script(name: str, parts: dict[str, bytes], **about) -> bytes:
    """The script that hands `about` and `parts` to the page. Its first character tells a browser that it is UTF-16."""
    packed = {part: as_text(gzip.compress(content, 9, mtime=0)) for part, content in parts.items()}
    content = json.dumps({"format": FORMAT, "name": name, **about, "parts": packed}, ensure_ascii=False)
    return f"\ufefflabFile({content});\n".encode("utf-16-le")


def as_text(content: bytes) -> tuple[int, str]:
    """How many bytes, and the characters U+3000 to U+AFFF that hold 15 bits each."""
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    groups = np.pad(bits, (0, -len(bits) % 15)).reshape(-1, 15).astype(np.uint16)
    values = 0x3000 + (groups << np.arange(14, -1, -1, dtype=np.uint16)).sum(1, dtype=np.uint16)
    return len(content), values.astype("<u2").tobytes().decode("utf-16-le")


def in_int8(model: onnx.ModelProto, levels: int = LEVELS) -> onnx.ModelProto:
    """The same graph with each matrix of trained weights stored as int8 and a scale for each channel.

    `DequantizeLinear` makes float32 of them, and all else is computed as before. Constants that are not trained, such
    as the matrices of a blur, stay as they are.
    """
    small = onnx.ModelProto()
    small.CopyFrom(model)
    graph = small.graph
    weights = [w for w in graph.initializer if w.name.startswith("model.") and np.prod(w.dims) >= LARGE]
    graph.ClearField("value_info")  # shapes within, which a runtime infers
    for stored in weights:
        q, scale, axis = quantised(numpy_helper.to_array(stored), levels)
        name = stored.name
        graph.initializer.remove(stored)
        graph.initializer.extend([numpy_helper.from_array(q, f"{name}.q"), numpy_helper.from_array(scale, f"{name}.s")])
        graph.node.insert(0, helper.make_node("DequantizeLinear", [f"{name}.q", f"{name}.s"], [name], axis=axis))
    return small


def quantised(weight: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, int]:
    """int8 of the weight's shape, the scale (C,) of each channel, and the axis of the channels that loses least."""
    found = []
    for axis in range(weight.ndim):
        others = tuple(k for k in range(weight.ndim) if k != axis)
        scale = np.abs(weight).max(others, keepdims=True).clip(1e-12) / levels
        q = np.rint(weight / scale)
        found.append((np.square(q * scale - weight).sum(), q.astype(np.int8), scale.ravel().astype(np.float32), axis))
    return min(found, key=lambda f: f[0])[1:]


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """As the page makes it."""
    chosen = onnxruntime.SessionOptions()
    chosen.log_severity_level = 3  # errors: it warns of constants that it computes later
    chosen.add_session_config_entry("session.disable_quant_qdq", "1")  # weights become float32 once, not in every run
    return onnxruntime.InferenceSession(model.SerializeToString(), chosen, providers=["CPUExecutionProvider"])


def looked_at(model: onnx.ModelProto, images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,) and maps (N,S,S) of images (1,H,W,3), one at a time as on the page."""
    running = session(model)
    found = [running.run(["score", "map"], {"image": image}) for image in images]
    scores, maps = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if not np.isfinite(maps).all() or not np.isfinite(scores).all():
        sys.exit("lab: a score or a map is not a number")  # which comparisons would pass over
    return scores, maps


def pixels(record: data.Record) -> np.ndarray:
    """(H,W,3) uint8"""
    return np.asarray(Image.open(record.path).convert("RGB"))


def run_of(method: str, folders: Iterable[Path], own: Path) -> dict:
    """The finished run of the lab's method below one of the folders; where there is none, it is made in `own`."""
    request = runs.Request(method, category="gear", preset=PRESET).override(**METHODS[method][0])
    for folder in folders:
        for record in runs.read_records(folder):
            if runs.hash_of(record) == request.hash and (record["folder"] / "checkpoint.safetensors").exists():
                return record
    print(f"lab: no chapter has run {method}, so it is trained now", flush=True)
    return runs.run(request, own / method) | {"folder": own / method}


def method_of(record: dict) -> tuple[dict, onnx.ModelProto]:
    """What the page says of a run before its file is loaded, and the file."""
    with tempfile.TemporaryDirectory() as folder:
        exact = onnx.load(to_onnx(record["folder"], Path(folder, "model.onnx"), FALSE_ALARMS))
    model, name = in_int8(exact), record["method"]
    tests = data.find(record["dataset"], None, record["category"]).test
    images, bad = [pixels(r)[None] for r in tests], np.array([r.label == 1 for r in tests])
    scores, maps = looked_at(model, images)
    found, before = auroc(scores, bad), auroc(looked_at(exact, images)[0], bad)
    if not abs(found - before) <= LOST:
        sys.exit(f"lab: stored in int8, {name} has the image AUROC {found:.3f} instead of {before:.3f}")
    _, title, sentence = METHODS[name]
    about = {
        "name": name,
        "title": title,
        "sentence": sentence,
        "redraws": len(model.graph.output) == 3,
        "threshold": Threshold.of_good(scores[~bad], FALSE_ALARMS).value,
        "range": heat_range(maps),
        "good": [float(f"{s:.4g}") for s in scores[~bad]],
        "defective": [float(f"{s:.4g}") for s in scores[bad]],
    }
    return about, model


def make(folders: Iterable[Path], own: Path, out: Path) -> Path:
    """Write index.js and a METHOD.js for each method into `out`, index.js last; nothing is done where it is there.

    Runs are looked for in `folders`; those that are not there are made in `own`.
    """
    if (out / "index.js").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    found = data.find("toy", None, "gear")
    pictures = {r.path.relative_to(found.root).as_posix(): pixels(r) for r in found.test}
    parts = {name: pictures[path] for name, path in PICTURES.items()}
    about = []
    for method in METHODS:
        described, model = method_of(run_of(method, folders, own))
        file = out / f"{method}.js"
        file.write_bytes(script(method, {"model": model.SerializeToString()}))
        about.append(described | {"file": f"lab/{file.name}", "bytes": file.stat().st_size})
        print(f"lab: {method}, {file.stat().st_size / 1e6:.1f} MB", flush=True)
    colours = (matplotlib.colormaps[HEAT](np.arange(256))[:, :3] * 255).round().astype(int).tolist()
    runtime = {"file": RUNTIME.relative_to(ROOT / "book" / "_static").as_posix(), "bytes": RUNTIME.stat().st_size}
    index = {"side": len(next(iter(parts.values()))), "methods": about, "colours": colours, "runtime": runtime}
    with atomic_write(out / "index.js") as temporary:
        Path(temporary).write_bytes(script("index", {name: p.tobytes() for name, p in parts.items()}, **index))
    return out


def fetch_runtime(version: str) -> None:
    """Write runtime.js: the runtime's code and its WebAssembly, unchanged, from the npm package."""
    with tempfile.TemporaryDirectory() as folder:
        package = f"onnxruntime-web@{version}"
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as packed:
            files = {"code": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}
            parts = {part: packed.extractfile(f"package/dist/{name}").read() for part, name in files.items()}
    RUNTIME.write_bytes(script("runtime", parts, package=package))


if __name__ == "__main__":
    given = options("lab", sys.argv[1:], {"onnxruntime": str})
    if "onnxruntime" not in given:
        sys.exit(__doc__)
    fetch_runtime(given["onnxruntime"])
