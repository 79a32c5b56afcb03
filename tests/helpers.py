"""What the tests of the methods share."""

import numpy as np
import torch

from vitad.settings import resolve

CPU = torch.device("cpu")


def make(method, weights="auto", **overrides):
    """A model of the preset `smoke`, in eval mode, with the seed 0; `method` is a module."""
    torch.manual_seed(0)
    return method.Model(resolve(method.Settings, method.PRESETS, "smoke", overrides), weights).eval()


def state(module):
    """A copy of the state of a module."""
    return {k: v.clone() for k, v in module.state_dict().items()}


def equal(one, other):
    """Whether two states are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def layers(module, kind):
    """All layers of a kind, in order."""
    return [m for m in module.modules() if isinstance(m, kind)]


class Watched:
    """An image set that notes which indices are requested."""

    def __init__(self, images):
        self.images, self.requested = images, []

    def __getattr__(self, name):
        return getattr(self.images, name)

    def __len__(self):
        return len(self.images)

    def batch(self, indices, device="cpu"):
        self.requested.append([int(i) for i in np.asarray(indices)])
        return self.images.batch(indices, device)
