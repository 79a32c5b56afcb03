"""What several test files share: small copies of the embedded data set and weights, made once a session."""

import pytest
import torch

from vitad import data
from vitad.data.dataset import _load
from vitad.data.sets import toy

SLOW = (
    "test_walkthroughs.py",
    "test_book.py",
    "test_sweep.py",
    "test_mala.py",
    "test_methods.py",
    "test_notebook.py",
    "test_runs.py",
    "test_pairing.py",
)


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is left alone with one of them."""
    items.sort(key=lambda item: item.path.name not in SLOW)


@pytest.fixture(autouse=True)
def no_images_in_memory():
    """Each test decodes its images itself."""
    _load.cache_clear()


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that is not the CPU for `vitad.data.samples`, though its tensors stay there."""
    monkeypatch.setattr("vitad.data.samples.to_device", lambda tensor, device: tensor)
    monkeypatch.setattr("vitad.data.samples.ImageSet._on", lambda images, device: None)
    return torch.device("meta")


@pytest.fixture(scope="session")
def make_toy(tmp_path_factory):
    """Write categories of `toy` with that many images: for training, good ones, of each defect. The first as ever."""

    def make(categories, *counts):
        root = tmp_path_factory.mktemp("toy")
        with pytest.MonkeyPatch.context() as patch:
            for name, count in zip(("N_TRAIN", "N_GOOD", "N_DEFECT"), counts, strict=True):
                patch.setattr(toy, name, count)
            toy.generate(root, 0, categories)
        (root / "complete").touch()
        return root

    return make


@pytest.fixture(scope="session")
def toy_root(make_toy):
    """Folder of `toy` with all its categories, `quirks` too, but few images: 12 train, 4 good, 2 of each defect."""
    return make_toy((*toy.DEFECTS, "quirks"), 12, 4, 2)


@pytest.fixture(scope="session")
def gears(toy_root):
    """The category `gear` of `toy` at 64 px, twelve images for training."""
    return data.load("toy", toy_root, "gear", image_size=64)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file that `pretrained` can read without any network: random weights of `test_vit`."""
    import torch  # here, since not every test file needs the seconds that these take
    from safetensors.torch import save_file

    from vitad.backbones import import_timm

    path = tmp_path_factory.mktemp("weights") / "given.safetensors"
    torch.manual_seed(1)
    save_file(import_timm().create_model("test_vit", num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def cnn_weights(tmp_path_factory):
    """The same for a CNN: random weights of `test_resnet`."""
    from safetensors.torch import save_file

    from vitad.backbones import import_timm

    path = tmp_path_factory.mktemp("weights") / "cnn.safetensors"
    torch.manual_seed(1)
    save_file(import_timm().create_model("test_resnet", num_classes=5).state_dict(), path)
    return path
