"""What several test files share: small copies of the embedded data set, made once a session."""

import pytest

from vitad.data.sets import toy

SLOW = ("test_walkthroughs.py", "test_book.py", "test_sweep.py", "test_notebook.py", "test_runs.py", "test_pairing.py")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is left alone with one of them."""
    items.sort(key=lambda item: item.path.name not in SLOW)


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory):
    """Folder of `toy` with all its categories, `quirks` too, but few images: 12 train, 4 good, 2 of each defect."""
    root = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in {"N_TRAIN": 12, "N_GOOD": 4, "N_DEFECT": 2}.items():
            patch.setattr(toy, name, count)
        toy.generate(root, 0, (*toy.DEFECTS, "quirks"))
    (root / "complete").touch()
    return root


@pytest.fixture(scope="session")
def gear_root(tmp_path_factory):
    """Folder of `toy` with the whole of its default category and nothing else."""
    root = tmp_path_factory.mktemp("gear")
    toy.generate(root, 0, ("gear",))
    (root / "complete").touch()
    return root
