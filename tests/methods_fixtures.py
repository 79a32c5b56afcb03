"""Fixtures of the tests of the methods; a test file takes them with `pytest_plugins = ["methods_fixtures"]`."""

import pytest
import torch
from safetensors.torch import save_file

from vitad import data
from vitad.backbones import import_timm


@pytest.fixture(scope="session")
def gears(toy_root):
    """The category `gear` of `toy` at 64 px, twelve images for training."""
    return data.load("toy", toy_root, "gear", image_size=64)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file that `pretrained` can read without any network: random weights of `test_vit`."""
    path = tmp_path_factory.mktemp("weights") / "given.safetensors"
    torch.manual_seed(1)
    save_file(import_timm().create_model("test_vit", num_classes=0).state_dict(), path)
    return path
