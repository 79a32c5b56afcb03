"""What a test image costs with each method, measured here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import torch
from torch.overrides import TorchFunctionMode

from vitad import methods
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.plan import counter, multiply_adds
from vitad.runs.machine import find_device
from vitad.settings import resolve
from vitad.training import autocast


def cost(names: Iterable[str], image_size: int = 256, preset: str = "paper", device: str = "auto") -> pd.DataFrame:
    """What a test image costs: parameters, multiply-adds and images a second here, one at a time, of each method.

    Weights are zero and nothing is trained, which changes none of it. Where patches do not divide `image_size`, the
    next smaller size that they do divide is taken.
    """
    on, rows = find_device(device), {}
    for name in names:
        model, px = _untrained(methods.get(name), image_size, preset)
        model = model.to(on).eval()
        model.fill_for_timing()
        image = torch.rand(1, 3, px, px, device=on)
        seconds: list[float] = []
        with torch.no_grad(), autocast(on, model.settings.amp):
            with counter() as counted:  # this round also warms up
                model.anomaly_map(image)
            while len(seconds) < 10 and sum(seconds) < 0.4:
                began = time.perf_counter()
                float(model.anomaly_map(image).sum())  # waits for the device
                seconds.append(time.perf_counter() - began)
        rows[name] = {
            "px": px,
            "parameters, million": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
            "multiply-adds, billion": round(multiply_adds(counted) / 1e9, 1),
            "images a second": float(f"{1 / min(seconds):.2g}"),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _untrained(module: Any, image_size: int, preset: str) -> tuple[Method, int]:
    """(model, side in px)"""
    for px in range(image_size, image_size - 16, -1):
        try:
            settings = resolve(module.Settings, module.PRESETS, preset, {"image_size": px})
            with _Zeros():
                return module.Model(settings, "random"), px
        except UserError as e:
            refused = e
    raise refused


class _Zeros(TorchFunctionMode):
    """New weights are zero: to draw those of a large ViT takes longer than to run it."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_):
            return args[0].zero_()
        if func is torch.nn.init.kaiming_uniform_:  # of linear layers: what it calls within is not seen here
            return torch.nn.init.zeros_(kwargs["tensor"])
        return func(*args, **(kwargs or {}))
