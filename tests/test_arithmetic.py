"""TF32, `torch.compile` and determinism: what they switch, where they are refused, and what the record says of them."""

import shutil

import helpers
import pytest
import torch
from helpers import CPU, layers
from torch import nn

from vitad import methods, runs
from vitad.backbones import import_timm
from vitad.errors import UserError
from vitad.runs.machine import arithmetic, compile_blocks, environment
from vitad.runs.request import Request

CUDA = torch.device("cuda")
Block = import_timm().models.vision_transformer.Block


@pytest.fixture
def gpu(monkeypatch):
    """A function that lets torch report a GPU of a compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    return lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_the_switches_are_no_part_of_a_run_s_identity():
    plain = Request("l2cae", preset="smoke")
    assert (plain.tf32, plain.compile, plain.deterministic) == (False, False, False)
    assert Request.make(plain, tf32=True, compile=True, deterministic=True) == plain


@pytest.mark.parametrize("asked", [True, False])
def test_tf32_is_on_where_it_is_asked_for_and_as_before_afterwards(asked, gpu):
    gpu(8, 0)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with arithmetic(Request("l2cae", tf32=asked), CUDA):
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (asked, asked)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_tf32_is_refused_where_there_is_none(gpu, toy_root, tmp_path):
    gpu(7, 5)
    with (
        pytest.raises(UserError, match="tf32 was asked for, but some GPU has none"),
        arithmetic(Request("l2cae", tf32=True), CUDA),
    ):
        pass
    where = dict(preset="smoke", data_root=toy_root, device="cpu", out=tmp_path / "run")
    with pytest.raises(UserError, match="tf32 was asked for, but .* has none"):
        runs.run("l2cae", tf32=True, **where)
    assert not list(tmp_path.iterdir())


def test_an_operation_without_a_deterministic_form_is_named():
    request = Request("l2cae", deterministic=True)
    zeros, places, ones = torch.zeros(3), torch.tensor([1]), torch.ones(1)
    with arithmetic(request, CPU):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    refused = pytest.raises(UserError, match="deterministic was asked for, but put_ has no such form on cpu. Leave")
    with refused, arithmetic(request, CPU):
        zeros.put_(places, ones)
    assert not torch.are_deterministic_algorithms_enabled()
    with arithmetic(Request("l2cae"), CPU):
        zeros.put_(places, ones)
    with pytest.raises(RuntimeError, match="another reason"), arithmetic(request, CPU):
        raise RuntimeError("another reason")


@pytest.mark.parametrize("method, n", [("anovit", 6), ("ssltok", 7), ("l2cae", 0)])
def test_the_blocks_of_all_transformers_are_compiled_and_nothing_else(method, n, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    model = helpers.make(methods.get(method))
    compile_blocks(model, CPU)
    assert compiled == layers(model, Block) and len(compiled) == n


def test_compiling_needs_a_compiler(monkeypatch, toy_root, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    where = dict(preset="smoke", data_root=toy_root, device="cpu", out=tmp_path / "run")
    with pytest.raises(UserError, match=r"compile was asked for, but a C\+\+ compiler is missing. Install it"):
        runs.run("anovit", compile=True, **where)
    assert not list(tmp_path.iterdir())


def test_the_record_says_what_was_switched(toy_root, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")  # l2cae has nothing to compile
    record = runs.run(
        "l2cae", preset="smoke", data_root=toy_root, device="cpu", deterministic=True, compile=True, out=tmp_path
    )
    assert record["environment"]["switches"] == ["compile", "deterministic"]
    assert "resumed" not in record["environment"] and "switches" not in environment(CPU)
    assert not {"tf32", "compile", "deterministic"} & {*record, *record["settings"]}


def test_the_record_says_where_a_resumed_run_is_equal_only_statistically(gpu):
    on_gpu = environment(CUDA, request=Request("l2cae"))
    assert on_gpu["resumed"].startswith("A run that was resumed or is repeated is equal only statistically")
    assert "resumed" not in environment(CUDA, request=Request("l2cae", deterministic=True))
    assert "resumed" not in environment(CPU, request=Request("l2cae"))
