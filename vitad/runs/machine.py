"""The machine, the versions and the commit that a run belongs to."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vitad
from vitad.errors import UserError
from vitad.training import autocast


def find_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a torch device."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device '{name}'. Choose auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but torch sees no CUDA GPU. Use --device auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def environment(device: torch.device | None = None, amp: bool = False) -> dict[str, Any]:
    """The machine and the versions, as the record keeps them."""
    device = device or find_device("auto")
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
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": precision,
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


def _cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
