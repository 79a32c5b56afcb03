"""Bad input: one clear line, exit status 2, and nothing half-written."""

import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vitad import runs, training
from vitad.backbones import import_timm
from vitad.cli import main
from vitad.data import samples
from vitad.runs import pipeline


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing that these tests do may land in the user's folders."""
    (tmp_path / "cache" / "images").mkdir(parents=True)
    monkeypatch.setenv("VITAD_CACHE", str(tmp_path / "cache"))
    for variable in ("VITAD_DATA", "VITAD_MT_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def contents(root):
    """{name: bytes} of all files below a folder, but for the cache of file hashes, which may grow at any time."""
    files = {p.relative_to(root).as_posix(): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}
    return {name: content for name, content in files.items() if not name.startswith("cache/hashes")}


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command that has to be refused; gives the line that says why."""

    def run(*command):
        before = contents(tmp_path)
        capsys.readouterr()
        assert main([str(word) for word in command]) == 2
        errors = capsys.readouterr().err
        assert errors.endswith("\n") and errors.count("vitad: error:") == 1 and "Traceback" not in errors
        line = re.split(r"[\r\n]+", errors.strip())[-1]
        assert line.startswith("vitad: error: ")
        assert contents(tmp_path) == before
        return line

    return run


@pytest.fixture
def own(toy_root, tmp_path):
    """A user's own images: 4 for training, 2 good and 2 with a hole for testing, masks."""
    root = tmp_path / "own"
    for part, count in {"train/good": 4, "test/good": 2, "test/hole": 2, "ground_truth/hole": 2}.items():
        (root / part).mkdir(parents=True)
        for path in sorted((toy_root / "weave" / part).iterdir())[:count]:
            shutil.copy(path, root / part)
    return root


def smoke(*words, dataset="toy", root=None):
    where = () if root is None else ("--data-root", root)
    return ["run", "patchknn", "--dataset", dataset, *where, "--preset", "smoke", "--out", "out", *words]


def folder(root, *words):
    return smoke(*words, dataset="folder", root=root)


# --- names and values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        ("--dataset toyy", "unknown dataset 'toyy'. Did you mean 'toy'"),
        ("--category gaer", "unknown category .*'gaer'. Did you mean 'gear'"),
        ("--split grouped", "'toy' is split by its folders, but split 'grouped' was given"),
        ("--preset smokee", "unknown preset 'smokee'. Did you mean 'smoke'"),
        ("--set bank_sizes=3", "unknown setting 'bank_sizes'. Did you mean 'bank_size'"),
        ("--set bank_size=many", "bank_size='many' has the wrong type: expected a whole number"),
        ("--set bank_size", "setting 'bank_size' has no value. Write it as key=value"),
        ("--set score=mean", "setting score: 'mean'. .*top1, max"),
        ("--set sigma=-1", "sigma=-1.0 is out of range"),
        ("--set blocks=9", r"blocks=\(9,\): test_vit has blocks 1 to 6"),
        ("--set image_size=70", "70x70 is not a multiple of the 16-px patch .*64 or 80"),
        ("--set image_size=9999", "image size 9999 is not usable"),
        ("--set backbone=vit_tinny_patch16_224", "Did you mean 'vit_tiny_patch16_224'"),
        ("--set backbone=resnet18", "'resnet18' is not a plain ViT"),
        ("--seed -1", "seed '-1' is not usable. Give a whole number from 0"),
        ("--seed 1.5", "seed '1.5' is not usable"),
        ("--seed x", "seed 'x' is not usable"),
        ("--seed 99999999999", "seed '99999999999' is not usable"),
        ("--device tpu", "unknown device 'tpu'. Choose auto, cpu or cuda"),
    ],
)
def test_unknown_names_and_wrong_values(words, message, refused, toy_root):
    assert re.search(message, refused(*smoke(*words.split(), root=toy_root)))


def test_unknown_method(refused, toy_root):
    line = refused("run", "anovitt", "--data-root", toy_root, "--out", "out")
    assert "unknown method 'anovitt'. Did you mean 'anovit'?" in line


def test_mt_has_no_categories_and_three_splits(refused, tmp_path):
    assert "needs its folder: give --data-root or set VITAD_MT_ROOT" in refused(*smoke(dataset="mt"))
    mt = dict(dataset="mt", root=tmp_path)
    assert "'mt' has no categories" in refused(*smoke("--category", "x", **mt))
    assert "unknown split 'differ'. Did you mean 'differnet'?" in refused(*smoke("--split", "differ", **mt))
    assert "MT_Free/Imgs holds no .jpg images" in refused(*smoke(**mt))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_no_gpu(refused, toy_root):
    assert "torch sees no CUDA GPU" in refused(*smoke("--device", "cuda", root=toy_root))


def test_the_command_line_itself_is_checked(capsys):
    for command in ([], ["run", "patchknn"], ["walk"], ["data", "show", "toy", "--image-size", "big"]):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2 and "usage: vitad" in capsys.readouterr().err


def test_it_is_the_exit_status_of_the_process(toy_root, tmp_path):
    command = [sys.executable, "-m", "vitad.cli", *map(str, smoke("--seed", "-1", root=toy_root))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "vitad: error: seed '-1' is not usable. Give a whole number from 0.\n"
    assert not (tmp_path / "out").exists()


# --- folders ----------------------------------------------------------------------------------------------


def test_missing_and_empty_folders(refused, tmp_path):
    assert "folder 'folder' needs" not in refused(*smoke(dataset="folder"))
    assert "nowhere does not exist. Check --data-root" in refused(*folder(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "empty has no folder 'train/good'" in refused(*folder(tmp_path / "empty"))
    (tmp_path / "file").write_text("x")
    assert "file does not exist" in refused(*folder(tmp_path / "file"))


def test_several_categories(refused, toy_root):
    assert "holds several categories: gear, grain, quirks, weave. Choose one" in refused(*folder(toy_root))
    assert "unknown category" in refused(*folder(toy_root, "--category", "weeve"))


@pytest.mark.parametrize("gone", ["train/good", "test"])
def test_no_images_for_training_or_testing(gone, refused, own):
    shutil.rmtree(own / gone)
    if gone == "train/good":
        (own / "train" / "bad").mkdir()
        (own / "train" / "good").mkdir()
        (own / "train" / "good" / "readme.txt").write_text("no image")
    assert f"{own / gone} holds no images" in refused(*folder(own))


def test_a_folder_of_other_files_does_not_become_toy(refused, own):
    assert "own holds other files than the data set 'toy'" in refused(*smoke(root=own))


# --- images and masks -------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:1500])


def text(path):
    path.write_text("not an image")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncate, text, empty])
@pytest.mark.parametrize("name", ["train/good/001.png", "test/good/001.png", "test/hole/000.png"])
def test_an_unreadable_image_is_named_and_left_out_only_on_demand(harm, name, refused, own, tmp_path, capsys):
    harm(own / name)
    line = refused(*folder(own))
    assert f"cannot read image {own / name}" in line and "--skip-bad" in line
    assert main([str(word) for word in folder(own, "--skip-bad")]) == 0
    assert f"skipped 1 unreadable: {name}" in capsys.readouterr().out
    record = runs.read_record("out")
    assert record["counts"]["skipped"] == [name]
    counts = {"train": 4, "test_good": 2, "test_defective": 2}
    part = {"train/good": "train", "test/good": "test_good", "test/hole": "test_defective"}[name.rpartition("/")[0]]
    counts[part] -= 1
    assert {name: record["counts"][name] for name in counts} == counts
    assert name not in runs.read_maps("out")["paths"]


def test_nothing_readable_is_refused_with_skip_bad_too(refused, own):
    for path in (own / "test").rglob("*.png"):
        truncate(path)
    assert "none of the 4 test images in" in refused(*folder(own, "--skip-bad"))
    for path in (own / "train").rglob("*.png"):
        truncate(path)
    assert "none of the 4 training images in" in refused(*folder(own, "--skip-bad"))


def test_masks_and_images_have_to_match(refused, own):
    mask = own / "ground_truth" / "hole" / "001_mask.png"
    with Image.open(mask) as image:
        whole = image.copy()
    whole.resize((100, 90)).save(mask)
    assert f"mask {mask} is 100x90 but its image 001.png is 192x192" in refused(*folder(own))
    mask.write_bytes(mask.read_bytes()[:60])
    assert f"cannot read mask {mask}" in refused(*folder(own))
    mask.unlink()
    line = refused(*folder(own))
    assert f"image {own / 'test/hole/001.png'} has no mask" in line and "(1 of 2 lack one)" in line
    whole.save(mask)
    whole.save(mask.with_name("007_mask.png"))
    assert "007_mask.png has no image test/hole/007.*" in refused(*folder(own))
    mask.with_name("007_mask.png").unlink()
    shutil.copytree(mask.parent, own / "ground_truth" / "scratch")
    assert "ground_truth/scratch holds masks, but there are no images test/scratch" in refused(*folder(own))


def test_the_line_stands_alone_beside_a_progress_bar(refused, own):
    for number in range(100, 300):  # enough images for a bar
        shutil.copy(own / "train/good/000.png", own / f"train/good/{number}.png")
    truncate(own / "train/good/250.png")
    assert "250.png" in refused(*folder(own))


def test_data_show_refuses_the_same(refused, own):
    truncate(own / "test/good/000.png")
    show = ["data", "show", "folder", "--data-root", own, "--out", "sheet.png"]
    assert "cannot read image" in refused(*show)
    assert "image size 3 is not usable" in refused(*show, "--skip-bad", "--image-size", "3")
    (own / "file").write_text("x")
    assert "cannot write" in refused(*show[:-1], own / "file" / "sheet.png", "--skip-bad")


# --- the folder of the run --------------------------------------------------------------------------------


def test_a_folder_with_another_run_or_other_files(refused, toy_root, tmp_path):
    assert main([str(word) for word in smoke(root=toy_root)]) == 0
    assert "out holds another run: seed is 0 there and 1 here" in refused(*smoke("--seed", "1", root=toy_root))
    (tmp_path / "out" / "record.json").write_text("{")
    assert "record.json is not readable" in refused(*smoke(root=toy_root))
    (tmp_path / "out" / "record.json").unlink()
    assert "out holds files that are not a run. Give another folder with --out" in refused(*smoke(root=toy_root))
    assert "out holds no record.json: not a finished run" in refused("show", "out")


def test_a_file_in_place_of_a_folder(refused, toy_root, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "out is a file. Give a folder with --out" in refused(*smoke(root=toy_root))
    assert "cannot write out/below" in refused(*smoke("--out", "out/below", root=toy_root))


# --- weights ----------------------------------------------------------------------------------------------


def with_weights(path, root):
    return smoke("--set", "pretrained=true", "--weights", path, root=root)


def test_weights_that_do_not_fit(refused, toy_root, tmp_path):
    torch.manual_seed(0)
    state = import_timm().create_model("test_vit", num_classes=0).state_dict()
    path = tmp_path / "weights.safetensors"
    command = with_weights(path, toy_root)
    assert "weights.safetensors does not exist" in refused(*command)
    path.write_text("not weights")
    assert "weights.safetensors is not a readable safetensors file" in refused(*command)
    save_file({k: v for k, v in state.items() if k != "cls_token"}, path)
    assert "does not fit: 1 tensors missing (cls_token), 0 too many (none)" in refused(*command)
    save_file(state | {"more": torch.zeros(1)}, path)
    assert "does not fit: 0 tensors missing (none), 1 too many (more)" in refused(*command)
    save_file(state | {"norm.bias": torch.zeros(7)}, path)
    assert "does not fit: norm.bias is (7,) there and (64,) in the model" in refused(*command)
    assert "would not be used" in refused(*smoke("--weights", path, root=toy_root))
    save_file(state, path)
    assert main([str(word) for word in command]) == 0


def test_a_checkpoint_of_a_method_is_no_backbone(refused, toy_root, tmp_path):
    assert main([str(word) for word in smoke("--out", "other", root=toy_root)]) == 0
    path = tmp_path / "other" / "checkpoint.safetensors"
    assert load_file(path)
    line = refused(*with_weights(path, toy_root))
    assert "is a checkpoint of the method 'patchknn', not the weights of a backbone" in line


# --- training ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(refused, toy_root):
    line = refused("run", "anovit", "--data-root", toy_root, "--preset", "smoke", "--set", "lr=1e30", "--out", "out")
    assert re.search(r"not finite at phase train, epoch \d.*lr=1e\+30.*A smaller lr usually fixes this", line)


# --- the disk is full -------------------------------------------------------------------------------------


@contextmanager
def full_beyond(limit):
    """No file may grow beyond `limit` bytes: writing is then an error, as on a full disk (Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "limit, name",
    [(100, "out/.run/request.json"), (50_000, "out/.run/state.pt"), (50_000, "out/checkpoint.safetensors")],
)
def test_a_full_disk(limit, name, refused, toy_root, monkeypatch):
    """Nothing is left; and when there is room again, the same command finishes."""
    if "state" in name:
        monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    command = ["run", "anovit", "--preset", "smoke", "--out", "out", "--data-root", str(toy_root)]
    with full_beyond(limit):
        assert f"cannot write {name}: " in refused(*command)
    assert main(command) == 0
    assert runs.read_record("out")["counts"]["epochs"] == 1


def test_a_full_disk_late_in_a_run_keeps_its_state(toy_root, tmp_path, monkeypatch, capsys):
    """The training, which took long, is not lost: only what comes after it is done again."""
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    command = ["run", "anovit", "--preset", "smoke", "--out", "out", "--data-root", str(toy_root)]
    score = pipeline.score

    def after_training(*words, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return score(*words, **options)

    with monkeypatch.context() as patch, full_beyond(resource.getrlimit(resource.RLIMIT_FSIZE)[0]):
        patch.setattr(pipeline, "score", after_training)
        assert main(command) == 2
    assert "cannot write out/checkpoint.safetensors: " in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".run"}
    assert main(command) == 0
    assert not (tmp_path / "out" / ".run").exists()


def test_a_full_disk_while_decoding_and_generating(refused, toy_root, monkeypatch):
    decode = samples.ImageSet.__init__
    monkeypatch.setattr(samples.ImageSet, "__init__", lambda *args, **options: decode(*args, **options, limit=0))
    with full_beyond(5_000):
        line = refused(*smoke(root=toy_root))
        assert "cannot keep decoded images in " in line and "VITAD_CACHE" in line
        assert "cannot write the data set 'toy' to " in refused(*smoke())
