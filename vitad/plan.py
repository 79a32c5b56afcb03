"""What a run will take, by counted operations: memory, and time on named cards. Nothing is computed.

A training step of each phase and an image at inference go through the method without numbers: a `FakeTensor` has a
shape and a type alone. It takes the paths of a real tensor, with bfloat16 and fused attention as on a GPU; the plain
device `meta` of torch does not. What a step keeps for the backward pass is found by `saved_tensors_hooks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vitad import data, methods
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.papers.estimates import duration
from vitad.runs import Request
from vitad.settings import resolve
from vitad.training import Phase, autocast

GIB = 2**30
SHARE = 0.4  # of a card's peak that is taken for reached: what is usual for a large ViT
CALL = 1e-5  # s: what torch takes to start an operation, which limits small networks and small batches
SPARE = 1.5  # GiB: CUDA itself, and what the backward pass needs for a moment


@dataclass(frozen=True)
class Card:
    """A GPU: memory in GiB, peak in TFLOP/s for dense matrices of `dtype` with sums in float32."""

    name: str
    memory: float
    tflops: float
    dtype: str = "bfloat16"


CARDS = (
    Card("H100 SXM", 80, 989.4),  # NVIDIA H100 data sheet: 1,978.9 with sparsity, half of it without
    Card("A100 SXM", 40, 312.0),  # NVIDIA A100 data sheet; there is one of 80 GB as well
    Card("RTX 4090", 24, 165.2),  # NVIDIA Ada GPU architecture 1.1, table 2
    Card("RTX 3080 Ti", 12, 68.2),  # twice its 34.1 in float32, as NVIDIA GA102 2.1, table 2, has it for its chip
    Card("T4", 16, 8.1, "float32"),  # NVIDIA T4 data sheet; it has float16, but no bfloat16
)
QUOTED = (CARDS[0], CARDS[2])  # where there is one line for it


@dataclass(frozen=True)
class Part:
    """What a phase of training takes. The last four are bytes, all in use when the backward pass of a step begins."""

    phase: Phase
    multiply_adds: int  # of a step, forward and backward
    calls: int  # operations that a step starts
    weights: int  # of the whole model, buffers too
    gradients: int
    state: int  # of the optimiser
    activations: int  # kept for the backward pass, with the batch itself and the weights in bfloat16

    @property
    def fixed(self) -> float:
        """GiB that no smaller batch saves."""
        return (self.weights + self.gradients + self.state) / GIB + SPARE

    @property
    def memory(self) -> float:
        """GiB that a card needs."""
        return self.fixed + self.activations / GIB

    def largest_batch(self, card: Card) -> int:
        """How many images a card has room for, as far as memory grows with the batch; 0 if there is not even one."""
        return max(0, int((card.memory - self.fixed) * GIB * self.phase.batch_size / self.activations))

    def seconds(self, card: Card) -> float:
        """Time of a step, as if the card had the memory."""
        return max(_seconds(self.multiply_adds, card), CALL * self.calls)

    def steps(self, n_images: int) -> int:
        """Steps of the phase with so many training images; at most, where it can stop early."""
        n = n_images if self.phase.indices is None else len(self.phase.indices)
        n -= math.ceil(self.phase.val_fraction * n)
        return self.phase.epochs * math.ceil(n / self.phase.batch_size)


@dataclass(frozen=True)
class Plan:
    """What the run of a request takes.

    Attributes
    ----------
    request : Request
        The run.
    parts : list of Part
        One for each phase of training; none where nothing is trained.
    steps : list of int
        Of each phase.
    images : (int, int)
        Training and test images.
    parameters, weights : int
        Number of parameters; bytes of the model, buffers too.
    image : int
        Multiply-adds of a test image.
    """

    request: Request
    parts: list[Part]
    steps: list[int]
    images: tuple[int, int]
    parameters: int
    weights: int
    image: int

    def seconds(self, card: Card) -> float:
        """Time of the whole run. Preparation is taken to look at each training image once, as at a test image."""
        training = sum(n * part.seconds(card) for n, part in zip(self.steps, self.parts, strict=True))
        return training + sum(self.images) * _seconds(self.image, card)


def plan(request: Request) -> Plan:
    """Count what a run takes, by the published numbers of its data set's images.

    Parameters
    ----------
    request
        The run. Its weights are not looked for.

    Raises
    ------
    UserError
        A setting does not suit the method, or nobody has counted the images of the data set.

    Examples
    --------
    >>> from vitad.plan import plan
    >>> from vitad.runs import Request
    >>> found = plan(Request("anovit", "mvtec", "bottle", preset="paper"))
    >>> found.steps, found.images, found.image // 10**9
    ([4800], (209, 83), 57)
    """
    counts = data.get(request.dataset).counts_by_category(request.category, request.split)
    if counts is None:
        raise UserError(
            f"the number of images of {request.dataset} is not published. "
            "Plan with a data set of about its size, such as --dataset mvtec --category bottle."
        )
    module = methods.get(request.method)
    settings = resolve(module.Settings, module.PRESETS, request.preset, request.overrides)
    model, parts, image = _counted(request.method, settings)
    n_train = [train for train, _ in counts.values()]
    model.size_up(np.repeat(list(counts), n_train))
    parts = [replace(part, phase=phase) for part, phase in zip(parts, model.phases(), strict=True)]
    return Plan(
        request,
        parts,
        [part.steps(sum(n_train)) for part in parts],
        (sum(n_train), sum(test for _, test in counts.values())),
        sum(p.numel() for p in model.parameters()),
        _size(model),
        image,
    )


def as_text(plans: Sequence[Plan]) -> str:
    """Plans of one method, a model for each, as a page for the terminal."""
    first, n = plans[0], len(plans)
    request, parts = first.request, first.parts
    train, test = (sum(plan.images[k] for plan in plans) for k in (0, 1))
    where = " ".join(filter(None, (request.dataset, request.category if n == 1 else "", request.split)))
    models = f"a model for each of {n} categories" if n > 1 else "one model"
    lines = [
        f"{request.method}: {methods.get(request.method).PAPER}; preset {request.preset}",
        f"data {where}: {train:,} training and {test:,} test images, {models}",
    ]
    columns = {
        part.phase.name: {
            "parameters trained, million": f"{(trained := sum(p.numel() for p in part.phase.parameters)) / 1e6:.1f}",
            "parameters frozen, million": f"{(first.parameters - trained) / 1e6:.1f}",
            "images in a batch": f"{part.phase.batch_size}",
            "steps" + (", all models" if n > 1 else ""): f"{sum(plan.steps[k] for plan in plans):,}",
            "multiply-adds of a step, billion": f"{part.multiply_adds / 1e9:,.1f}",
            "weights, GiB": f"{part.weights / GIB:.2f}",
            "gradients, GiB": f"{part.gradients / GIB:.2f}",
            "state of the optimiser, GiB": f"{part.state / GIB:.2f}",
            "saved activations, GiB": f"{part.activations / GIB:.2f}",
            "memory with the spare, GiB": f"{part.memory:.2f}",
        }
        for k, part in enumerate(parts)
    }
    alone = {"parameters, million": f"{first.parameters / 1e6:.1f}", "weights, GiB": f"{first.weights / GIB:.2f}"}
    lines += ["", pd.DataFrame(columns or {"nothing is trained": alone}).to_string()]
    lines += ["", f"an image at inference: {first.image / 1e9:.1f} billion multiply-adds"]
    cards = [
        {
            "card": card.name,
            "GiB": f"{card.memory:g}",
            "peak, TFLOP/s": f"{card.tflops:g} {card.dtype}",
            "time": duration(sum(plan.seconds(card) for plan in plans)),
            "memory": "; ".join(filter(None, (_too_small(first, number, card) for number in range(len(parts)))))
            or "fits",
        }
        for card in CARDS
    ]
    lines += ["", pd.DataFrame(cards).to_string(index=False), ""]
    at_most = ", at most, since it may stop early" if any(part.phase.patience for part in parts) else ""
    lines += [
        f"time{at_most}: {SHARE:.0%} of the peak is assumed, not measured, and {1e6 * CALL:g} us for each operation",
        "  that torch starts. Preparation looks at each training image once. Not counted: damage, validation, metrics.",
        f"memory: {SPARE} GiB are spare, for CUDA and for what the backward pass needs for a moment.",
    ]
    return "\n".join(lines)


def _too_small(found: Plan, number: int, card: Card) -> str:
    """What is too large for a card, and which setting helps; nothing where all of it fits."""
    part, settings = found.parts[number], found.request.settings
    if part.memory <= card.memory:
        return ""
    own = f"{part.phase.name}_batch_size"
    setting, largest = "micro_batch", _micro_batch(found, number, card)  # rather than a batch that trains otherwise
    if not largest:
        setting, largest = own if own in settings else "batch_size", part.largest_batch(card)
    mend = f"--set {setting}={largest} fits" if largest else "so is it with any batch; a smaller network may fit"
    return f"too small for {part.phase.name}: {mend}"


def _micro_batch(found: Plan, number: int, card: Card) -> int:
    """Largest of the sizes of `micro_batch` with which a phase fits a card; 0 where none does, or where it has no such.

    One part of the batch at a time holds what it needs, beside what is kept of all of them.
    """
    part, sizes = found.parts[number], (16, 8, 4, 2, 1)
    if found.request.settings.get("micro_batch") != 0 or part.fixed > card.memory:
        return 0
    kept = plan(found.request.override(micro_batch=sizes[0])).parts[number].activations  # little depends on the size
    of_one = (part.activations - kept) / part.phase.batch_size
    fits = [n for n in sizes if of_one > 0 and part.fixed + (kept + n * of_one) / GIB <= card.memory]
    return fits[0] if fits else 0


def counter() -> FlopCounterMode:
    """Counts operations, of which a multiply-add has two; also those of fused attention on the CPU."""
    aten = torch.ops.aten
    fused: dict[Any, Any] = {  # by the shapes of the arguments
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=fused)


def multiply_adds(counted: FlopCounterMode) -> int:
    """Multiply-adds of all that ran within a `counter`."""
    return counted.get_total_flops() // 2


def step(model: Method, phase: Phase, batch: dict[str, Any]) -> Part:
    """Count a training step of a phase; the tensors may be real.

    Parameters
    ----------
    model, phase
        A model, and one of its `phases()`.
    batch
        As `ImageSet.batch` gives it.
    """
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that none is freed and its address taken by another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    model.train()
    keep(batch["image"])
    with counter() as counted, _Calls() as calls, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a step may be one of several kinds, by chance
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, model.settings.amp),
        ):
            losses = (phase.losses or model.losses)(batch)
        activations = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        torch.stack(list(losses.values())).sum().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    state = _kept_by(phase.optimizer) * sum(p.nbytes for p in phase.parameters)
    return Part(phase, multiply_adds(counted), calls.number, _size(model), gradients, state, activations)


class _Calls(TorchDispatchMode):
    """Counts operations, but for views, which start nothing on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


def _kept_by(optimizer: Callable[..., torch.optim.Optimizer]) -> int:
    """Numbers that an optimiser keeps for each parameter: 2 of Adam."""
    one = torch.nn.Parameter(torch.zeros(1))
    one.grad = torch.zeros(1)
    tried = optimizer([one], lr=0.0)
    tried.step()
    return sum(t.shape == one.shape for t in tried.state[one].values())


@lru_cache(maxsize=32)
def _counted(method: str, settings: Any) -> tuple[Method, list[Part], int]:
    """(model without numbers, its phases, multiply-adds of an image at inference)"""
    autocast(torch.device("cpu"), True)  # may measure, once; that is not to be counted
    if "mode" in {field.name for field in fields(settings)}:
        settings = replace(settings, mode="global")  # where the object is, only its pixels say
    with torch.device("meta"):
        model = methods.get(method).Model(settings, "random")
        model.fill_for_timing()
    numberless = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        return FakeTensor(numberless, tensor.to("meta"), torch.device("cpu"))

    def images(n: int) -> Tensor:
        return fake(torch.empty(n, 3, settings.image_size, settings.image_size, device="meta"))

    model._apply(fake)
    if hasattr(model, "synthesis"):
        model.synthesis = _undamaged
    parts = []
    for phase in model.phases():
        n = phase.batch_size
        first = torch.zeros(n, dtype=torch.long)  # what is kept for each training image is there for the first
        parts.append(step(model, phase, {"image": images(n), "index": first, "texture": first.bool()}))
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, settings.amp), counter() as counted:
        model.image_score(model.anomaly_map(images(1)).float())
    return model, parts, multiply_adds(counted)


def _undamaged(images: Tensor, *_: Any) -> dict[str, Tensor]:
    """In place of `Synthesis`: which pixels it paints depends on numbers. Next to a network it multiplies little."""
    return {"image": images, "mask": torch.zeros_like(images[:, :1], dtype=torch.bool)}


def _seconds(multiply_adds: int, card: Card) -> float:
    return 2 * multiply_adds / (SHARE * card.tflops * 1e12)


def _size(model: Method) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
