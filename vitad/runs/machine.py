"""The machine, the versions and the commit that a run belongs to."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import vitad
from vitad.backbones import import_timm
from vitad.errors import UserError
from vitad.training import autocast

if TYPE_CHECKING:
    from vitad.runs.request import Request

RESUMED = (
    "A run that was resumed or is repeated is equal only statistically: without --deterministic CUDA adds in any order."
)


def find_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a torch device."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device '{name}'. Choose auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but torch sees no CUDA GPU. Use --device auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def arithmetic(request: Request, device: torch.device) -> Iterator[None]:
    """Within, float32 products are those of TF32, and operations deterministic, as the request says; then as before.

    Raises
    ------
    UserError
        TF32 is asked for where there is none; or within, an operation has no deterministic form.
    """
    cuda = device.type == "cuda"
    if request.tf32 and not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise UserError(f"tf32 was asked for, but {_device_name(device)} has none. Leave the option out for this run.")
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32, torch.are_deterministic_algorithms_enabled()
    if request.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch asks for
    try:
        if cuda:
            products.allow_tf32 = convolutions.allow_tf32 = request.tf32
        torch.use_deterministic_algorithms(request.deterministic)
        yield
    except RuntimeError as e:
        if "does not have a deterministic implementation" not in str(e):
            raise
        raise UserError(
            f"deterministic was asked for, but {str(e).split()[0]} has no such form on {device.type}. "
            "Leave the option out for this run."
        ) from e
    finally:
        if cuda:
            products.allow_tf32, convolutions.allow_tf32 = before[:2]
        torch.use_deterministic_algorithms(before[2])


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Let torch compile the blocks of the transformers in a model, where nearly all of its time goes.

    Raises
    ------
    UserError
        What torch compiles with is missing.
    """
    needed = {"cuda": "the package triton", "cpu": "a C++ compiler"}[device.type]
    if not (find_spec("triton") if device.type == "cuda" else shutil.which(os.environ.get("CXX", "g++"))):
        raise UserError(f"compile was asked for, but {needed} is missing. Install it, or leave the option out.")
    Block = import_timm().models.vision_transformer.Block
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()


def environment(
    device: torch.device | None = None, amp: bool = False, request: Request | None = None, processes: int = 1
) -> dict[str, Any]:
    """The machine, the versions and the arithmetic, as the record keeps them.

    With the request of a run also what its switches changed, and what holds of a resumed run where it is not the same;
    and the number of processes where there were several.
    """
    device = device or find_device("auto")
    switches = [name for name in ("tf32", "compile", "deterministic") if getattr(request, name, False)]
    with autocast(device, amp):
        precision = "bfloat16 autocast" if torch.is_autocast_enabled(device.type) else "float32"
    return {
        "vitad": vitad.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "device_name": _device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        **({"processes": processes} if processes > 1 else {}),
        **({"switches": switches} if switches else {}),
        **({"resumed": RESUMED} if device.type == "cuda" and "deterministic" not in switches else {}),
    }


def describe_environment(device: str = "auto", **settings: Any) -> None:
    """Print what a notebook prints first: versions, device, and the parameters that it runs with."""
    e = environment(find_device(device))
    print(f"vitad {e['vitad']} · python {e['python']} · torch {e['torch']} · timm {e['timm']} · numpy {e['numpy']}")
    print(f"device {e['device']}: {e['device_name']}, {e['threads']} threads")
    print(" · ".join(f"{k}={v!r}" for k, v in settings.items()))


def git_state() -> dict[str, Any] | None:
    """Commit of the source tree that vitad is imported from, and whether it was changed; None outside of a tree."""
    package = Path(vitad.__file__).parent

    def git(*words: str | Path) -> str:
        return subprocess.run(["git", "-C", package, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", package))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
