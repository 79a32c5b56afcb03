"""One file per paper. Each holds `PAPER`, `Settings`, `PRESETS` and `Model`, an `nn.Module` with

losses(batch) -> dict of scalars          what training minimises is their sum
anomaly_map(images (B,3,H,W)) -> (B,H,W)
image_score(maps (B,H,W)) -> (B,)
phases() -> list of `training.Phase`      empty where nothing is trained; of several, each may have its own losses
prepare(images, device)                   optional: one look at the training `ImageSet` before training
observe(images, device) -> dict           optional: what else the record counts, from the training `ImageSet` after it
settings, weights, protocol               what goes into the run record
`CATEGORY` of the module, where it has one, is taken when none is asked for.
"""

from importlib import import_module

from vitad.errors import unknown

METHODS = ("anovit", "vitmem", "mala", "ssltok", "l2cae", "patchknn")


def get(name):
    """Module of a method by its name in code."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return import_module(f"vitad.methods.{name}")
