"""Published data sets, on small trees in their layouts: what is read, what is refused, what verifying finds."""

import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import trees
from PIL import Image

from vitad import data
from vitad.cli import main
from vitad.data import verify
from vitad.data.sets import visa
from vitad.errors import UserError
from vitad.papers.printed import table

EVERY = data.DATASETS | data.TEXTURE_SETS


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """{name: tree}, to be read only."""
    roots = {name: tmp_path_factory.mktemp(name) for name in trees.WRITE}
    for name, write in trees.WRITE.items():
        write(roots[name])
    return roots


@pytest.fixture
def copy_of(roots, tmp_path):
    """Function that copies a tree, to be changed by the test."""
    return lambda name: shutil.copytree(roots[name], tmp_path / name)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The trees are taken for the whole data sets when they are counted, not where categories are looked up."""
    real = {name: EVERY[name].published for name in trees.COUNTS}
    for name, counts in trees.COUNTS.items():
        monkeypatch.setattr(EVERY[name], "published", counts)
    return real


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def kinds(images):
    return Counter(images.defects.tolist())


# --- what is published ------------------------------------------------------------------------------------


def totals(published):
    """Training images, good and defective test images of all categories."""
    sums = Counter()
    for counts in published.values():
        for (part, kind), number in counts.items():
            sums[part, kind == "good"] += number
    return sums["train", True], sums["test", True], sums["test", False]


def test_the_counts_add_up_to_the_published_totals(small):
    assert totals(small["mvtec"]) == (3629, 467, 1258) and len(small["mvtec"]) == 15
    assert sum(len(counts) - 2 for counts in small["mvtec"].values()) == 73  # kinds of defects
    assert totals(small["btad"]) == (1799, 451, 290)
    assert totals(small["visa"]) == (8659, 962, 1200) and len(small["visa"]) == 12
    assert totals(small["ksdd2"]) == (2085, 894, 110) and small["ksdd2"]["ksdd2"]["train", "defect"] == 246
    assert sum(small["dtd"][None].values()) == 47 * 120
    assert sum(EVERY["mt"].published[None].values()) == 952 + 392


def test_the_counts_of_mvtec_are_those_that_a_paper_prints(small):
    printed = table("yang2024-1").set_index("category").drop("total")
    assert set(printed.index) == set(small["mvtec"])
    for category, counts in small["mvtec"].items():
        row = printed.loc[category]
        assert totals({category: counts}) == (row["train_normal"], row["test_normal"], row["test_anomalous"])


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, category, folder",
    [
        ("mvtec", "metal_nut", "metal_nut"),
        ("mvtec", "Metal nut", "metal_nut"),
        ("mvtec", "metal-nut", "metal_nut"),
        ("visa", "PCB1", "pcb1"),
        ("visa", "Pipe fryum", "pipe_fryum"),
        ("visa", "Chewing gum", "chewinggum"),
        ("visa", "Candles", "candle"),
        ("visa", "Capsules", "capsules"),
        ("visa", "Macaroni 1", "macaroni1"),
        ("btad", "01", "01"),
        ("btad", 3, "03"),
        ("ksdd2", None, "ksdd2"),
        ("ksdd2", "KSDD2", "ksdd2"),
    ],
)
def test_categories_are_named_as_folders_or_as_in_papers(name, category, folder, small, monkeypatch):
    monkeypatch.setattr(EVERY[name], "published", small[name])
    assert data.get(name).resolve(category) == (folder, None)


def test_unknown_names_are_refused(small, monkeypatch):
    monkeypatch.delenv("VITAD_DATA", raising=False)
    monkeypatch.setattr(EVERY["mvtec"], "published", small["mvtec"])
    with pytest.raises(UserError, match="unknown category of mvtec 'capsules'. Did you mean 'capsule'"):
        data.get("mvtec").resolve("capsules")
    with pytest.raises(UserError, match="'mvtec' has several categories: bottle, .*zipper. Choose one with --category"):
        data.get("mvtec").resolve()
    with pytest.raises(UserError, match="'visa' is split by split_csv/1cls.csv, but split '2cls' was given"):
        data.get("visa").resolve("candle", "2cls")
    with pytest.raises(UserError, match="'ksdd2' is split by its folders"):
        data.get("ksdd2").resolve(split="official")
    with pytest.raises(UserError, match="'btad' needs its folder: give --data-root"):
        data.find("btad", category="01")
    with pytest.raises(UserError, match="unknown dataset 'dtd'"):  # textures: nothing to train on
        data.load("dtd", ".")


@pytest.mark.parametrize("name, category", [("mvtec", "grid"), ("btad", "01"), ("visa", "candle"), ("ksdd2", None)])
def test_a_wrong_folder_is_refused(name, category, tmp_path):
    with pytest.raises(UserError, match="nowhere.*(does not exist|holds no images)"):
        data.load(name, tmp_path / "nowhere", category)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*Point --data-root to the folder"):
        data.load(name, tmp_path, category)


@pytest.mark.parametrize("name, category", [("mt", None), ("ksdd2", "ksdd2"), ("mvtec", "all"), ("toy", "all")])
def test_all_categories_of_a_set_without_any_are_the_set(name, category):
    assert data.get(name).resolve("all")[0] == category


def test_all_categories_of_several_sets_at_once(roots, toy_root, tmp_path, monkeypatch):
    monkeypatch.delenv("VITAD_DATA", raising=False)
    split = data.load("btad", roots["btad"], "all", image_size=16)
    assert list(dict.fromkeys(split.train.categories)) == ["btad/01", "btad/02", "btad/03"]
    assert all(
        path.startswith(key.removeprefix("btad/"))
        for path, key in zip(split.test.paths, split.test.categories, strict=True)
    )
    for name in ("btad", "ksdd2"):
        (tmp_path / name).symlink_to(roots[name], target_is_directory=True)
    (tmp_path / "toy").symlink_to(toy_root, target_is_directory=True)
    both = data.load("btad+ksdd2", tmp_path, image_size=16)
    assert (both.name, both.category, both.split) == ("btad+ksdd2", "all", None)
    assert list(dict.fromkeys(both.test.categories)) == ["btad/01", "btad/02", "btad/03", "ksdd2/ksdd2"]
    assert both.train.paths[0].startswith("btad/01/train") and both.train.paths[-1].startswith("ksdd2/train")
    assert len(data.load("toy+btad", tmp_path, image_size=16).train) == 36 + len(split.train)
    with pytest.raises(UserError, match="'mvtec[+]visa' are several data sets, but category 'bottle' was given"):
        data.get("mvtec+visa").resolve("bottle")
    with pytest.raises(UserError, match="unknown dataset 'viso'. Did you mean 'visa'"):
        data.get("mvtec+viso").resolve()
    with pytest.raises(UserError, match="needs its folder"):
        data.find("mvtec+visa")
    assert data.get("toy+mt").resolve(split="mala100") == ("all", "mala100")
    with pytest.raises(UserError, match="split 'mala100' was given"):
        data.get("toy+visa").resolve(split="mala100")


def test_the_table_of_several_categories_names_them(toy_root, roots):
    lines = data.describe(data.load("toy", toy_root, "all", image_size=32)).splitlines()
    assert lines[0] == "toy all, 32x32 px"
    assert lines[2].split() == ["toy/weave", "train", "good", "12"]
    assert ["toy/gear", "test", "misplaced", "2", "2"] in [line.split() for line in lines]


def test_several_categories_for_one_model(roots):
    every = data.get("btad").categories()
    first, *_, last = every
    joined = data.load("btad", roots["btad"], f"{last}+{first}", image_size=32)
    assert joined.category == f"{first}+{last}"  # in the order of the data set
    assert set(joined.test.categories) == {f"btad/{first}", f"btad/{last}"}
    alone = [data.load("btad", roots["btad"], one, image_size=32) for one in (first, last)]
    assert len(joined.train) == sum(len(one.train) for one in alone)
    assert data.describe(joined).startswith(f"btad {first}+{last}, 32x32 px\ncategory")
    assert data.get("btad").resolve("+".join(every)) == ("all", None)
    with pytest.raises(UserError, match="04"):
        data.load("btad", roots["btad"], f"{first}+04", image_size=32)


def test_all_of_a_user_s_folder(toy_root):
    assert len(data.load("folder", toy_root, "all", image_size=16).train) == 3 * 12 + 4
    one = data.load("folder", toy_root / "gear", "all", image_size=16)
    assert one.category is None and set(one.train.categories) == {"folder"}


# --- its folder -------------------------------------------------------------------------------------------


@pytest.fixture
def unset(monkeypatch):
    """No variable says where the data are."""
    for variable in ("VITAD_DATA", "VITAD_MT_ROOT"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def shelf(unset, monkeypatch, tmp_path):
    """The folder that `VITAD_DATA` names."""
    monkeypatch.setenv("VITAD_DATA", str(tmp_path / "shelf"))
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


def test_a_data_set_is_found_below_the_folder_of_the_variable(shelf, roots):
    (shelf / "btad").symlink_to(roots["btad"], target_is_directory=True)
    assert data.get("btad").locate() == roots["btad"]
    assert len(data.load("btad", category="01", image_size=16).train) == 4
    assert data.get("btad").locate(roots["visa"]) == roots["visa"]  # --data-root comes first
    assert data.get("btad").where_to_get() is None


def test_without_its_folder_the_error_says_what_to_set(unset, shelf, monkeypatch):
    with pytest.raises(UserError, match=rf"set VITAD_DATA to the folder that holds 'btad' [(]now {shelf}[)]"):
        data.find("btad", category="01")
    for value in (None, ""):
        monkeypatch.delenv("VITAD_DATA") if value is None else monkeypatch.setenv("VITAD_DATA", value)
        with pytest.raises(UserError) as e:
            data.get("btad").locate()
        assert str(e.value) == (
            "dataset 'btad' needs its folder: give --data-root or set VITAD_DATA to the folder that holds 'btad'."
        )


def test_the_variable_of_the_tiles_comes_before_the_common_one(shelf, monkeypatch, tmp_path):
    tiles = data.get("mt")
    with pytest.raises(UserError, match="--data-root or set VITAD_MT_ROOT, or set VITAD_DATA to the folder .* 'mt'"):
        tiles.locate()
    (shelf / "mt").mkdir()
    assert tiles.locate() == shelf / "mt"
    monkeypatch.setenv("VITAD_MT_ROOT", "")
    assert tiles.locate() == shelf / "mt"
    monkeypatch.setenv("VITAD_MT_ROOT", str(tmp_path / "tiles"))
    assert tiles.locate() == tmp_path / "tiles"
    assert tiles.locate(tmp_path / "given") == tmp_path / "given"


def test_several_data_sets_are_found_where_all_of_them_are(shelf, roots, tmp_path):
    both = data.get("btad+ksdd2")
    (shelf / "btad").symlink_to(roots["btad"], target_is_directory=True)
    with pytest.raises(UserError, match="'btad[+]ksdd2' needs its folder: .* VITAD_DATA .* holds 'btad' and 'ksdd2'"):
        both.locate()
    assert "'btad'" not in both.where_to_get() and "data download ksdd2 --root DIR/ksdd2" in both.where_to_get()
    (shelf / "ksdd2").symlink_to(roots["ksdd2"], target_is_directory=True)
    assert both.locate() == shelf and both.where_to_get() is None
    found = data.find("btad+ksdd2")
    assert (found.root, found.category, len(found.train)) == (shelf, "all", 3 * 4 + 4)
    assert both.locate(tmp_path) == tmp_path
    assert f"data: 'btad' is not at hand in {tmp_path}." in both.where_to_get(tmp_path)


def test_the_generated_set_stays_in_the_cache(shelf, toy_root, monkeypatch):
    monkeypatch.setenv("VITAD_CACHE", str(toy_root.parent))
    (shelf / "toy").mkdir()
    monkeypatch.setattr("vitad.data.sets.toy.ensure", lambda root: root or toy_root)
    assert data.get("toy").locate() == toy_root and data.get("toy").where_to_get() is None


def test_where_a_data_set_can_be_had(unset, tmp_path):
    assert data.get("btad").where_to_get().splitlines() == [
        "data: 'btad' is not at hand. Give its folder with --data-root DIR.",
        f"  page https://github.com/pankajmishra000/VT-ADL, licence {data.get('btad').source.licence}",
        "  vitad data download btad --root DIR --accept-licence",
    ]
    tiles = data.get("mt").where_to_get(tmp_path / "nowhere").splitlines()
    assert tiles[0] == f"data: 'mt' is not at hand in {tmp_path / 'nowhere'}. Give its folder with --data-root DIR."
    assert tiles[2] == "  git clone https://github.com/abin24/Magnetic-tile-defect-datasets. DIR"
    assert data.get("folder").where_to_get().count("\n") == 0


# --- how many images there are ----------------------------------------------------------------------------


def test_the_numbers_of_images_of_a_run(small, monkeypatch):
    for name, published in small.items():
        monkeypatch.setattr(EVERY[name], "published", published)
    assert data.get("mvtec").counts("Metal nut") == (220, 115)
    assert data.get("mvtec").counts("all") == (3629, 1725)
    assert data.get("mvtec+visa").counts() == (3629 + 8659, 1725 + 2162)
    assert data.get("ksdd2").counts() == (2085, 1004)  # training on the defective ones is left out
    assert data.get("mt").counts(split="differnet") == (761, 583)
    assert data.get("visa+mt").counts(split="mala100") == (8659 + 100, 2162 + 1244)
    assert data.get("folder").counts() is data.get("mvtec+folder").counts() is None


def test_the_numbers_of_generated_images_are_those_of_the_generator(monkeypatch):
    assert data.get("toy").counts() == (60, 52)
    monkeypatch.setattr("vitad.data.sets.toy.N_TRAIN", 7)
    assert data.get("toy").counts("all") == (21, 3 * 20 + 8 * 11)
    assert data.get("toy").counts("quirks") is None


def test_the_numbers_agree_with_what_is_read(roots, toy_root):
    for name, category in (("mvtec", "all"), ("btad", "02"), ("visa", "candle"), ("ksdd2", None)):
        found = data.find(name, roots[name], category)
        assert data.get(name).counts(category) == (len(found.train), len(found.test))


# --- what is read -----------------------------------------------------------------------------------------


def test_mvtec(roots):
    split = data.load("mvtec", roots["mvtec"], "Metal nut", image_size=16)
    assert (split.name, split.category, split.split) == ("mvtec", "metal_nut", None)
    assert split.train.paths.tolist() == [f"metal_nut/train/good/00{n}.png" for n in range(3)]
    assert kinds(split.test) == {"good": 2, "bent": 2, "flip": 2}
    assert np.array_equal(split.test.masks.any((1, 2)), split.test.labels == 1)


def test_grey_images_come_in_three_channels(roots):
    image = data.load("mvtec", roots["mvtec"], "grid", image_size=16).train[0]["image"]
    assert image.shape == (3, 16, 16) and torch.equal(image[0], image[2]) and image.std() > 0.01


def test_a_category_that_is_not_there(copy_of):
    root = copy_of("btad")
    with pytest.raises(UserError, match="unknown category of btad '04'"):
        data.load("btad", root, "04")
    shutil.rmtree(root / "03")
    with pytest.raises(UserError, match=r"unknown category in .*btad: '03'.* Choose from: 01, 02"):
        data.load("btad", root, "03")


@pytest.mark.parametrize("product, suffix, marked", [("01", ".bmp", 3), ("02", ".png", 2), ("03", ".BMP", 3)])
def test_btad(product, suffix, marked, roots):
    """Masks are found whatever their suffix; a value of 1 counts; an empty mask leaves the label."""
    split = data.load("btad", roots["btad"], product, image_size=(12, 16))
    assert len(split.train) == 4 and kinds(split.test) == {"good": 2, "ko": 3}
    assert split.test.paths.tolist()[:3] == [f"{product}/test/ko/{n}{suffix}" for n in ("0025", "0026", "0028")]
    assert split.test.labels.tolist() == [1, 1, 1, 0, 0]
    assert split.test.masks.any((1, 2)).sum() == marked
    assert split.test[0]["image"].shape == (3, 12, 16)
    assert data.describe(split).splitlines()[-1].split() == ["test", "ko", "3", str(marked)]


def test_of_two_masks_with_one_stem_the_png_counts(copy_of):
    root = copy_of("btad")
    trees.mask(root / "01/ground_truth/ko/0025.bmp", 0, (16, 16))
    test = data.find("btad", root, "01").test
    assert test[0].mask.name == "0025.png"


def test_visa_is_split_by_its_file(roots):
    split = data.load("visa", roots["visa"], "Pipe fryum", image_size=16)
    normal = "pipe_fryum/Data/Images/Normal"
    assert split.train.paths.tolist() == [f"{normal}/{n}.JPG" for n in ("0001", "0002", "0004")]
    assert split.test.paths.tolist()[:2] == [f"{normal}/{n}.JPG" for n in ("0000", "0003")]
    assert kinds(split.test) == {"good": 2, "anomaly": 3}
    # The masks hold 1, 2 and 3; each counts in full.
    areas = split.test.masks[split.test.labels == 1].sum((1, 2))
    assert areas.min() == areas.max() > 0


def test_visa_converted_gives_the_same(roots, tmp_path):
    trees.visa_converted(roots["visa"], tmp_path)
    assert not verify.verify("visa", tmp_path).differences
    raw, converted = (data.load("visa", root, "candle", image_size=16) for root in (roots["visa"], tmp_path))
    for part in ("train", "test"):
        one, other = getattr(raw, part), getattr(converted, part)
        order = {path.rpartition("/")[2]: i for i, path in enumerate(one.paths)}
        same = [order[path.rpartition("/")[2]] for path in other.paths]
        assert len(set(same)) == len(one) == len(other)
        assert np.array_equal(one.labels[same], other.labels) and np.array_equal(one.defects[same], other.defects)
        for name in ("image", "mask"):
            assert torch.equal(one.batch(same)[name], other.batch(range(len(other)))[name])


def test_a_split_file_that_does_not_fit_is_refused(copy_of):
    root = copy_of("visa")
    path = root / visa.SPLIT_FILE
    text = path.read_text()

    def refused(match, changed=None):
        if changed is not None:
            path.write_text(changed)
        with pytest.raises(UserError, match=match):
            data.load("visa", root, "candle", image_size=16)
        path.write_text(text)

    refused("1cls.csv, line 2: expected object, split", "image,label\na.JPG,0\n")
    refused("1cls.csv, line 3: expected", text.replace("candle,train,normal", "candle,validation,normal", 1))
    refused("1cls.csv, line 2: .*paths below", text.replace("candle/Data/Images", "../candle/Data/Images", 1))
    refused("1cls.csv, line 2: .*paths below", text.replace("candle/Data/Images", "/candle/Data/Images", 1))
    refused("lists no training or no test images of 'candle'", text.replace("candle,train", "candle,test"))
    refused("trains on anomalous images", text.replace("candle,test,anomaly", "candle,train,anomaly", 1))
    refused("names no mask for .*Anomaly/000.JPG", text.replace("candle/Data/Masks/Anomaly/000.png", ""))
    trees.mask(root / "candle/Data/Masks/Anomaly/009.png")
    refused("009.png belongs to no image")
    (root / "candle/Data/Masks/Anomaly/009.png").unlink()
    (root / "candle/Data/Images/Normal/0001.JPG").unlink()
    refused("0001.JPG is listed in split_csv/1cls.csv and missing")
    path.unlink()
    with pytest.raises(UserError, match="1cls.csv is missing, which holds the split"):
        data.load("visa", root, "candle")


def test_ksdd2_trains_on_what_its_masks_call_good(roots):
    """And knows the pairs by their five digits: `10301_GT (copy).png` is neither an image nor a mask."""
    split = data.load("ksdd2", roots["ksdd2"], image_size=(64, 24))
    assert (split.category, split.split) == ("ksdd2", None)
    assert split.train.paths.tolist() == [f"train/{n}.png" for n in (10300, 10301, 10303, 10305)]
    assert kinds(split.test) == {"good": 4, "defect": 2} and split.test.labels.tolist() == [0, 1, 0, 1, 0, 0]
    assert np.array_equal(split.test.masks.any((1, 2)), split.test.labels == 1)
    assert not split.train.masks.any()


def test_ksdd2_without_a_readable_mask_is_refused(copy_of):
    root = copy_of("ksdd2")
    truth = root / "train" / "10303_GT.png"
    truth.write_bytes(truth.read_bytes()[:40])
    with pytest.raises(UserError, match="10303.png has no readable mask, which holds its label"):
        data.load("ksdd2", root, image_size=16)
    truth.unlink()
    with pytest.raises(UserError, match="10303.png has no readable mask"):
        data.load("ksdd2", root, image_size=16)
    (root / "train" / "10303.png").unlink()
    (root / "train" / "10304.png").unlink()
    with pytest.raises(UserError, match="10304_GT.png has no image"):
        data.load("ksdd2", root, image_size=16)


def test_a_changed_mask_changes_the_label(copy_of):
    root = copy_of("ksdd2")
    assert len(data.find("ksdd2", root).train) == 4
    trees.mask(root / "train" / "10303_GT.png", 1, (21, 61))
    os.utime(root / "train" / "10303_GT.png", ns=(1, 1))
    assert len(data.find("ksdd2", root).train) == 3


@pytest.mark.parametrize("name, category", [("visa", "Candles"), ("ksdd2", None)])
def test_a_run_on_it(name, category, roots, tmp_path):
    where = ["--category", category] if category else []
    command = ["run", "patchknn", "--dataset", name, *where, "--data-root", str(roots[name]), "--preset", "smoke"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "record.json").exists()


# --- verifying --------------------------------------------------------------------------------------------


def row(output, *words):
    """The cells that follow these words in a line of a table."""
    (cells,) = [line.split()[len(words) :] for line in output.splitlines() if line.split()[: len(words)] == list(words)]
    return cells


@pytest.mark.parametrize("name", trees.WRITE)
def test_a_whole_data_set_verifies(name, roots, capsys):
    assert main(["data", "verify", name, "--root", str(roots[name])]) == 0
    output = capsys.readouterr().out
    number = str(sum(sum(counts.values()) for counts in trees.COUNTS[name].values()))
    assert row(output, "total") == [number, number]
    assert output.splitlines()[-1] == "as it should be" and "differs" not in output


def test_the_table_goes_by_category_part_and_kind(roots, capsys):
    main(["data", "verify", "btad", "--root", str(roots["btad"])])
    output = capsys.readouterr().out
    assert row(output, "02", "test", "ko") == ["3", "3"] and row(output, "03", "train", "good") == ["4", "4"]
    # Nobody has published how many of its masks are empty: shown, compared with nothing.
    assert row(output, "empty", "masks") == ["-", "1", "02/ground_truth/ko/0028.png"]


def test_what_is_no_part_of_a_data_set_is_shown(roots):
    expected, names = verify.verify("ksdd2", roots["ksdd2"]).checks["image files left out"]
    assert (expected, names) == (None, ["train/10301 (copy).png", "train/10301_GT (copy).png"])


def harm_count(root):
    (root / "grid/train/good/001.png").unlink()
    return "grid train good: 2 images, 3 published"


def harm_kind(root):
    trees.picture(root / "grid/test/dent/000.png")
    trees.mask(root / "grid/ground_truth/dent/000_mask.png")
    return "grid test dent: 1 images, none published"


def harm_category(root):
    shutil.rmtree(root / "metal_nut")
    return "no images of metal_nut"


def harm_image(root):
    path = root / "grid/test/good/000.png"
    path.write_bytes(path.read_bytes()[:100])
    return "unreadable files: 1, expected 0"


def harm_mask(root):
    (root / "grid/ground_truth/glue/000_mask.png").write_text("")
    return "unreadable files: 1, expected 0"


def lose_mask(root):
    (root / "grid/ground_truth/glue/000_mask.png").unlink()
    return "images without a mask: 1, expected 0"


def lose_image(root):
    (root / "grid/test/glue/000.png").unlink()
    return "masks without an image: 1, expected 0"


def lose_masks(root):
    shutil.rmtree(root / "grid/ground_truth")
    return "no masks of grid, so only image AUROC can be computed there"


def resize_mask(root):
    trees.mask(root / "grid/ground_truth/glue/000_mask.png", size=(23, 16))
    return "masks of another size than the image: 1, expected 0"


def empty_mask(root):
    trees.mask(root / "grid/ground_truth/glue/000_mask.png", 0)
    return "empty masks: 1, expected 0"


@pytest.mark.parametrize(
    "harm",
    [
        harm_count,
        harm_kind,
        harm_category,
        harm_image,
        harm_mask,
        lose_mask,
        lose_masks,
        lose_image,
        resize_mask,
        empty_mask,
    ],
)
def test_what_differs_is_named_and_is_the_exit_status(harm, copy_of, capsys):
    root = copy_of("mvtec")
    difference = harm(root)
    assert main(["data", "verify", "mvtec", "--root", str(root)]) == 1
    assert difference in capsys.readouterr().out.splitlines()


def test_files_that_are_the_trouble_are_named(copy_of, capsys):
    root = copy_of("mvtec")
    harm_image(root)
    lose_mask(root)
    main(["data", "verify", "mvtec", "--root", str(root)])
    output = capsys.readouterr().out
    assert row(output, "unreadable", "files") == ["0", "1", "grid/test/good/000.png"]
    assert row(output, "images", "without", "a", "mask") == ["0", "1", "grid/test/glue/000.png"]


def test_duplicates_are_found_across_names_and_categories(copy_of):
    root = copy_of("mvtec")
    shutil.copy(root / "grid/train/good/000.png", root / "metal_nut/test/good/001.png")
    expected, names = verify.verify("mvtec", root).checks["duplicate images"]
    assert (expected, names) == (None, ["grid/train/good/000.png = metal_nut/test/good/001.png"])


def test_one_category_is_verified_alone(copy_of, tmp_path):
    root = copy_of("mvtec")
    harm_count(root)
    report = verify.verify("mvtec", root, "Metal nut")
    assert report.title == f"mvtec metal_nut in {root}" and not report.differences
    assert {row[0] for row in report.counts} == {"metal_nut"}
    assert report.checks["image files left out"] == (None, [])
    trees.picture(root / "metal_nut/extra.png")
    assert verify.verify("mvtec", root, "metal_nut").checks["image files left out"][1] == ["metal_nut/extra.png"]
    assert verify.verify("mvtec", root, "grid").differences == ["grid train good: 2 images, 3 published"]
    shutil.rmtree(root / "grid")
    assert verify.verify("mvtec", root, "grid").differences == ["no images of grid"]
    assert verify.verify("mvtec", root).differences == ["no images of grid"]
    with pytest.raises(UserError, match="unknown category of mvtec 'gird'. Did you mean 'grid'"):
        verify.verify("mvtec", root, "gird")


def test_missing_categories_are_a_line_each(copy_of, capsys, monkeypatch):
    """The others are reported in full."""
    root = copy_of("mvtec")
    wanted = trees.COUNTS["mvtec"] | {name: trees.COUNTS["mvtec"]["metal_nut"] for name in ("cable", "wood")}
    monkeypatch.setattr(EVERY["mvtec"], "published", wanted)
    (root / "cable").mkdir()
    harm_count(root)
    assert main(["data", "verify", "mvtec", "--root", str(root)]) == 1
    output = capsys.readouterr().out
    assert row(output, "cable") == row(output, "wood") == ["9", "0", "differs"]
    assert row(output, "total") == ["34", "15", "differs"] and row(output, "metal_nut", "test", "flip") == ["2", "2"]
    assert output.split("\n\n")[-1].splitlines() == [
        "no images of cable, wood",
        "grid train good: 2 images, 3 published",
    ]


def merge_kinds(root, name="defective"):
    """All kinds of defect of metal_nut in one folder, without masks."""
    (root / "metal_nut/test" / name).mkdir()
    for kind in ("bent", "flip"):
        for path in (root / "metal_nut/test" / kind).iterdir():
            path.rename(root / "metal_nut/test" / name / f"{kind}{path.name}")
        (root / "metal_nut/test" / kind).rmdir()
    shutil.rmtree(root / "metal_nut/ground_truth")


def test_merged_kinds_and_a_category_without_masks_are_a_line_each(copy_of, capsys):
    root = copy_of("mvtec")
    merge_kinds(root)
    assert main(["data", "verify", "mvtec", "--root", str(root)]) == 1
    output = capsys.readouterr().out
    assert row(output, "categories", "without", "masks") == ["0", "1", "metal_nut"]
    assert output.split("\n\n")[-1].splitlines() == [
        "all 16 images are there, but:",
        "metal_nut test: 4 defective images as published, but with bent, flip merged into defective",
        "no masks of metal_nut, so only image AUROC can be computed there",
    ]
    assert not verify.verify("mvtec", root, "grid").differences
    lose_mask(root)  # where others have one, a lost mask is counted
    assert verify.verify("mvtec", root).differences[1:] == [
        "images without a mask: 1, expected 0",
        "no masks of metal_nut, so only image AUROC can be computed there",
    ]


def test_merged_kinds_that_are_not_all_there_are_counted_one_by_one(copy_of):
    root = copy_of("mvtec")
    merge_kinds(root)
    (root / "metal_nut/test/defective/bent000.png").unlink()
    assert verify.verify("mvtec", root).differences[:3] == [
        "metal_nut test bent: 0 images, 2 published",
        "metal_nut test flip: 0 images, 2 published",
        "metal_nut test defective: 3 images, none published",
    ]


def test_one_category_of_other_layouts(roots, toy_root):
    assert verify.verify("ksdd2", roots["ksdd2"], "ksdd2") == verify.verify("ksdd2", roots["ksdd2"])
    assert verify.verify("visa", roots["visa"], "Candles").title.startswith("visa candle in")
    assert verify.verify("folder", toy_root, "gear").title == f"folder gear in {toy_root}"
    with pytest.raises(UserError, match="unknown category in .* 'gears'. Did you mean 'gear'"):
        verify.verify("folder", toy_root, "gears")
    with pytest.raises(UserError, match="gear holds no categories, but category 'weave' was given"):
        verify.verify("folder", toy_root / "gear", "weave")
    with pytest.raises(UserError, match="'dtd' has no categories"):
        verify.verify("dtd", roots["dtd"], "banded")


def test_other_layouts_are_verified_too(copy_of):
    """Files that VisA's list names and that are gone; a mask of KolektorSDD2 that is gone, and its label with it."""
    root = copy_of("visa")
    (root / "candle/Data/Images/Normal/0001.JPG").unlink()
    report = verify.verify("visa", root)
    assert "candle train good: 2 images, 3 published" in report.differences
    assert report.checks["unreadable files"][1] == ["candle/Data/Images/Normal/0001.JPG"]
    root = copy_of("ksdd2")
    (root / "test" / "20001_GT.png").unlink()
    report = verify.verify("ksdd2", root)
    assert report.checks["images without a mask"] == (0, ["test/20001.png"])
    assert "ksdd2 test defect: 1 images, 2 published" in report.differences


def test_a_users_own_images_are_verified_without_published_counts(toy_root, tmp_path, capsys):
    command = ["data", "verify", "folder", "--root"]
    assert main([*command, str(toy_root)]) == 0
    output = capsys.readouterr().out
    assert row(output, "gear", "train", "good") == ["-", "12"] and row(output, "weave", "test", "hole") == ["-", "2"]
    assert row(output, "empty", "masks")[:2] == ["-", "1"]
    root = shutil.copytree(toy_root / "gear", tmp_path / "mine")
    shutil.copy(root / "train/good/000.png", root / "test/good/000.png")
    assert main([*command, str(root)]) == 1
    assert "duplicate images: 1, expected 0" in capsys.readouterr().out
    shutil.rmtree(root / "ground_truth")
    (root / "test/good/000.png").unlink()
    capsys.readouterr()
    assert main([*command, str(root)]) == 0  # masks are optional here
    assert row(capsys.readouterr().out, "categories", "without", "masks") == ["-", "1", "folder"]
    (tmp_path / "empty").mkdir()
    assert main([*command, str(tmp_path / "empty")]) == 2
    assert "empty holds no images in train/good or test/<kind>" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist. Check --root" in capsys.readouterr().err


@trees.needs_real("mt")
def test_the_real_magnetic_tiles_verify(capsys):
    assert main(["data", "verify", "mt"]) == 0
    output = capsys.readouterr().out
    assert row(output, "total") == ["1344", "1344"]
    assert row(output, "empty", "masks")[:2] == ["4", "4"] and row(output, "duplicate", "images") == ["0", "0"]
