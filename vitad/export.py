"""A finished run as one ONNX file, which any runtime of ONNX computes without torch and without this library.

    vitad export runs/my-parts --to onnx --out my-parts.onnx --false-alarms 0.01

The file takes images as they are, of any size, and has the threshold with it:

    input    image (N,H,W,3) uint8, RGB
    outputs  score (N,) float32, the higher the more anomalous; map (N,S,S) float32 at the size the method works at

A method that draws images again has the output `reconstruction` (N,3,S,S) float32 as well, with values in [0,1].

Its metadata, all text: `format` (2), `vitad`, `method`, `dataset`, `category`, `preset`, `seed`, `classes` (good,
defective), `threshold` of the score, `region_threshold` of the map, and `false_alarms`, the expected share of good
images above either. It computes in float32, whatever the run did.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitad.errors import UserError
from vitad.files import atomic_write
from vitad.methods.base import Method
from vitad.predict import thresholds
from vitad.runs import load_model, read_record

FORMAT = 2  # goes up by one where a reader of the file would have to change
OPSET = 18
TOLERANCE = 1e-3  # of the range of torch's own map, and of a pixel's
EXAMPLE = """\
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model = onnxruntime.InferenceSession(sys.argv[1])
about = model.get_modelmeta().custom_metadata_map
for path in sys.argv[2:]:
    image = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    score, anomaly_map = model.run(["score", "map"], {"image": image[None]})
    print(about["classes"].split(",")[int(score[0] > float(about["threshold"]))], score[0], path)
"""


class _Whole(nn.Module):
    """A method from the pixels of a file to its score, with the preparation that an `ImageSet` does."""

    def __init__(self, model: Method) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images (N,H,W,3) uint8 -> scores (N,), maps (N,S,S), and images (N,3,S,S) where some are drawn again."""
        S = self.model.settings.image_size
        pixels = image.permute(0, 3, 1, 2).float()
        for dimension in (-1, -2):  # rows first, and whole numbers between, as Pillow has it
            pixels = _resized(pixels, S, dimension)
        maps = self.model.anomaly_map(pixels / 255).float()
        redrawn = self.model.redraw(pixels / 255)  # a runtime computes what both need only once
        return self.model.image_score(maps), maps, *([] if redrawn is None else [redrawn.float().clamp(0, 1)])


def _resized(pixels: Tensor, size: int, dimension: int) -> Tensor:
    """Pixels (N,3,H,W) of values 0 to 255 with `size` of them along -1 or -2: bilinear, anti-aliased, rounded.

    A product of matrices, since the operator `Resize` differs from Pillow by up to 13 of 255 steps.
    """
    at = torch.arange(pixels.shape[dimension], dtype=torch.float32, device=pixels.device) + 0.5
    step = (at[-1] + 0.5) / size  # as a tensor, so that the file takes images of any size
    centre = (torch.arange(size, device=pixels.device) + 0.5)[:, None] * step
    weight = (1 - (at - centre).abs() / step.clamp_min(1)).clamp_min(0)
    weight = weight / weight.sum(1, keepdim=True)
    mixed = pixels @ weight.T if dimension == -1 else weight @ pixels
    return (mixed + 0.501).floor()  # halves go up, in whatever order a runtime adds


@torch.no_grad()
def to_onnx(run: str | Path, out: str | Path, false_alarms: float = 0.05, good: Sequence[str | Path] = ()) -> Path:
    """Write the model of a finished run as an ONNX file, after ONNX Runtime has given what torch gives with it.

    Parameters
    ----------
    run
        Folder of a finished run.
    out
        The file, written whole or not at all.
    false_alarms, good
        Of the threshold in the metadata, as in `vitad.predict.predict`.

    Raises
    ------
    UserError
        No finished run, packages of the extra `export` are missing, the method has no form in ONNX (its map is a
        gradient, for instance), or the file computes something else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, torch exports with it
    except ImportError as e:
        raise UserError(f"{e.name} is missing. Install what export needs with: pip install vitad[export]") from e

    record = read_record(run)
    model = load_model(run, "cpu").eval()
    of_score, of_region, unreadable = thresholds(run, model, false_alarms, good, "cpu")
    if unreadable:
        raise UserError(f"cannot read the good image {unreadable[0]}. Replace it, or leave it out.")
    model.settings = replace(model.settings, amp=False)
    about = {name: record[name] for name in ("method", "dataset", "category", "preset", "seed")} | {
        "format": FORMAT,
        "vitad": record["environment"]["vitad"],
        "classes": "good,defective",
        "threshold": of_score.value,
        "region_threshold": of_region.value,
        "false_alarms": of_score.false_alarms,
    }
    whole = _Whole(model)
    images = [_picture(*size) for size in ((2, 90, 120), (1, 300, 77))]
    expected = [whole(image) for image in images]  # before: what is made once and kept is then made of real tensors
    names = ["score", "map", "reconstruction"][: len(expected[0])]
    dynamic = {0: torch.export.Dim("images"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.onnx.export(
                whole,
                (images[0],),
                input_names=["image"],
                output_names=names,
                dynamic_shapes=(dynamic,),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,  # the optimiser takes small constants for zero, such as the 1e-12 of a division
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as e:
        why = str(e.__cause__ or e).splitlines()[0]
        raise UserError(f"{record['method']} with these settings has no form in ONNX: {why}") from e
    assert program is not None, "that of dynamo"
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the lines of code that it came from, and their folders on this machine
    program.model.metadata_props.update({name: str(value) for name, value in about.items() if value is not None})
    out = Path(out).expanduser()
    with atomic_write(out) as temporary:
        program.save(temporary)
        session = _session(onnxruntime, temporary)
        for image, by_torch in zip(images, expected, strict=True):
            found = session.run(names, {"image": image.numpy()})
            range_of_maps = float(by_torch[1].max() - by_torch[1].min())
            for name, one, other in zip(names, by_torch, found, strict=True):
                difference = float(np.abs(one.numpy() - other).max(initial=0))
                allowed = TOLERANCE * (1 if name == "reconstruction" else range_of_maps)
                if not difference <= allowed:  # nor where it is not a number
                    raise UserError(f"the file would differ from torch by {difference:g}. Nothing is written.")
    return out


def _session(onnxruntime, path: Path):  # type: ignore[no-untyped-def]  # it has no types
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns of constants that it computes later
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _picture(n: int, height: int, width: int) -> Tensor:
    """(n,height,width,3) uint8: soft spots, the same each time."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 6, 6, generator=random)
    fine = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (fine * 255).permute(0, 2, 3, 1).to(torch.uint8)
