"""Every method on torch's `meta` device at its preset `paper`: a tensor left on the host fails as it would on CUDA.

`meta` lets some operations mix devices, matrix products and convolutions among them; `OneDevice` refuses those too. Two
things are not proven here. `meta` has no autocast: `tests/test_plan.py` takes such steps in bfloat16. And which pixels
the synthesis of damage paints depends on numbers, which there are none of: a stand-in damages nothing.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitad import data, methods
from vitad.methods import METHODS
from vitad.plan import _undamaged
from vitad.settings import resolve
from vitad.show.cost import _Zeros
from vitad.training import _optimizer, autocast

META = torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default)  # CUDA takes their indices from the host


class OneDevice(TorchDispatchMode):
    """Refuses what CUDA refuses. Copies to the host fail on `meta` as they are; with `to_host` they give zeros."""

    def __init__(self, to_host=False):
        super().__init__()
        self.to_host = to_host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.to_host and func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if self.to_host and func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].zero_()
        if self.to_host and func is aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if func not in COPIES:
            looked_at = (args[0], *args[2:]) if func in INDEXED and args[0].is_meta else args
            tensors = [t for t in tree_leaves((looked_at, kwargs)) if isinstance(t, torch.Tensor)]
            devices = {t.device.type for t in tensors if t.ndim or t.is_meta}  # a number may be on the host
            assert len(devices) < 2, f"{func} has tensors on {' and '.join(sorted(devices))}"
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def autocast_of_the_cpu(monkeypatch):
    """torch refuses to switch autocast on or off for `meta`."""

    class Autocast(torch.autocast):
        def __init__(self, device_type, *words, **options):
            super().__init__("cpu" if device_type == "meta" else device_type, *words, **options)

    monkeypatch.setattr(torch, "autocast", Autocast)


def untrained(name, **changes):
    """A model of the preset `paper`, made on the host and moved, as a run does it."""
    module = methods.get(name)
    with _Zeros():
        model = module.Model(resolve(module.Settings, module.PRESETS, "paper", changes), "random")
    if hasattr(model, "synthesis"):
        model.synthesis = _undamaged
    return model.to(META)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_prepares_trains_validates_and_scores_on_one_device(name, toy_root):
    model = untrained(name)
    images = data.load("toy", toy_root, "gear", image_size=model.settings.image_size).train
    with OneDevice(to_host=True):
        model.prepare(images, META)
    for phase in model.phases():
        indices = np.arange(phase.batch_size) % len(images)
        batch, losses_of = images.batch(indices, META), phase.losses or model.losses
        if phase.draw:
            phase.draw(np.random.default_rng(0))
        with OneDevice():
            model.train()
            optimizer = _optimizer(phase)
            with autocast(META, model.settings.amp):
                losses = losses_of(batch)
            sum(losses.values()).backward()
            if phase.clip:
                torch.nn.utils.clip_grad_norm_(phase.parameters, phase.clip)
            optimizer.step()
        model.eval()  # validation may look at pixels on the host: it waits for the device anyway
        with OneDevice(to_host=True), torch.no_grad(), autocast(META, model.settings.amp):
            validated = losses_of(batch)
        assert losses.keys() == validated.keys()
        assert all(value.is_meta and value.shape == () for value in (*losses.values(), *validated.values()))
        stepped = [p for p in phase.parameters if p.grad is not None]
        assert stepped and all(p.is_meta and p.grad.is_meta and optimizer.state[p]["exp_avg"].is_meta for p in stepped)
        optimizer.zero_grad()
    with OneDevice(to_host=True):
        model.finish(images, META)
    model.eval()
    image = images.batch([0, 1, 2], META)["image"]
    with OneDevice(), torch.no_grad(), autocast(META, model.settings.amp):
        maps = model.anomaly_map(image).float()
        scores = model.image_score(maps)
    assert maps.is_meta and maps.shape == (3, *images.size)
    assert scores.is_meta and scores.shape == (3,)


HERE, THERE = torch.ones(4, 4), torch.ones(4, 4, device=META)
MIXED = {
    "sum": lambda: HERE + THERE,
    "product": lambda: HERE @ THERE,
    "weight": lambda: F.linear(THERE, HERE),
    "kernel": lambda: F.conv2d(THERE.view(1, 4, 2, 2), HERE.view(4, 4, 1, 1)),
    "places": lambda: THERE.gather(1, HERE.long()),
    "table": lambda: F.embedding(HERE.long(), THERE),
    "indices": lambda: HERE[THERE[0].long()],
    "written": lambda: THERE.index_put_((HERE[0].long(),), HERE[0]),
    "host": lambda: THERE.cpu(),
    "number": lambda: float(THERE.sum()),
}


@pytest.mark.parametrize("kind", MIXED)
def test_what_cuda_refuses_is_refused(kind):
    with OneDevice(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        MIXED[kind]()


def test_what_cuda_allows_is_allowed():
    with OneDevice():
        assert (THERE * torch.tensor(2.0)).is_meta and THERE[torch.tensor([0, 1])].is_meta and HERE.to(META).is_meta
    with OneDevice(to_host=True):
        assert THERE.cpu().sum() == float(THERE.sum()) == 0


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_weight_left_on_the_host_is_found(part):
    model = untrained("l2cae")
    layer = getattr(model, part)[0]
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape))
    image = torch.zeros(2, 3, 256, 256, device=META)
    for mode, found in ((nullcontext(), False), (OneDevice(), True)):
        with mode, pytest.raises(AssertionError, match="cpu and meta") if found else nullcontext():
            model.losses({"image": image})
