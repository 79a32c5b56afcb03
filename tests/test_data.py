"""Data sets: the embedded one, what a sample is, the MVTec layout, and the magnetic tiles."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import trees
from helpers import CPU
from PIL import Image
from scipy.ndimage import binary_dilation, label
from torch.utils.data import DataLoader

from vitad import data, runs
from vitad.data import hashes, samples
from vitad.data.samples import ImageSet, Record
from vitad.data.sets import mt, toy
from vitad.data.verify import verify
from vitad.errors import UserError


def files(root):
    """{relative name: hash} of everything below a folder."""
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder for this test."""
    monkeypatch.setenv("VITAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def few(monkeypatch):
    """`toy` with very few images."""
    for name, count in {"N_TRAIN": 3, "N_GOOD": 2, "N_DEFECT": 1}.items():
        monkeypatch.setattr(toy, name, count)


class TestToy:
    def test_is_the_same_to_the_byte_for_a_seed_and_another_for_another(self, few, tmp_path):
        for name, seed in {"a": 3, "b": 3, "c": 4}.items():
            toy.generate(tmp_path / name, seed, ("grain", "quirks"))
        first, second, other = (files(tmp_path / name) for name in "abc")
        assert first == second
        assert first.keys() == other.keys()
        same = [name for name in first if first[name] == other[name]]
        assert same == ["quirks/ground_truth/hole/000.png"]  # the empty mask

    def test_is_the_same_on_a_processor_without_vector_extensions(self, toy_root, tmp_path):
        """NumPy picks other code for exp, sin and the like there, which differs in the last bits."""
        from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

        extensions = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
        if not extensions:
            pytest.skip("this processor has no extensions that NumPy could leave out")
        code = (
            "import pathlib; from vitad.data.sets import toy; toy.N_TRAIN, toy.N_GOOD, toy.N_DEFECT = 12, 4, 2;"
            f"toy.generate(pathlib.Path({str(tmp_path)!r}), 0, (*toy.DEFECTS, 'quirks'))"
        )
        env = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(extensions)}
        subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
        expected = files(toy_root)
        del expected["complete"]
        assert files(tmp_path) == expected

    @pytest.mark.parametrize("category", toy.DEFECTS)
    def test_every_defect_has_a_mask_of_its_size(self, toy_root, category):
        base = toy_root / category
        kinds = toy.DEFECTS[category]
        assert {d.name for d in (base / "test").iterdir()} == {"good", *kinds}
        for number, kind in enumerate(kinds, 1):
            images = sorted((base / "test" / kind).iterdir())
            masks = sorted((base / "ground_truth" / kind).iterdir())
            assert [m.stem for m in masks] == [f"{p.stem}_mask" for p in images] and len(images) == 2
            for image, mask in zip(map(read, images), map(read, masks), strict=True):
                assert image.shape == ((192, 192) if category == "grain" else (192, 192, 3))
                assert mask.shape == (192, 192)
                # gear: the small ids of the kinds, as VisA has them
                assert set(np.unique(mask)) == {0, number if category == "gear" else 255}
                assert 0.001 < (mask > 0).mean() < 0.15

    @pytest.mark.parametrize(
        "category, kind",
        [(c, k) for c, kinds in toy.DEFECTS.items() for k in kinds if k in ("scratch", "hole", "stain")],
    )
    def test_damage_lies_where_the_mask_says(self, category, kind, monkeypatch):
        """Visible all over the mask, and nowhere beyond its soft edge."""
        seen = []

        def damage(rng, image, kind, within, original=toy._damage):
            after, mask = original(rng, image, kind, within)
            seen.append(np.abs(after - image).reshape(*mask.shape, -1).max(-1))
            return after, mask

        monkeypatch.setattr(toy, "_damage", damage)
        for n in range(4):
            _, mask = toy._sample(category, kind, 0, n)
            change = seen.pop()
            assert np.median(change[mask]) > 0.08
            assert change[~binary_dilation(mask, iterations=8)].max() < 0.02

    @pytest.mark.parametrize("category", ["weave", "gear"])
    def test_where_a_part_is_missing_the_ground_shows(self, category):
        for n in range(4):
            image, mask = toy._sample(category, "missing", 0, n)
            around = binary_dilation(mask, iterations=12) & ~mask
            grey = image.mean(-1)
            assert grey[mask].mean() < 0.75 * grey[around].mean()
            assert label(mask)[1] >= 1

    def test_a_misplaced_bore_is_wrong_in_two_places(self):
        """Metal where the bore belongs, a bore where metal belongs."""
        image, mask = toy._sample("gear", "misplaced", 0, 0)
        inside = image[mask].mean(-1)
        assert np.percentile(inside, 10) < 60 < 110 < np.percentile(inside, 90)

    def test_is_generated_once_into_the_cache(self, few, cache):
        split = data.load("toy", image_size=16)
        assert (split.category, len(split.train), len(split.test)) == ("gear", 3, 2 + 4)
        assert [p.name for p in cache.iterdir()] == [f"toy-v{toy.VERSION}"]
        before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
        data.load("toy", category="weave", image_size=16)
        assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before

    def test_leaves_nothing_behind_when_it_breaks_off(self, few, cache, monkeypatch):
        def full(path, array):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(toy, "_save", full)
            with pytest.raises(UserError, match="cannot write the data set .*No space left"):
                toy.ensure()
        assert not list(cache.iterdir())
        assert len(data.load("toy", image_size=16).train) == 3

    def test_does_not_touch_a_folder_that_holds_something_else(self, few, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "image.png").write_bytes(b"keep me")
        with pytest.raises(UserError, match="mine holds other files.*--dataset folder"):
            toy.ensure(tmp_path / "mine")
        assert list(files(tmp_path)) == ["mine/image.png"]


class TestSamples:
    @pytest.mark.parametrize("category", toy.DEFECTS)
    def test_a_sample_has_the_contract_of_the_design(self, toy_root, category):
        split = data.load("toy", toy_root, category, image_size=48)
        assert (split.name, split.category, split.split) == ("toy", category, None)
        assert len(split.train) == 12 and len(split.test) == 4 + 2 * len(toy.DEFECTS[category])
        for part in (split.train, split.test):
            for i in range(len(part)):
                sample = part[i]
                assert list(sample) == ["image", "mask", "label", "path", "defect"]
                assert sample["image"].shape == (3, 48, 48) and sample["image"].dtype == torch.float32
                assert 0 <= sample["image"].min() < sample["image"].max() <= 1
                assert sample["mask"].shape == (1, 48, 48) and sample["mask"].dtype == torch.bool
                assert type(sample["label"]) is int and type(sample["path"]) is str and type(sample["defect"]) is str
                assert (toy_root / sample["path"]).is_file()
                good = "/good/" in sample["path"]
                assert sample["label"] == int(not good) and (sample["defect"] == "good") == good
                assert sample["mask"].any() == (not good)
        assert set(split.train.labels) == {0} and not split.train.masks.any()
        assert Counter(split.test.defects) == {"good": 4} | dict.fromkeys(toy.DEFECTS[category], 2)

    def test_works_with_a_data_loader(self, toy_root):
        split = data.load("toy", toy_root, "gear", image_size=32)
        batch = next(iter(DataLoader(split.test, batch_size=5, shuffle=True)))
        assert batch["image"].shape == (5, 3, 32, 32) and batch["mask"].shape == (5, 1, 32, 32)
        assert batch["label"].shape == (5,) and len(batch["path"]) == len(batch["defect"]) == 5

    def test_a_batch_is_its_samples(self, toy_root):
        test = data.load("toy", toy_root, "weave", image_size=32).test
        batch = test.batch([5, 1, 1])
        assert set(batch) == {"image", "mask", "label", "index", "texture"} and batch["index"].tolist() == [5, 1, 1]
        for name in ("image", "mask", "label"):
            expected = torch.stack([torch.as_tensor(test[i][name]) for i in (5, 1, 1)])
            assert batch[name].dtype == expected.dtype and torch.equal(batch[name], expected)

    @pytest.mark.parametrize("size", [40, (24, 56)])
    def test_image_and_mask_are_resized_to_both_sides(self, toy_root, size):
        test = data.load("toy", toy_root, "gear", image_size=size).test
        H, W = (size, size) if isinstance(size, int) else size
        i = int(np.flatnonzero(test.defects == "stain")[0])
        path = toy_root / test.paths[i]
        image = Image.open(path).convert("RGB").resize((W, H), Image.Resampling.BILINEAR)
        assert torch.equal(test[i]["image"], torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
        mask = Image.open(toy_root / "gear/ground_truth/stain" / f"{path.stem}_mask.png")
        mask = np.array(mask.resize((W, H), Image.Resampling.NEAREST)) > 0
        assert np.array_equal(test[i]["mask"][0].numpy(), mask) and mask.any()

    def test_the_threshold_tells_which_mask_pixels_count(self, toy_root):
        """The masks of gear hold 1 for scratch to 4 for misplaced."""
        all_of_them = data.load("toy", toy_root, "gear", image_size=96).test
        test = data.load("toy", toy_root, "gear", image_size=96, mask_threshold=2).test
        marked = test.masks.any((1, 2))
        assert set(test.defects[marked]) == {"missing", "misplaced"}
        assert np.array_equal(test.masks[marked], all_of_them.masks[marked])
        assert np.array_equal(test.labels, all_of_them.labels)  # labels come from the folders

    def test_grey_images_are_kept_in_one_channel_and_handed_out_in_three(self, toy_root):
        grey = data.load("toy", toy_root, "grain", image_size=32).train.batch([0, 1])["image"]
        assert grey.shape == (2, 3, 32, 32) and grey.stride(1) == 0  # three views of one channel
        assert grey[0].std() > 0.01
        colour = data.load("toy", toy_root, "gear", image_size=32).train.batch([0, 1])["image"]
        assert not torch.equal(colour[:, 0], colour[:, 1])

    @pytest.mark.parametrize("size", [7, 5000, 0, -3, 32.0, (32,), (32, 32, 3), "32"])
    def test_an_unusable_image_size_is_refused(self, toy_root, size):
        with pytest.raises(UserError, match="image size .* is not usable"):
            data.load("toy", toy_root, image_size=size)

    def test_a_large_set_is_decoded_once_into_a_cache_file(self, toy_root, cache, monkeypatch):
        records = data.find("toy", toy_root, "weave").test
        in_memory = ImageSet(records, toy_root, 32)
        assert not cache.exists()
        on_disk = ImageSet(records, toy_root, 32, limit=1000)
        everything = range(len(records))
        for name in ("image", "mask", "label"):
            assert torch.equal(on_disk.batch(everything)[name], in_memory.batch(everything)[name])
        (kept,) = (cache / "images").iterdir()

        def decode(*_):
            raise AssertionError("decoded again")

        with monkeypatch.context() as patch:
            patch.setattr(samples, "_to_uint8", decode)
            again = ImageSet(records, toy_root, 32, limit=1000)
        assert torch.equal(again.batch(everything)["image"], in_memory.batch(everything)["image"])
        assert torch.equal(again.batch(everything)["mask"], in_memory.batch(everything)["mask"])
        ImageSet(records, toy_root, 40, limit=1000)
        assert len(list((cache / "images").iterdir())) == 2 and kept.exists()

    @pytest.mark.parametrize("category, limit", [("gear", 2**30), ("weave", 2**30), ("gear", 1000)])
    def test_batches_that_a_device_indexes_are_those_of_the_host(self, toy_root, cache, category, limit):
        """Of three channels and of one, and from a file."""
        images = ImageSet(data.find("toy", toy_root, category).test, toy_root, 32, limit=limit)
        parts = ([3, 0, 3], range(1, 4), np.array([5]))
        expected = [images.batch(part) for part in parts]
        images._copies[CPU] = tuple(samples._copy(array, CPU) for array in images._arrays())
        images._images = images._masks = images.labels = None  # only the copies are read
        for batch, part in zip(expected, parts, strict=True):
            got = images.batch(part)
            assert got.keys() == batch.keys()
            assert all(torch.equal(got[name], batch[name]) and got[name].dtype == batch[name].dtype for name in got)

    def test_a_set_lives_on_a_device_where_it_takes_up_to_a_quarter_of_what_is_free(self, toy_root, monkeypatch):
        meta = torch.device("meta")
        for free, fits in ((4.0, True), (3.9, False)):
            images = ImageSet(data.find("toy", toy_root, "gear").train, toy_root, 32)
            size = images._images.nbytes + images._masks.nbytes + images.labels.nbytes
            monkeypatch.setattr(samples, "free_bytes", lambda device, free=free, size=size: free * size)
            assert images.batch([0, 2], meta)["image"].shape == (2, 3, 32, 32)
            assert (images._copies[meta] is not None) == fits
        monkeypatch.setattr(samples, "free_bytes", lambda device: 1e12)
        images._copies.clear()
        assert [t.dtype for t in images._on(meta)] == [torch.uint8, torch.bool, torch.int64]
        assert images._on(CPU) is None

    def test_threads_make_the_next_batches_in_order(self, elsewhere):
        """On the CPU there are none, and nothing is made before it is asked for."""
        made, damaged = [], []

        class Images:
            def batch(self, part, device="cpu"):
                made.append((part, str(device), threading.current_thread()))
                return {"image": torch.tensor(part)}

        def damage(number, batch):
            damaged.append(number)
            return {"image": 10 * number + batch["image"]}

        parts = [[k] for k in range(10)]
        ahead = samples.batches(Images(), parts, elsewhere, damage)
        first = next(ahead)
        deadline = time.monotonic() + 60
        while len(damaged) < samples.AHEAD + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(damaged) == list(range(samples.AHEAD + 1)), "no more than that many wait"
        batches = [first, *ahead]
        assert [batch["image"].tolist() for batch in batches] == parts
        assert [batch["damaged"]["image"].tolist() for batch in batches] == [[11 * k] for k in range(10)]
        assert threading.main_thread() not in {thread for *_, thread in made}

        made.clear()
        plain = samples.batches(Images(), parts, CPU, damage)
        next(plain), next(plain)
        assert made == [(part, "cpu", threading.main_thread()) for part in parts[:2]] and len(damaged) == 10

    def test_what_a_thread_cannot_make_is_raised(self, elsewhere):
        class Images:
            def batch(self, part, device="cpu"):
                if part == [3]:
                    raise OSError("gone")
                return {}

        with pytest.raises(OSError, match="gone"):
            list(samples.batches(Images(), [[k] for k in range(20)], elsewhere))

    def test_a_changed_image_is_decoded_anew(self, toy_root, cache, tmp_path):
        path = tmp_path / "image.bmp"  # of the same size for any content
        colours = []
        for colour, seconds in (("red", 1), ("blue", 2)):
            Image.new("RGB", (20, 20), colour).save(path)
            os.utime(path, (seconds, seconds))
            images = ImageSet([Record(path, 0, "good")], tmp_path, 16, limit=0)
            colours.append(images[0]["image"][:, 0, 0].tolist())
        assert colours == [[1, 0, 0], [0, 0, 1]]

    def test_a_set_with_gaps_leaves_no_cache_file(self, toy_root, cache, tmp_path):
        good = data.find("toy", toy_root, "weave").train[:3]
        bad = tmp_path / "bad.png"
        bad.write_bytes(good[0].path.read_bytes()[:2000])
        records = [good[0], Record(bad, 0, "good"), *good[1:]]
        images = ImageSet(records, "/", 32, skip_bad=True, limit=0)
        assert images.skipped == [bad.relative_to("/").as_posix()] and len(images) == 3
        expected = ImageSet(good, toy_root, 32)
        assert torch.equal(images.batch(range(3))["image"], expected.batch(range(3))["image"])
        with pytest.raises(UserError, match="bad.png.*--skip-bad"):
            ImageSet(records, "/", 32, limit=0)
        assert not list((cache / "images").iterdir())

    def test_a_huge_image_counts_as_unreadable(self, toy_root, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        with pytest.raises(UserError, match="cannot read image .*exceeds limit.*--skip-bad"):
            data.load("toy", toy_root, image_size=32)

    def test_the_last_images_stay_in_memory_until_a_file_changes(self, toy_root, tmp_path):
        root = tmp_path / "mine"
        shutil.copytree(toy_root / "weave", root)
        first = data.load("folder", root, image_size=32)
        assert data.load("folder", root, image_size=32) is first
        assert data.load("folder", root, image_size=48).train.size == (48, 48)
        again = data.load("folder", root, image_size=32)  # only the last are kept
        assert again is not first and np.array_equal(again.test.masks, first.test.masks)
        shutil.copy(root / "train" / "good" / "001.png", root / "train" / "good" / "000.png")
        changed = data.load("folder", root, image_size=32).train.batch([0, 1])["image"]
        assert torch.equal(changed[0], changed[1])
        assert not torch.equal(*again.train.batch([0, 1])["image"])


class TestFolder:
    def test_quirks_of_real_sets(self, toy_root):
        """Upper-case suffixes, masks of another suffix and small values, one empty; not square; a 16-bit image."""
        split = data.load("folder", toy_root / "quirks", image_size=64)
        assert len(split.train) == 4 and split.train.paths[0].endswith(".BMP")
        test = split.test
        assert list(test.defects) == ["good", "hole", "hole", "hole"] and test.paths[1].endswith(".JPG")
        assert list(test.masks.any((1, 2))) == [False, False, True, True]
        assert list(test.labels) == [0, 1, 1, 1]
        eight_bit = Image.fromarray(toy._sample("grain", "good", 0, 0)[0][:, :128])
        eight_bit = np.array(eight_bit.resize((64, 64), Image.Resampling.BILINEAR))
        assert np.array_equal(np.round(test[0]["image"][0].numpy() * 255), eight_bit)

    def test_describe_prints_what_was_found(self, toy_root):
        lines = data.describe(data.load("folder", toy_root, "gear", image_size=32)).splitlines()
        assert lines[0] == "folder gear, 32x32 px"
        table = [line.split() for line in lines[2:]]
        assert table[:2] == [["train", "good", "12"], ["test", "good", "4"]]
        assert ["test", "misplaced", "2", "2"] in table and len(table) == 6

    def test_masks_are_optional_and_folders_may_have_any_name(self, toy_root, tmp_path):
        for source, kind in (("train/good", "train/good"), ("test/good", "test/good"), ("test/hole", "test/Kratzer 7")):
            (tmp_path / kind).parent.mkdir(exist_ok=True)
            (tmp_path / kind).symlink_to(toy_root / "weave" / source, target_is_directory=True)
        split = data.load("folder", tmp_path, image_size=32)
        assert not split.test.has_masks and not split.test.masks.any()
        assert Counter(split.test.defects) == {"good": 4, "Kratzer 7": 2}
        assert data.describe(split).splitlines()[-1].split() == ["test", "Kratzer", "7", "2"]

    def test_skipped_files_are_named_in_the_table(self, toy_root, tmp_path):
        (tmp_path / "train/good").mkdir(parents=True)
        (tmp_path / "test/good").mkdir(parents=True)
        for target in ("train/good/a.png", "test/good/a.png"):
            Image.new("RGB", (20, 20)).save(tmp_path / target)
        (tmp_path / "train/good/b.png").write_text("not an image")
        split = data.load("folder", tmp_path, image_size=16, skip_bad=True)
        assert len(split.train) == 1
        assert data.describe(split).splitlines()[-1] == "skipped 1 unreadable: train/good/b.png"


# --- what tells one data set from another -----------------------------------------------------------------


class TestHashes:
    @pytest.fixture
    def root(self, toy_root, tmp_path, cache):
        """A copy of one category, to be changed."""
        return shutil.copytree(toy_root / "gear", tmp_path / "copy")

    @pytest.fixture
    def read_files(self, monkeypatch):
        """The names of the files that were read, as they are read."""
        read, names = hashes.sha256, []

        def counted(path):
            names.append(path.name)
            return read(path)

        monkeypatch.setattr(hashes, "sha256", counted)
        return names

    def test_another_byte_is_other_data(self, root):
        found = data.find("folder", root)
        contents, names = found.contents_sha256(), found.names_sha256()
        for path in (found.train[3].path, found.test[-1].mask):
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            os.utime(path, ns=(1, 1))
            changed = data.find("folder", root)
            assert changed.contents_sha256() != contents and changed.names_sha256() == names
            path.write_bytes(content)
            os.utime(path, ns=(2, 2))
            assert data.find("folder", root).contents_sha256() == contents

    def test_it_depends_on_names_and_contents_alone(self, root, toy_root):
        copied = data.find("folder", root).contents_sha256()
        assert data.find("folder", toy_root / "gear").contents_sha256() == copied
        (root / "train/good/000.png").rename(root / "train/good/999.png")
        assert data.find("folder", root).contents_sha256() != copied

    def test_the_same_files_split_otherwise_are_other_data(self, toy_root, cache):
        """Such as by another list of training images."""
        found = data.find("toy", toy_root, "grain")
        moved = replace(found, train=found.train + found.test[:1], test=found.test[1:])
        assert moved.files == found.files and moved.contents_sha256() != found.contents_sha256()

    def test_the_hash_of_names_and_sizes_is_that_of_older_records(self, root):
        found = data.find("folder", root)
        expected = hashlib.sha256()
        for record in found.train + found.test:
            for path in filter(None, (record.path, record.mask)):
                expected.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        assert found.names_sha256() == expected.hexdigest()

    def test_a_file_is_read_once_and_again_when_it_is_touched(self, root, cache, read_files):
        found = data.find("folder", root)
        contents = found.contents_sha256()
        assert sorted(read_files) == sorted(p.name for p in found.files)
        (kept,) = (cache / "hashes").iterdir()
        written = kept.stat().st_mtime_ns
        read_files.clear()
        assert data.find("folder", root).contents_sha256() == contents
        assert not read_files and kept.stat().st_mtime_ns == written
        os.utime(found.test[0].path, ns=(1, 1))
        assert found.contents_sha256() == contents and read_files == [found.test[0].path.name]
        name = found.test[0].path.relative_to(root).as_posix()
        size = found.test[0].path.stat().st_size
        digest = hashlib.sha256(found.test[0].path.read_bytes()).hexdigest()
        assert json.loads(kept.read_text())[name] == [size, 1, digest]

    @pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}', '{"train/good/000.png": [1, 2]}', "\udcff"])
    def test_a_damaged_cache_is_rebuilt(self, root, cache, read_files, damage):
        contents = data.find("folder", root).contents_sha256()
        (kept,) = (cache / "hashes").iterdir()
        expected = json.loads(kept.read_text())
        kept.write_bytes(damage.encode(errors="surrogateescape"))
        read_files.clear()
        assert data.find("folder", root).contents_sha256() == contents and read_files
        assert json.loads(kept.read_text()) == expected

    def test_a_cache_that_cannot_be_written_costs_only_time(self, root, cache, toy_root):
        cache.write_text("a file where the folder should be")
        contents = data.find("folder", root).contents_sha256()
        cache.unlink()
        assert data.find("folder", toy_root / "gear").contents_sha256() == contents

    def test_an_unreadable_file_is_left_to_the_decoder(self, root, cache, monkeypatch):
        """It has no hash in the cache; reading the image says what is wrong, or `skip_bad` leaves it out."""
        bad, read = root / "train/good/000.png", hashes.sha256
        contents = data.find("folder", root).contents_sha256()
        shutil.rmtree(cache)

        def refuse(path):
            if path == bad:
                raise PermissionError(13, "Permission denied")
            return read(path)

        monkeypatch.setattr(hashes, "sha256", refuse)
        assert data.find("folder", root).contents_sha256() != contents
        (kept,) = (cache / "hashes").iterdir()
        assert "train/good/000.png" not in json.loads(kept.read_text())


# --- MVTec AD ---------------------------------------------------------------------------------------------


class TestRealMVTec:
    """Those of the categories that are at hand."""

    @pytest.mark.parametrize(
        ("category", "train", "test"),
        [
            pytest.param("bottle", 209, 83, marks=trees.needs_real("mvtec", "bottle")),
            pytest.param("pill", 267, 167, marks=trees.needs_real("mvtec", "pill")),
        ],
    )
    def test_a_whole_category(self, category, train, test):
        report = verify("mvtec", category=category)
        assert not report.differences and report.title.startswith(f"mvtec {category} in ")
        split = data.load("mvtec", category=category, image_size=128)
        assert data.get("mvtec").counts(category) == (len(split.train), len(split.test)) == (train, test)
        assert np.array_equal(split.test.masks.any((1, 2)), split.test.labels == 1)

    @trees.needs_real("mvtec", "screw")
    def test_screw_with_its_kinds_in_one_folder_and_no_masks(self, tmp_path):
        if not (data.get("mvtec").locate() / "screw/test/defective").is_dir():
            pytest.skip("this copy of screw is as published")
        record = runs.run("patchknn", dataset="mvtec", category="screw", preset="smoke", out=tmp_path / "run")
        counts = {"train": 320, "test_good": 41, "test_defective": 119}
        assert record["counts"].items() >= counts.items()
        found = record["metrics"]
        assert found.pop("image_auroc") > 0 and found == {"pixel_auroc": None, "pixel_ap": None, "pro": None}
        assert verify("mvtec", category="screw").differences == [
            "screw test: 119 defective images as published, but with manipulated_front, scratch_head, scratch_neck, "
            "thread_side, thread_top merged into defective",
            "no masks of screw, so only image AUROC can be computed there",
        ]


# --- magnetic tiles ---------------------------------------------------------------------------------------

N_TILES = 50


@pytest.fixture(scope="module")
def tiles_root(tmp_path_factory):
    """The layout of the magnetic tiles: 50 tiles with four to six exposures each, and two images of each defect."""
    root = tmp_path_factory.mktemp("mt")
    rng = np.random.default_rng(0)
    names = {"Free": [], **{kind: [f"exp1_num_{k}" for k in (7, 900)] for kind in mt.KINDS}}
    counter = 1000
    for _ in range(N_TILES):
        counter += int(rng.integers(200, 5000))
        for exposure in range(1, int(rng.integers(5, 8))):
            counter += int(rng.integers(1, 121))
            names["Free"].append(f"exp{exposure}_num_{counter}")
    for kind, stems in names.items():
        folder = root / f"MT_{kind}" / "Imgs"
        folder.mkdir(parents=True)
        for n, stem in enumerate(stems):
            Image.new("L", (30 + n % 5, 50), n % 256).save(folder / f"{stem}.jpg")
            mask = np.zeros((50, 30 + n % 5), np.uint8)
            mask[10:20, 10:20] = 40 * (kind != "Free")  # grey levels, as published
            Image.fromarray(mask).save(folder / f"{stem}.png")
    free = sorted(f"{stem}.jpg" for stem in names["Free"])
    (root / mt.DIFFERNET_LIST).write_text("\n".join(free[::2]) + "\n")
    return root


def names(records):
    return [r.path.name for r in records]


class TestMagneticTiles:
    def test_a_jump_of_the_frame_counter_starts_a_new_tile(self):
        found = mt.tiles(["exp2_num_220.jpg", "exp1_num_100.jpg", "exp1_num_341.jpg", "exp3_num_1000.jpg"])
        assert found == [["exp1_num_100.jpg", "exp2_num_220.jpg"], ["exp1_num_341.jpg"], ["exp3_num_1000.jpg"]]
        with pytest.raises(UserError, match="photo.jpg is not of the form"):
            mt.tiles(["photo.jpg"])

    def test_no_tile_lies_on_both_sides_of_the_grouped_split(self, tiles_root):
        train, test = mt.DATASET.records(tiles_root, split="grouped")
        good = [r for r in test if r.label == 0]
        groups = mt.tiles(names(train) + names(good))
        assert len(groups) == N_TILES
        in_train = [set(group) <= set(names(train)) for group in groups]
        assert all(inside or not set(group) & set(names(train)) for inside, group in zip(in_train, groups, strict=True))
        assert sum(in_train) == 0.8 * N_TILES

    @pytest.mark.parametrize("split", mt.SPLITS)
    def test_every_split_tests_all_defects_and_uses_each_good_image_once(self, tiles_root, split):
        train, test = mt.DATASET.records(tiles_root, split=split)
        everything = sorted(p.name for p in (tiles_root / "MT_Free" / "Imgs").glob("*.jpg"))
        assert sorted(names(train) + names(r for r in test if r.label == 0)) == everything
        assert {r.label for r in train} == {0}
        assert Counter(r.defect for r in test if r.label) == dict.fromkeys(mt.KINDS, 2)
        assert all(r.mask == r.path.with_suffix(".png") for r in test if r.label)
        assert mt.DATASET.records(tiles_root, split=split) == (train, test)

    def test_the_split_depends_on_names_only(self, tiles_root, tmp_path):
        """The same names elsewhere, made in another order, with other bytes."""
        for path in sorted(tiles_root.rglob("*.*"), reverse=True):
            (tmp_path / path.relative_to(tiles_root)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(tiles_root)).touch()
        for split in ("grouped", "mala100"):
            both = (mt.DATASET.records(root, split=split) for root in (tiles_root, tmp_path))
            for records, copied in zip(*both, strict=True):
                assert names(records) == names(copied)

    def test_mala100_takes_a_hundred(self, tiles_root):
        train, _ = mt.DATASET.records(tiles_root, split="mala100")
        assert len(train) == 100
        assert len(mt.tiles(names(train))) > 30  # spread over the tiles, not the first ones

    def test_differnet_follows_its_list(self, tiles_root, monkeypatch):
        listed = (tiles_root / mt.DIFFERNET_LIST).read_text().split()
        assert sorted(names(mt.DATASET.records(tiles_root, split="differnet")[0])) == sorted(listed)
        monkeypatch.setattr(mt, "DIFFERNET_LIST", "no-such-list.txt")
        with pytest.raises(UserError, match="needs .*no-such-list.txt.*--split grouped"):
            mt.DATASET.records(tiles_root, split="differnet")
        (tiles_root / "strange.txt").write_text("\n".join([*listed, "exp1_num_1.jpg"]))
        monkeypatch.setattr(mt, "DIFFERNET_LIST", "strange.txt")
        with pytest.raises(UserError, match=r"strange.txt lists exp1_num_1.jpg, which is not in MT_Free"):
            mt.DATASET.records(tiles_root, split="differnet")

    def test_load_reads_images_and_masks_that_lie_side_by_side(self, tiles_root, monkeypatch):
        monkeypatch.setenv("VITAD_MT_ROOT", str(tiles_root))
        split = data.load("mt", image_size=32)
        assert (split.name, split.category, split.split) == ("mt", None, "grouped")
        defective = split.test.labels == 1
        assert split.test.masks[defective].any((1, 2)).all() and not split.test.masks[~defective].any()
        assert split.test[0]["image"].shape == (3, 32, 32)
        strict = data.load("mt", image_size=32, mask_threshold=127)
        assert not strict.test.masks.any()

    def test_a_missing_mask_is_named(self, tiles_root, tmp_path):
        for path in tiles_root.rglob("*.*"):
            (tmp_path / path.relative_to(tiles_root)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(tiles_root)).touch()
        (tmp_path / "MT_Fray/Imgs/exp1_num_900.png").unlink()
        with pytest.raises(UserError, match=re.escape(str(tmp_path / "MT_Fray/Imgs/exp1_num_900.png"))):
            mt.DATASET.records(tmp_path, split="grouped")


@pytest.fixture(scope="module")
def splits():
    """{split: (train, test)} of the real magnetic tiles."""
    return {split: (found.train, found.test) for split in mt.SPLITS for found in [data.find("mt", split=split)]}


@trees.needs_real("mt")
class TestRealMagneticTiles:
    """What was counted in the published data set (commit cc4eb53)."""

    def test_counts(self, splits):
        train, test = splits["grouped"]
        good = [r for r in test if r.label == 0]
        assert len(train) + len(good) == 952
        assert Counter(r.defect for r in test if r.label) == {
            "Blowhole": 115,
            "Break": 85,
            "Crack": 57,
            "Fray": 32,
            "Uneven": 103,
        }
        assert len(splits["differnet"][0]) == 761 and len(splits["mala100"][0]) == 100
        for split, (train, test) in splits.items():
            assert data.get("mt").counts(split=split) == (len(train), len(test))

    def test_tiles(self, splits):
        train, test = splits["grouped"]
        groups = mt.tiles(names(train) + names(r for r in test if r.label == 0))
        assert len(groups) == 158
        assert Counter(map(len, groups))[6] == 130
        assert len(mt.tiles(names(train))) == round(0.8 * 158)

    def test_the_usual_split_tests_tiles_that_it_has_trained_on_and_ours_does_not(self, splits):
        shared = {}
        for split, (train, test) in splits.items():
            train, good = set(names(train)), [r.path.name for r in test if r.label == 0]
            tile_of = {name: i for i, tile in enumerate(mt.tiles([*train, *good])) for name in tile}
            trained = {tile_of[name] for name in train}
            shared[split] = (sum(tile_of[name] in trained for name in good), len(good))
        assert shared["differnet"] == (190, 191)
        assert shared["grouped"][0] == 0

    def test_four_defective_images_have_an_empty_mask(self, splits):
        empty = [r for r in splits["grouped"][1] if r.label and not read(r.mask).any()]
        assert {r.defect for r in empty} == {"Uneven"}
        assert {r.path.stem for r in empty} == {
            "exp3_num_45042",
            "exp4_num_124690",
            "exp4_num_352527",
            "exp4_num_45057",
        }

    def test_loads(self):
        split = data.load("mt", split="grouped", image_size=32)
        assert len(split.train) + len(split.test) == 952 + 392
        assert split.train.batch([0])["image"].stride(1) == 0  # grey, kept in one channel
