"""Time the map and the score of an image beside anomalib's implementation of the same method, on one thread.

    python benchmarks/rivals.py [--only padim draem]

Both have the same network and the same input, in float32, and random weights, since these do not change the time. Each
times the way from an image to its map and score. They take turns, so that whatever else the machine does falls on both
alike; the ratio is the median over the rounds. anomalib 2.7 has these five of the book's methods. It is no part of the
environment: pip install "anomalib==2.7.*".
"""

import argparse
import statistics
import sys
import time
from importlib import import_module
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

from vitad import methods
from vitad.backbones import DINOV2_S14, import_timm
from vitad.settings import resolve

BATCH = 2  # images
BANK = 40_000  # patches


def ours(name: str, **overrides) -> nn.Module:
    """A model with the paper's settings but for these."""
    method = methods.get(name)
    if "pretrained" in method.Settings.__dataclass_fields__:
        overrides["pretrained"] = False
    return method.Model(resolve(method.Settings, method.PRESETS, "paper", overrides | {"amp": False})).eval()


def theirs(module: str, name: str, **options) -> nn.Module:
    """A model of anomalib. Some insist on pre-trained weights, which need a network; here they get random ones."""
    made = import_timm().create_model

    def create_model(*given, **named):
        return made(*given, **named | {"pretrained": False})

    cls = getattr(import_module(f"anomalib.models.image.{module}.torch_model"), name)
    with patch("timm.create_model", create_model):
        return cls(**options).eval()


def padim() -> tuple[nn.Module, nn.Module]:
    a, b = ours("padim"), theirs("padim", "PadimModel", backbone="resnet18", pre_trained=False)
    places, C, _ = a.whiten.shape
    a.whiten.copy_(torch.eye(C).expand_as(a.whiten))
    b.gaussian.mean, b.gaussian.inv_covariance = torch.zeros(C, places), torch.eye(C).repeat(places, 1, 1)
    return a, b


def cflow() -> tuple[nn.Module, nn.Module]:
    layers = ["layer2", "layer3", "layer4"]
    return ours("cflow"), theirs("cflow", "CflowModel", backbone="wide_resnet50_2", layers=layers, pre_trained=False)


def draem() -> tuple[nn.Module, nn.Module]:
    return ours("draem"), theirs("draem", "DraemModel")


def dinomaly() -> tuple[nn.Module, nn.Module]:
    return ours("dinomaly"), theirs("dinomaly", "DinomalyModel")


def patchknn() -> tuple[nn.Module, nn.Module]:
    a = ours("patchknn", blocks=(12,), image_size=224)
    b = theirs("anomaly_dino", "AnomalyDINOModel", encoder_name=DINOV2_S14)
    bank = F.normalize(torch.randn(BANK, a.backbone.embed_dim), dim=1)
    a.bank, b.memory_bank = bank, bank.clone()
    return a, b


PAIRS = {"padim": padim, "cflow": cflow, "draem": draem, "dinomaly": dinomaly, "patchknn": patchknn}


@torch.inference_mode()
def seconds(model: nn.Module, images: torch.Tensor) -> float:
    """Of one image, map and score."""
    began = time.perf_counter()
    if hasattr(model, "anomaly_map"):
        model.image_score(model.anomaly_map(images))
    else:
        model(images)
    return (time.perf_counter() - began) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="METHOD", help=", ".join(PAIRS)
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of both in turn (default %(default)s)")
    arguments = parser.parse_args()
    import_timm()  # makes torchvision, and so anomalib, importable beside a CPU-only torch
    try:
        import_module("anomalib")
    except ImportError as e:
        sys.exit(f"rivals: there is nothing to compare with ({e}). Install it: pip install 'anomalib==2.7.*'")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in arguments.only:
        pair = PAIRS[name]()
        images = torch.rand(BATCH, 3, *[pair[0].settings.image_size] * 2)
        rounds = [[seconds(model, images) for model in pair] for _ in range(arguments.rounds + 1)][1:]  # one warms up
        a, b = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b in rounds)
        print(f"{name:<9} {1000 * a:8.0f} ms   anomalib {1000 * b:8.0f} ms   ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
