"""No step of a training waits for a GPU. torch's device `meta` stands in for one: it has shapes, but no numbers.

What needs a number of the device fails there: `item`, `nonzero`, a mask as an index, a copy to the host. The rest that
holds up a host is noted: a copy to the device that does not leave at once, and host tensors beside those of the device.
"""

from contextlib import nullcontext

import helpers
import pytest
import torch
from helpers import CPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitad import methods, training
from vitad.training import train

META = torch.device("meta")
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)


class Waits(TorchDispatchMode):
    """Notes in `seen` what would hold up the host while `strict` is on."""

    strict = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim or t.device == META}  # a number travels with the call
        at_once = function.overloadpacket in COPIES and kwargs.get("non_blocking", args[-1] is True)
        if self.strict and len(devices) > 1 and not at_once:
            self.seen.append(str(function))
        return result


@pytest.fixture(autouse=True)
def no_autocast_on_meta(monkeypatch):
    """It has no half precision."""
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *how, **more: nullcontext() if kind == "meta" else autocast(kind, *how, **more)
    )


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "method, number, overrides",
    [
        ("anovit", 0, {"batch_size": 2}),
        ("vitmem", 0, {"batch_size": 3}),
        ("mala", 0, {"stage1_batch_size": 3}),
        ("mala", 0, {"stage1_batch_size": 3, "micro_batch": 2, "plpm": "joint"}),
        ("mala", 1, {"batch_size": 3}),
        ("ssltok", 0, {"batch_size": 3}),
        ("l2cae", 0, {"batch_size": 3}),
        ("dinomaly", 0, {"batch_size": 3}),
        ("draem", 0, {"batch_size": 3}),
        ("aessim", 0, {"batch_size": 3}),
        ("vae", 0, {"batch_size": 3}),
        ("mkd", 0, {"batch_size": 3}),
        ("dfr", 0, {"batch_size": 3}),
        ("cflow", 0, {"batch_size": 3}),
        ("uniad", 0, {"batch_size": 3}),
        ("psvdd", 0, {"batch_size": 3}),
        ("vtadl", 0, {"batch_size": 3}),
        ("fanogan", 0, {"batch_size": 2}),
        ("fanogan", 1, {"batch_size": 3}),
    ],
)
def test_no_step_waits_for_the_device(method, number, overrides, gears, monkeypatch):
    """After the first one, which fills what is kept for all."""
    model = helpers.make(methods.get(method), "random", **overrides)
    model.prepare(gears.train, CPU)
    model.to(META)
    phase, calls, waits = model.phases()[number], [], Waits()
    losses = phase.losses or model.losses

    def watched(batch):
        if len(calls) == 3:
            raise Stop
        calls.append(batch["image"].device)
        waits.strict = len(calls) > 1
        return losses(batch)

    object.__setattr__(phase, "losses", watched)
    monkeypatch.setattr(model, "phases", lambda: [phase])
    with pytest.raises(Stop), waits:
        train(model, gears.train, 0, META, amp=False)
    assert calls == [META] * 3 and waits.seen == []


@pytest.mark.parametrize("fits", [True, False])
def test_no_batch_waits_for_the_device(fits, gears, monkeypatch):
    monkeypatch.setattr("vitad.data.samples.free_bytes", lambda device: 1e12 if fits else 0)
    monkeypatch.setattr(gears.train, "_copies", {})
    with Waits() as waits:
        gears.train.batch([0])  # the copy of the set is made once
        waits.strict = False
        gears.train.batch([0], META)
        waits.strict = True
        gears.train.batch([3, 1], META)
    assert waits.seen == []


def test_what_waits_is_noticed():
    x, places = torch.rand(4, 3), torch.tensor([2, 0])
    there = x.to(META)
    for look in (
        lambda: there.sum().item(),
        lambda: there.nonzero(),
        lambda: there[there > 0],
        lambda: there.cpu(),
        lambda: bool(there.any()),
    ):
        with pytest.raises((NotImplementedError, RuntimeError)):
            look()
    for slow in (lambda: x.to(META), lambda: there[places], lambda: there.copy_(x)):
        with Waits() as waits:
            slow()
        assert len(waits.seen) == 1
    with Waits() as waits:
        x.to(META, non_blocking=True), there.copy_(x, non_blocking=True), there * 2, there + torch.tensor(1.0)
    assert waits.seen == []


def test_the_loop_reads_its_losses_only_now_and_then(gears, monkeypatch):
    """The one wait that there is, for what the history and the check need."""
    reads, check = [], training._check_finite
    monkeypatch.setattr(
        training, "_check_finite", lambda progress, *rest: reads.append(progress.step) or check(progress, *rest)
    )
    monkeypatch.setattr(training, "CHECK_STEPS", 5)
    train(helpers.make(methods.get("l2cae"), batch_size=1, epochs=1), gears.train, 0, CPU, amp=False)
    assert reads == [5, 10, 12]
