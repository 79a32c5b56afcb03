"""Copies from the host to a device for which nothing waits."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; on the CPU the tensor itself.

    A copy to a GPU starts from pinned memory. From other memory it would hold up the host until the GPU is done with
    all that it was given before.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def free_bytes(device: torch.device) -> float:
    """Free memory of a GPU; without limit on other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
