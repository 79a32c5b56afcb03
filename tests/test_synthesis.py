"""Synthetic damage: what holds for every kind, DRAEM's recipe beside a plain version, textures, foreground."""

import doctest
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.ndimage import label, uniform_filter
from scipy.stats import ks_2samp

from benchmarks.synthesis import plain_damage, plain_perlin
from vitad import data
from vitad.data import synthesis
from vitad.data.sets.dtd import CLASSES
from vitad.data.synthesis import (
    KINDS,
    Recolouring,
    Synthesis,
    foreground_mask,
    foregrounds,
    perlin_noise,
    pixels_above,
    procedural_textures,
    recolouring,
    shift_hue,
    texture_bank,
    textures,
    textures_used,
    turned,
)
from vitad.errors import UserError

CPU = torch.device("cpu")
EIGHT = np.ones((3, 3))  # neighbours of a pixel that belong to its part


def random_images(B=6, size=(64, 64), seed=0):
    """Noise, other noise in each channel, so that any change shows."""
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + 0.6 * torch.rand(B, 3, *size, generator=generator)


def random_grey_images(B=6, size=(64, 64)):
    """Noise whose channels are one and the same memory."""
    return random_images(B, size)[:, :1].expand(-1, 3, -1, -1)


def always(*kinds, **settings):
    """Damage of these kinds in every image."""
    return Synthesis(kinds=kinds or ("perlin",), probability=1, **settings)


def number_of_parts(mask):
    return label(mask, EIGHT)[1]


def main_colours(images):
    """Index of the strongest channel of each of (N,3,H,W)."""
    return [int(image.float().mean((1, 2)).argmax()) for image in images]


@pytest.fixture(scope="module")
def gears(toy_root):
    """Twelve good images (12,3,128,128) of an object on a table."""
    return data.load("toy", toy_root, "gear", image_size=128).train.batch(range(12))["image"]


@pytest.fixture
def texture_folder(tmp_path):
    """Laid out like DTD: three textures, of different sizes and each of one colour: red, green, blue."""
    for k, colour in enumerate([(250, 10, 10), (10, 250, 10), (10, 10, 250)]):
        path = tmp_path / "dtd" / "images" / f"kind-{k}" / f"kind-{k}_0001.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (300 + 40 * k, 310), colour).save(path)
    labels = tmp_path / "dtd" / "labels"
    labels.mkdir()
    (labels / "train1.txt").write_text("kind-0/kind-0_0001.jpg\n")
    return tmp_path / "dtd"


def test_examples_in_docstrings():
    results = doctest.testmod(synthesis)
    assert results.attempted and not results.failed


class TestEveryKind:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", [(64, 64), (97, 53), (40, 200)])
    def test_the_mask_marks_exactly_what_changed(self, kind, size):
        images = random_images(16, size)
        given = images.clone()
        out = always(kind)(images, seed=0, step=0)
        assert torch.equal(images, given)
        assert out["image"].shape == images.shape and out["image"].dtype == torch.float32
        assert out["mask"].shape == (16, 1, *size) and out["mask"].dtype == torch.bool
        assert out["label"].shape == (16,) and out["label"].dtype == torch.int64
        assert torch.equal(out["mask"], (out["image"] != images).any(1, keepdim=True))
        assert torch.equal(out["label"].bool(), out["mask"].flatten(1).any(1))
        assert out["image"].min() >= 0 and out["image"].max() <= 1
        assert out["label"].float().mean() > 0.6

    @pytest.mark.parametrize("kind", KINDS)
    def test_seed_and_step_alone_decide(self, kind):
        damage = always(kind)
        images = random_images()
        first = damage(images, 3, 7)
        others = [damage(images, 3, 8), damage(images, 4, 7)]
        torch.manual_seed(99)
        np.random.seed(99)
        again = always(kind)(images, 3, 7)
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert not any(torch.equal(first["mask"], other["mask"]) for other in others)

    def test_global_random_state_is_left_alone(self):
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        Synthesis(kinds=tuple(KINDS))(random_images(), 0, 0)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])

    @pytest.mark.parametrize("kind", KINDS)
    def test_mixed_precision_changes_nothing(self, kind):
        damage, images = always(kind), random_images()
        expected = damage(images, 0, 0)
        with torch.autocast("cpu", torch.bfloat16):
            got = damage(images, 0, 0)
        assert all(torch.equal(expected[k], got[k]) for k in expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_grey_images_whose_channels_share_memory_can_stay_grey(self, kind):
        images = random_grey_images()
        out = always(kind, keep_grey=True)(images, 0, 0)
        assert out["mask"].any()
        assert (out["image"] == out["image"][:, :1]).all()

    def test_the_recipe_paints_colour_on_grey_images_and_keep_grey_leaves_coloured_ones_alone(self):
        grey = random_grey_images()
        out = always()(grey, 0, 0)["image"]
        assert (out != out[:, :1]).any()
        colour = random_images()
        expected, got = (always(keep_grey=k)(colour, 0, 0)["image"] for k in (False, True))
        assert torch.equal(expected, got)

    @pytest.mark.parametrize("kind", KINDS)
    def test_local_damage_stays_inside_the_foreground(self, kind, gears):
        foreground = foreground_mask(gears)
        local, everywhere = (always(kind, mode=mode)(gears, 0, 0) for mode in ("local", "global"))
        assert local["mask"].any()
        assert not (local["mask"] & ~foreground).any()
        assert (everywhere["mask"] & ~foreground).any()
        assert torch.equal(local["mask"], (local["image"] != gears).any(1, keepdim=True))
        given = always(kind, mode="local")(gears, 0, 0, foreground)
        assert torch.equal(given["image"], local["image"])

    def test_a_given_foreground_is_used(self, gears):
        left = torch.zeros(len(gears), 1, 128, 128, dtype=torch.bool)
        left[..., :40] = True
        out = always(*KINDS, mode="local")(gears, 0, 0, left)
        assert out["mask"].any() and not out["mask"][..., 40:].any()

    def test_both_is_an_even_chance_of_local_and_global(self):
        nowhere = torch.zeros(400, 1, 32, 32, dtype=torch.bool)
        out = always("pit", mode="both")(random_images(400, (32, 32)), 0, 0, nowhere)
        assert 160 < out["label"].sum() < 240  # local damage has no place here

    def test_probability_is_the_share_of_damaged_images(self):
        images = random_images(400, (32, 32))

        def damaged(probability):
            return int(Synthesis(kinds=("patch",), probability=probability)(images, 0, 0)["label"].sum())

        assert damaged(0) == 0
        assert 160 < damaged(0.5) < 240
        assert 290 < damaged(0.8) < 350
        assert damaged(1) > 390

    def test_chosen_images_are_damaged_for_certain_and_no_others(self, gears):
        damage = Synthesis(probability=0.1, mode="both", scales=(1,))
        images = gears[:8]
        which = np.array([True, False] * 4)
        empty = 0
        for step in range(40):
            batch = damage(images, 0, step, which=which)
            assert batch["label"].bool().tolist() == which.tolist()
            differs = (batch["image"] != images).any(1, keepdim=True)
            assert torch.equal(differs, batch["mask"])
            drawn = Synthesis(probability=1.0, mode="both", scales=(1,))(images, 0, step)
            empty += int((drawn["label"] == 0).sum())
        assert empty > 5  # the first draw often leaves nothing: it is repeated

    def test_a_kind_named_twice_is_drawn_twice_as_often(self):
        images = torch.full((300, 3, 32, 32), 0.5)
        images[:, 0] += 0.001 * random_images(300, (32, 32))[:, 0]
        out = always("pit", "patch", "pit")(images, 0, 0)
        change = (out["image"] - images).abs().flatten(1).amax(1)  # pits are strong, patches weak
        assert 0.6 < (change > 0.18).float().mean() < 0.73

    def test_shapes_grow_with_the_image(self):
        """Lengths are shares of the shorter side: the share of damaged pixels hardly depends on the image's size."""

        def share(kind, side):
            return always(kind)(random_images(64, (side, side)), 0, 0)["mask"].float().mean()

        for kind in ("crack", "pit", "patch", "fray", "paste"):
            assert 0.6 < share(kind, 112) / share(kind, 224) < 1.9, kind

    def test_each_kind_looks_as_described(self):
        images = random_images(64, (224, 224))
        masks = {kind: always(kind)(images, 0, 0)["mask"][:, 0].numpy() for kind in KINDS}
        parts = {kind: {number_of_parts(mask) for mask in some} for kind, some in masks.items()}
        assert parts["crack"] == {1} and parts["paste"] == {1}
        assert parts["pit"] == {1, 2, 3, 4}
        share = {kind: some.mean() for kind, some in masks.items()}
        assert share["pit"] < 0.01 and share["crack"] < 0.01
        assert 0.01 < share["paste"] < 0.06 and share["patch"] > 0.03
        frame = np.ones((224, 224), bool)
        frame[1:-1, 1:-1] = False
        assert all((m & frame).any() for m in masks["fray"])
        for mask in masks["crack"]:  # 1 to 3 px wide, soft rims included
            high = mask[:-4] & mask[4:] & mask[2:-2]  # damage 2 px above and below as well
            wide = mask[:, :-4] & mask[:, 4:] & mask[:, 2:-2]
            assert (high[:, 2:-2] & wide[2:-2]).mean() < 0.002

    def test_dark_and_bright_surfaces_show_their_damage(self):
        for level in (0.0, 0.02, 0.98, 1.0):
            for kind in ("crack", "pit", "fray"):
                images = torch.full((12, 3, 64, 64), level)
                out = always(kind)(images, 0, 0)
                change = (out["image"] - images).abs().flatten(1).amax(1)
                assert (change > 0.1).all(), (level, kind)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_gpu_gives_the_damage_of_the_cpu(self, kind):
        images, damage = random_images(16), always(kind)
        expected, got = damage(images, 0, 0), damage(images.cuda(), 0, 0)
        assert got["image"].is_cuda
        assert (expected["mask"] != got["mask"].cpu()).float().mean() < 1e-3  # rounding may decide at the rim
        assert ((expected["image"] - got["image"].cpu()).abs() > 0.02).float().mean() < 1e-3


ANYTHING = sys.modules["vitad.data.synthesis.anything"]  # the package's `anything` is the function


class TestAnything:
    def test_sizes_range_from_specks_to_large_parts(self):
        share = always("anything")(random_images(300, (112, 112)), 0, 0)["mask"].float().mean((1, 2, 3))
        assert (share < 0.001).float().mean() > 0.05 and (share > 0.05).float().mean() > 0.1
        assert 0.003 < share.median() < 0.03 and share.max() > 0.1

    @pytest.mark.parametrize("size", [(112, 112), (100, 160)])
    def test_shapes_grow_with_the_image(self, size):
        """The same draws in an image of twice the size, its pixels averaged in fours, give the same shape."""

        def shapes(factor):
            centre = [torch.full((40,), factor * n / 2 + (factor - 1) / 2) for n in size]
            images = torch.zeros(1, 3, *(factor * n for n in size))
            return ANYTHING._shape(np.random.default_rng(0), images, centre)

        small, large = shapes(1), torch.nn.functional.avg_pool2d(shapes(2), 2)
        difference = (small - large).abs().sum((1, 2)) / large.sum((1, 2))
        assert difference.median() < 0.1 and difference.max() < 0.5

    def test_no_change_below_five_grey_levels_is_painted_or_marked(self):
        images = random_images(100)
        out = always("anything")(images, 0, 0)
        change = (out["image"] - images).abs().amax(1, keepdim=True)
        assert change[out["mask"]].min() * 255 > 5 and change[~out["mask"]].max() == 0
        assert (change[out["mask"]] * 255 < 8).any()  # the rims reach down to there

    def test_each_filling_occurs_as_often_with_opacities_from_a_quarter_to_one(self, monkeypatch):
        """Each paints a colour of its own on black."""
        colours = {"_texture": (1, 0, 0), "_elsewhere": (0, 1, 0), "_tone": (0, 0, 1), "_gain": (1, 1, 0)}
        for name, colour in (colours | {"_blur": (0, 1, 1)}).items():
            column = torch.tensor(colour).float()[:, None]
            monkeypatch.setattr(ANYTHING, name, lambda *_, c=column: lambda s, y, x, before: c.expand(-1, len(s)))
        out = always("anything")(torch.zeros(500, 3, 112, 112), 0, 0)
        strongest = out["image"].flatten(2).amax(2)  # (500,3)
        assert torch.equal((strongest > 0).any(1), out["label"].bool()) and out["label"].sum() > 470
        seen = (strongest > 0).int().tolist()
        assert all(70 < seen.count(list(c)) < 130 for c in (*colours.values(), (0, 1, 1)))
        opacity = strongest.amax(1)[out["mask"].flatten(1).sum(1) > 300]  # large ones are whole inside
        assert 0.25 < opacity.min() < 0.3 and 0.95 < opacity.max() < 1 and (opacity.mean() - 0.625).abs() < 0.05

    def filled(self, name, images, n=40, **settings):
        """(n,3,H,W): copies of the images, in another order, filled completely. And those copies."""
        rows = torch.arange(n).flip(0) % len(images)
        H, W = images.shape[-2:]
        s, y, x = pixels_above(torch.ones(n, H, W), 0)
        fill = getattr(ANYTHING, name)(always("anything", **settings), np.random.default_rng(0), images, rows)
        copies = images[rows]
        after = fill(s, y, x, copies.transpose(0, 1).flatten(1))
        return after.view(3, n, H, W).transpose(0, 1), copies

    def test_elsewhere_is_the_image_itself_moved_and_mirrored_or_not(self):
        H, W, seen = 20, 30, []
        for after, image in zip(*self.filled("_elsewhere", random_images(4, (H, W))), strict=True):
            row, column = (image == after[:, :1, :1]).all(0).nonzero()[0].tolist()  # what the first pixel shows
            for axes in ((), (1,), (2,), (1, 2)):
                up, left = (row - (H - 1) * (1 in axes)) % H, (column - (W - 1) * (2 in axes)) % W
                if torch.equal(after, image.roll((-up, -left), (1, 2)).flip(axes)):
                    seen.append((axes, up, left))
                    assert 2 <= up < 18 and 3 <= left < 27
        assert len(seen) == 40 and len(set(seen)) > 35
        assert {axes for axes, *_ in seen} == {(), (1,), (2,), (1, 2)}
        after, flat = self.filled("_elsewhere", torch.full((4, 3, H, W), 0.5))
        assert torch.equal(after, flat)

    def test_a_blur_is_the_mean_around_each_pixel(self):
        def mean(image, reach):
            """Over what lies inside the image."""
            size = (1, 2 * reach + 1, 2 * reach + 1)
            inside = uniform_filter(np.ones(image.shape), size, mode="constant")
            return uniform_filter(image.double().numpy(), size, mode="constant") / inside

        images, seen = random_images(1, (20, 30)), []
        means = {reach: mean(images[0], reach) for reach in range(1, 8)}
        for after in self.filled("_blur", images)[0]:
            seen += [reach for reach, blurred in means.items() if np.abs(after.numpy() - blurred).max() < 1e-5]
        assert len(seen) == 40 and set(seen) == {2, 3, 4, 5}
        after, flat = self.filled("_blur", torch.full((4, 3, 20, 30), 0.5))
        torch.testing.assert_close(after, flat)

    def test_a_gain_darkens_or_brightens_clearly(self):
        after, images = self.filled("_gain", random_images(4, (20, 30)))
        factor = after.flatten(1).amin(1) / images.flatten(1).amin(1)
        assert torch.allclose(after, (images * factor[:, None, None, None]).clamp(max=1))
        assert factor.min() > 0.299 and factor.max() < 2.001 and not ((factor > 0.851) & (factor < 1.149)).any()
        assert 10 < (factor < 1).sum() < 30

    def test_a_tone_is_one_colour_or_one_grey(self):
        after, _ = self.filled("_tone", random_images(4, (20, 30)))
        assert torch.equal(after, after[:, :, :1, :1].expand_as(after))
        assert 10 < after[:, :, 0, 0].eq(after[:, :1, 0, 0]).all(1).sum() < 30
        assert len(after[:, 0, 0, 0].unique()) == 40 and after.min() < 0.1 and after.max() > 0.9
        grey, _ = self.filled("_tone", random_grey_images(4), keep_grey=True)
        assert torch.equal(grey, grey[:, :1].expand_as(grey))

    def test_a_texture_shows_nothing_of_the_image(self, texture_folder):
        textures = {"textures": str(texture_folder)}
        after, _ = self.filled("_texture", random_images(4), **textures)
        other, _ = self.filled("_texture", random_images(4, seed=1), **textures)
        assert torch.equal(after, other)
        for image in after:
            colours = torch.unique((image.flatten(1).T * 50).round(), dim=0)
            assert len(colours) <= 12  # one colour, black where it was turned, JPEG
        grey, _ = self.filled("_texture", random_grey_images(4), keep_grey=True, **textures)
        assert torch.equal(grey, after.mean(1, keepdim=True).expand_as(grey))


class TestPerlin:
    def test_noise_equals_that_of_the_plain_version(self):
        exponents = np.array([(0, 5), (3, 1), (4, 4), (5, 0)])
        noise = perlin_noise(np.random.default_rng(4), exponents, (96, 96), CPU).numpy()
        directions = np.random.default_rng(4).random((4, 33, 33), np.float32) * np.float32(2 * np.pi)
        for n, (a, b) in enumerate(exponents):
            expected = plain_perlin(directions[n, : 2**a + 1, : 2**b + 1], 96)
            np.testing.assert_allclose(noise[n], expected, atol=2e-6)

    def test_noise_of_any_size_is_zero_at_lattice_points_and_smooth(self):
        noise = perlin_noise(np.random.default_rng(0), np.full((8, 2), 2), (60, 100), CPU)
        assert noise.shape == (8, 60, 100)
        assert noise[:, ::15, ::25].abs().max() < 1e-6
        assert 0.4 < noise.abs().amax() <= 1
        assert noise.diff(dim=1).abs().max() < 0.25 and noise.diff(dim=2).abs().max() < 0.15
        tiny = perlin_noise(np.random.default_rng(0), np.array([(5, 5)]), (8, 8), CPU)
        assert tiny.shape == (1, 8, 8) and tiny.isfinite().all()

    def test_turning_moves_each_pixel_to_a_place_of_its_own_where_a_rotation_takes_it(self):
        angles = np.array([-1.5, -0.4, 0, 0.4, 1.5])
        pixels = pixels_above(torch.ones(5, 50, 80), 0)
        s, y, x = turned(pixels, angles, (50, 80))
        assert len(torch.unique((s * 50 + y) * 80 + x)) == len(s)
        assert (s == 2).sum() == 50 * 80
        for n, angle in enumerate(angles):  # a spot lands where a rotation takes it
            spot = (torch.tensor([n]), torch.tensor([30]), torch.tensor([45]))
            _, row, column = (float(v) for v in turned(spot, angles, (50, 80)))
            down, right = 30 - 24.5, 45 - 39.5
            expected = np.cos(angle) * down - np.sin(angle) * right, np.cos(angle) * right + np.sin(angle) * down
            assert np.hypot(row - 24.5 - expected[0], column - 39.5 - expected[1]) < 1.5

    def test_an_empty_mask_leaves_a_normal_image(self):
        images = random_images()
        out = always(threshold=1.5)(images, 0, 0)
        assert torch.equal(out["image"], images)
        assert not out["mask"].any() and not out["label"].any()

    def test_scales_threshold_and_opacity_change_what_they_name(self):
        images = random_images(64, (128, 128))

        def damage(**settings):
            return always(**settings)(images, 0, 0)

        def parts(exponent):
            masks = damage(scales=(exponent,))["mask"][:, 0].numpy()
            return np.mean([number_of_parts(mask) for mask in masks])

        def area(threshold):
            return damage(threshold=threshold)["mask"].float().mean()

        def change(beta_max):
            return (damage(beta_max=beta_max)["image"] - images).abs().sum()

        assert parts(4) > 10 * parts(1)
        assert area(0.2) > 4 * area(0.6)
        assert 1.6 < change(0.0) / change(1.0) < 2.4


SIDE, N = 256, 200


def measures(images, damaged, masks):
    """Properties of the damage of images (N,H,W,3) whose pixels are independent: for each a list of one value an image.

    Slope and rest of a linear fit of the painted pixels to the given ones tell opacity and texture apart.
    """
    area = masks.mean((1, 2))
    parts = np.array([number_of_parts(m) for m in masks])
    large = masks.sum((1, 2)) > 500
    opacity, level, spread = [], [], []
    for image, after, mask in zip(images[large], damaged[large], masks[large], strict=True):
        x, y = image[mask], after[mask]
        centred = x - x.mean(0)
        slope = (centred * y).sum() / (centred**2).sum()  # the share of the image that shines through
        opacity.append(1 - slope)
        level.append(y.mean())
        spread.append(y.std())
    return dict(area=area, parts=parts, opacity=opacity, level=level, spread=spread)


@pytest.fixture(scope="module")
def plain():
    """Measures of N images damaged by the plain version."""
    rng = np.random.default_rng(5)
    bank = texture_bank("procedural", (SIDE, SIDE), CPU).images
    pictures = [Image.fromarray(t) for t in bank.permute(0, 2, 3, 1).contiguous().numpy()]
    images = rng.random((N, SIDE, SIDE, 3), np.float32)
    damaged, masks, _ = zip(*(plain_damage(rng, image, pictures) for image in images), strict=True)
    return measures(images, np.stack(damaged), np.stack(masks))


class TestRecipe:
    """DRAEM's recipe in batches beside the plain version, an image at a time."""

    def batched(self, **settings):
        images = torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        out = always(**settings)(images, 0, 0)
        given, damaged = (v.permute(0, 2, 3, 1).numpy() for v in (images, out["image"]))
        return measures(given, damaged, out["mask"][:, 0].numpy())

    def test_batches_have_the_distribution_of_the_plain_version(self, plain):
        """Kolmogorov-Smirnov: five properties of 200 images each, at fixed seeds."""
        batched = self.batched()
        for name in plain:
            assert ks_2samp(plain[name], batched[name]).pvalue > 0.01, name
        assert abs(np.mean(batched["area"]) / np.mean(plain["area"]) - 1) < 0.15
        assert abs(np.mean(batched["opacity"]) - np.mean(plain["opacity"])) < 0.05

    @pytest.mark.parametrize(
        "wrong, name",
        [
            ({"threshold": 0.45}, "area"),
            ({"scales": (0, 1, 2, 3, 4)}, "parts"),
            ({"scales": (1, 2, 3, 4, 5)}, "parts"),
            ({"beta_max": 1.0}, "opacity"),
        ],
    )
    def test_the_comparison_would_notice_another_recipe(self, plain, wrong, name):
        assert ks_2samp(plain[name], self.batched(**wrong)[name]).pvalue < 0.005


class TestOperations:
    """The operations on textures beside PIL's."""

    @pytest.fixture
    def picture(self):
        """(24,24,3) uint8 with an uneven histogram; as small as the copy from which histograms are taken."""
        rng = np.random.default_rng(2)
        return (255 * rng.beta(2, 5, (24, 24, 3))).astype(np.uint8)

    def through(self, operation, picture, rng=None):
        coarse = picture.transpose(2, 0, 1).reshape(1, 3, -1).astype(int)
        table = operation(rng, np.tile(np.arange(256.0), (1, 3, 1)), coarse).round().clip(0, 255)
        return np.take_along_axis(table, coarse, 2).reshape(3, *picture.shape[:2]).transpose(1, 2, 0)

    class Fixed:
        """A generator whose every draw is the given value."""

        def __init__(self, value):
            self.value = value

        def uniform(self, low, high, shape):
            return np.full(shape, self.value)

        def random(self, shape):
            return np.zeros(shape)

        def integers(self, low, high, shape):
            return np.full(shape, self.value)

    @pytest.mark.parametrize(
        "operation, draw, plain",
        [
            (recolouring.invert, None, ImageOps.invert),
            (recolouring.autocontrast, 0.0, ImageOps.autocontrast),
            (recolouring.solarise, 77.5, lambda image: ImageOps.solarize(image, 77.5)),
            (recolouring.posterise, 5, lambda image: ImageOps.posterize(image, 3)),
            (
                recolouring.gamma,
                1.7,
                lambda image: image.point([round(255 * (v / 255) ** 1.7) for v in range(256)] * 3),
            ),
        ],
    )
    def test_a_table_is_what_pil_computes(self, picture, operation, draw, plain):
        expected = np.asarray(plain(Image.fromarray(picture))).astype(int)
        assert np.abs(self.through(operation, picture, self.Fixed(draw)) - expected).max() <= 1

    def test_equalise_is_what_pil_computes(self):
        """PIL counts in whole steps of a 255th of the pixels, so it takes many for the two to agree."""
        rng = np.random.default_rng(2)
        picture = (255 * rng.beta(2, 5, (400, 400, 3))).astype(np.uint8)
        expected = np.asarray(ImageOps.equalize(Image.fromarray(picture))).astype(int)
        assert np.abs(self.through(recolouring.equalise, picture) - expected).max() <= 1

    def test_autocontrast_with_cutoff_clips_that_share_at_either_end(self, picture):
        after = self.through(recolouring.autocontrast, picture, self.Fixed(0.1))
        for channel in after.transpose(2, 0, 1):
            assert 0.05 < (channel == 0).mean() < 0.15 and 0.05 < (channel == 255).mean() < 0.15

    def test_brightness_multiplies_and_adds(self, picture):
        after = self.through(recolouring.brightness, picture, self.Fixed(1.1))  # both draws: times 1.1 plus 1.1
        np.testing.assert_allclose(after, (1.1 * picture + 1.1).round().clip(0, 255))

    @pytest.mark.parametrize("hue, saturation", [(0, 0), (50, 0), (-50, 0), (0, 40), (30, -50)])
    def test_hue_and_saturation_move_as_in_pil(self, picture, hue, saturation):
        hsv = np.asarray(Image.fromarray(picture).convert("HSV")).astype(int)
        hsv[..., 0] = (hsv[..., 0] + hue) % 256
        hsv[..., 1] = (hsv[..., 1] + saturation).clip(0, 255)
        expected = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")).astype(int)
        levels = torch.from_numpy(picture.transpose(2, 0, 1).astype(np.float32))
        shifts = (torch.full((24, 24), float(v)) for v in (hue, saturation))
        got = shift_hue(levels, *shifts).numpy().transpose(1, 2, 0)
        assert np.abs(got - expected).mean() < 1 and np.abs(got - expected).max() < 8  # PIL rounds hues to 256 levels

    def test_sharpness_and_rotation_are_those_of_pil(self, picture, tmp_path):
        """Beside PIL's, each alone and one after the other."""
        big = Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC)
        big.save(tmp_path / "t.png")
        bank = texture_bank(str(tmp_path), (64, 64), CPU)
        inner = np.asarray(big.filter(ImageFilter.SMOOTH))[1:-1, 1:-1].astype(int)
        assert np.abs(bank.smooth[0].permute(1, 2, 0).numpy()[1:-1, 1:-1] - inner).max() <= 1
        s, y, x = pixels_above(torch.ones(1, 64, 64), 0)  # all of them
        identity, seen = torch.arange(256.0).expand(1, 3, 256).contiguous(), set()
        for seed in range(400):
            recolour = Recolouring(np.random.default_rng(seed), bank.coarse)
            recolour.applies[2][:] = False  # leaves out the operations on colours
            recolour.table = identity / 255
            rotated, sharpened = (bool(a) for a in recolour.applies[:2])
            kind = ("rotated" if rotated else "") + ("sharpened" if sharpened else "")
            if kind in seen:
                continue
            seen.add(kind)
            sin, cos = recolour.rotation[:, 0].tolist() if rotated else (0, 1)
            factor = float(recolour.sharpness) if sharpened else 1
            plain = ImageEnhance.Sharpness(big).enhance(factor)
            plain = np.asarray(plain.rotate(np.degrees(np.arctan2(sin, cos)))).astype(int)
            got = 255 * recolour(bank, s, s, y, x).reshape(3, 64, 64).permute(1, 2, 0).numpy()
            wrong = np.abs(got - plain)[2:-2, 2:-2].max(-1) > 2
            assert wrong.mean() < (0.04 if rotated else 1e-9), kind  # PIL leaves the outermost pixels as they are
        assert seen == {"", "rotated", "sharpened", "rotatedsharpened"}

    def test_three_different_operations_are_drawn(self):
        coarse = texture_bank("procedural", (32, 32), CPU).coarse
        many = Recolouring(np.random.default_rng(0), np.tile(coarse, (16, 1, 1)))
        applied = torch.stack(many.applies)
        assert (abs(applied.float().mean(1) - 0.3) < 0.04).all()
        all_three = applied.all(0)
        assert all_three.any()
        identity = torch.arange(256.0).expand(int(all_three.sum()), 3, 256)
        torch.testing.assert_close(many.table[all_three] * 255, identity)  # so no fourth was


class TestTextures:
    def test_procedural_textures_all_differ_and_are_the_same_each_time(self):
        first = procedural_textures(16, (48, 64), CPU)
        assert first.shape == (16, 3, 48, 64) and first.dtype == torch.uint8
        assert torch.equal(first, procedural_textures(16, (48, 64), CPU))
        assert len({t.numpy().tobytes() for t in first}) == 16
        assert (first.flatten(2).float().std(2).mean(1) > 3).all()

    def test_a_folder_laid_out_like_dtd_is_read(self, texture_folder):
        bank = texture_bank(str(texture_folder), (64, 80), CPU)
        assert bank.images.shape == (3, 3, 64, 80)
        assert main_colours(bank.images) == [0, 1, 2]

    def test_dtd_is_known_by_its_files_not_by_its_folder(self, tmp_path, texture_folder):
        assert textures_used("procedural", (64, 64)) == "procedural"
        assert textures_used(str(texture_folder), (64, 64)) == "other images, 3 of 3 files"
        tmp_path = tmp_path / "copied"
        for name in CLASSES.split():
            (tmp_path / "any" / name).mkdir(parents=True)
            for k in range(120):
                (tmp_path / "any" / name / f"{name}_{k:04}.jpg").touch()
        assert textures_used(str(tmp_path), (64, 64)) == "DTD, 5,640 of 5,640 files"
        assert textures_used(str(tmp_path), (224, 224)) == "DTD, 5,640 of 5,640 files"
        assert textures_used(str(tmp_path), (384, 384)) == "DTD, 2,427 of 5,640 files"
        (tmp_path / "any" / "woven" / "woven_0000.jpg").rename(tmp_path / "any" / "woven" / "mine_0000.jpg")
        assert textures_used(str(tmp_path), (64, 64)).startswith("other images")

    def test_files_are_read_only_once(self, texture_folder):
        damage, images = always(textures=str(texture_folder)), random_images()
        damage(images, 0, 0)
        shutil.rmtree(texture_folder)
        assert damage(images, 0, 1)["label"].any()

    def test_the_textures_fill_the_damage(self, texture_folder):
        images = 0.5 + 0.001 * random_images(24)
        out = always(textures=str(texture_folder), beta_max=0)(images, 0, 0)
        assert out["label"].sum() > 15
        for after, mask in zip(out["image"], out["mask"][:, 0], strict=True):
            colours = torch.unique((after[:, mask].T * 50).round(), dim=0)
            assert len(colours) <= 12  # one colour, black where it was turned, JPEG

    def test_an_evenly_spread_part_of_too_many_textures_is_kept(self, texture_folder, monkeypatch):
        monkeypatch.setattr(textures, "TEXTURE_BYTES", 2 * 6 * 32 * 32)
        bank = texture_bank(str(texture_folder), (32, 32), CPU)
        assert main_colours(bank.images) == [0, 1]


class TestBadInput:
    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"kinds": ("perlin", "crak")}, "unknown kind of damage 'crak'. Did you mean 'crack'?"),
            ({"kinds": ()}, "kinds of damage: none given. Choose from: perlin, crack"),
            ({"mode": "locl"}, "unknown mode of damage 'locl'. Did you mean 'local'?"),
            ({"probability": 1.5}, "probability=1.5 of the damage is out of range"),
            ({"beta_max": -0.1}, "beta_max=-0.1 of the damage is out of range"),
            ({"scales": (3, 9)}, r"scales=\(3, 9\) of the Perlin noise: give whole numbers from 0 to 8"),
            ({"scales": ()}, "scales="),
        ],
    )
    def test_a_wrong_setting_is_named(self, settings, message):
        with pytest.raises(UserError, match=message) as caught:
            Synthesis(**settings)
        assert "\n" not in str(caught.value)

    def test_a_missing_texture_folder_is_named(self, tmp_path):
        with pytest.raises(UserError, match="texture folder .*nowhere does not exist. Name a folder of images"):
            always(textures=str(tmp_path / "nowhere"))(random_images(), 0, 0)

    def test_a_texture_folder_without_images_is_named(self, tmp_path):
        (tmp_path / "readme.txt").write_text("none here")
        with pytest.raises(UserError, match="holds no images. Put some there, or use textures=procedural"):
            always(textures=str(tmp_path))(random_images(), 0, 0)

    def test_a_broken_texture_is_named(self, texture_folder):
        broken = texture_folder / "images" / "kind-1" / "kind-1_0001.jpg"
        broken.write_bytes(broken.read_bytes()[:200])
        with pytest.raises(UserError, match="cannot read texture .*kind-1_0001.jpg: .*Replace or remove it") as caught:
            always(textures=str(texture_folder))(random_images(), 0, 0)
        assert "\n" not in str(caught.value)


class TestForeground:
    def test_the_gear_is_found_on_its_table(self, gears):
        mask = foreground_mask(gears)
        assert mask.shape == (12, 1, 128, 128) and mask.dtype == torch.bool
        assert ((mask.float().mean((1, 2, 3)) - 0.41).abs() < 0.03).all()
        y, x = torch.meshgrid(torch.arange(128) - 63.5, torch.arange(128) - 63.5, indexing="ij")
        radius = torch.hypot(y, x)
        assert mask[:, 0, (radius > 16) & (radius < 18)].float().mean() > 0.98  # between the axle hole and the bores
        assert not mask[:, 0, radius > 58].any()  # the table
        assert not mask[:, 0, radius < 6].any()  # the axle hole

    def test_polarity_does_not_matter(self, gears):
        agree = (foreground_mask(gears) == foreground_mask(1 - gears)).float().mean()
        assert agree > 0.99

    def test_each_image_has_a_mask_of_its_own(self, gears):
        whole = foreground_mask(gears)
        assert torch.equal(whole[3:5], foreground_mask(gears[3:5]))

    def test_without_an_object_everything_is_foreground(self):
        assert foreground_mask(torch.full((1, 3, 40, 60), 0.3)).all()
        speck = torch.full((1, 3, 100, 100), 0.2)
        speck[..., 50:58, 50:58] = 0.9  # less than 1 % of the image
        assert foreground_mask(speck).all()

    def test_what_fills_the_picture_is_all_foreground(self, toy_root):
        images = data.load("toy", toy_root, "all", image_size=64).train
        everywhere = foregrounds(images, range(len(images))).flatten(1).all(1)
        assert everywhere.tolist() == (images.categories != "toy/gear").tolist() == images.textures.tolist()

    def test_specks_and_gaps_are_removed(self):
        image = torch.full((1, 3, 100, 100), 0.2)
        image[..., 20:70, 20:70] = 0.8
        image[..., 40:42, 20:70] = 0.2  # a gap of 2 px
        image[..., 85:92, 85:92] = 0.8  # a part of half a percent
        mask = foreground_mask(image)[0, 0]
        assert mask[22:68, 22:68].all() and not mask[80:].any()
