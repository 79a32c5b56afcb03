"""Time synthetic damage of 32 images of 256 x 256 px, beside DRAEM's recipe written plainly, an image at a time.

    python benchmarks/synthesis.py

Each line gives the shortest and the median time for one image, and how many times faster than the plain version that
is. On two otherwise idle cores of a Xeon with AVX-512 the plain version takes 10.2 ms an image and the same recipe in
batches 0.88 ms (1.2 ms with one thread), all kinds mixed 0.83 ms. In five runs it was 10.4 to 12.0 times faster.

The plain version is the reference of `tests/test_synthesis.py`, too.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from vitad.data.synthesis import KINDS, Synthesis, foreground_mask, texture_bank

BATCH, SIDE = 32, 256


# --- DRAEM's recipe as it is usually written: one image at a time, NumPy and PIL --------------------------------


def plain_perlin(angle: np.ndarray, side: int) -> np.ndarray:
    """Perlin noise (side,side) from the directions of the gradients at the lattice points.

    The number of cells along either axis divides the side.
    """
    rows, columns = angle.shape[0] - 1, angle.shape[1] - 1
    cell = side // rows, side // columns
    t = np.mgrid[0 : rows : rows / side, 0 : columns : columns / side] % 1
    gradient = np.stack([np.sin(angle), np.cos(angle)])

    def corner(down: int, right: int) -> np.ndarray:
        g = gradient[:, down : down + rows, right : right + columns].repeat(cell[0], 1).repeat(cell[1], 2)
        return (t[0] - down) * g[0] + (t[1] - right) * g[1]

    fade = 6 * t**5 - 15 * t**4 + 10 * t**3
    above = corner(0, 0) * (1 - fade[1]) + corner(0, 1) * fade[1]
    below = corner(1, 0) * (1 - fade[1]) + corner(1, 1) * fade[1]
    return np.sqrt(2) * (above * (1 - fade[0]) + below * fade[0])


def plain_recolour(rng: np.random.Generator, texture: Image.Image) -> Image.Image:
    """Three different operations on a PIL image, those that move or mix pixels first."""
    drawn = rng.choice(10, 3, replace=False)
    for operation in sorted(drawn, key=lambda k: (k < 8, 9 - k if k >= 8 else 0)):
        texture = PLAIN_OPERATIONS[operation](rng, texture)
    return texture


def _gamma(rng: np.random.Generator, texture: Image.Image) -> Image.Image:
    level = np.arange(256) / 255
    return texture.point(np.concatenate([np.round(255 * level**g) for g in rng.uniform(0.5, 2, 3)]))


def _brightness(rng: np.random.Generator, texture: Image.Image) -> Image.Image:
    level = np.arange(256) * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30)
    return texture.point(np.tile(level.round().clip(0, 255), 3))


def _solarise(rng: np.random.Generator, texture: Image.Image) -> Image.Image:
    return ImageOps.solarize(texture, rng.uniform(32, 128)) if rng.random() < 0.5 else texture


def _hue_and_saturation(rng: np.random.Generator, texture: Image.Image) -> Image.Image:
    hue, saturation = rng.uniform(-50, 50, 2)
    levels = np.asarray(texture.convert("HSV")).astype(np.float32)
    levels[..., 0] = (levels[..., 0] + hue) % 256
    levels[..., 1] = (levels[..., 1] + saturation).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8), "HSV").convert("RGB")


PLAIN_OPERATIONS = (
    _gamma,
    _brightness,
    _solarise,
    lambda rng, texture: ImageOps.posterize(texture, int(rng.integers(1, 9))),
    lambda rng, texture: ImageOps.invert(texture),
    lambda rng, texture: ImageOps.autocontrast(texture, rng.uniform(0, 20)),
    lambda rng, texture: ImageOps.equalize(texture),
    _hue_and_saturation,
    lambda rng, texture: ImageEnhance.Sharpness(texture).enhance(rng.uniform(0, 2)),
    lambda rng, texture: texture.rotate(rng.uniform(-45, 45)),
)


def plain_damage(
    rng: np.random.Generator, image: np.ndarray, textures: list[Image.Image]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Damage one image (S,S,3) float32 in [0,1] with one of the textures: image, mask (S,S) bool and label."""
    side = len(image)
    texture = plain_recolour(rng, textures[rng.integers(len(textures))])
    noise = plain_perlin(rng.uniform(0, 2 * np.pi, 2 ** rng.integers(0, 6, 2) + 1), side)
    noise = Image.fromarray(noise.astype(np.float32)).rotate(rng.uniform(-90, 90), Image.Resampling.BILINEAR)
    mask = np.asarray(noise) > 0.5
    beta = np.float32(rng.uniform(0, 0.8))
    filled = (1 - beta) * (np.asarray(texture, np.float32) / 255) + beta * image
    return np.where(mask[..., None], filled, image), mask, int(mask.any())


# --- times --------------------------------------------------------------------------------------------------


def milliseconds(function: Callable[[int], object], rounds: int) -> list[float]:
    """Times of `function(step)` for one image, in ascending order, after one call that is not counted."""
    times = []
    for step in range(rounds + 1):
        start = time.perf_counter()
        function(step)
        times.append((time.perf_counter() - start) * 1000 / BATCH)
    return sorted(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=25, metavar="N", help="of ours; fewer of the slow ones (default %(default)s)"
    )
    rounds = parser.parse_args().rounds
    images = torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    arrays = list(images.permute(0, 2, 3, 1).contiguous().numpy())
    bank = texture_bank("procedural", (SIDE, SIDE), images.device).images
    textures = [Image.fromarray(t) for t in bank.permute(0, 2, 3, 1).contiguous().numpy()]

    def plain(step):
        rng = np.random.default_rng(step)
        return [plain_damage(rng, image, textures) for image in arrays]

    def ours(*kinds):
        synthesis = Synthesis(kinds, probability=1)
        return lambda step: synthesis(images, 0, step)

    threads = torch.get_num_threads()
    rows = {"plain, one image at a time": milliseconds(plain, 1 + rounds // 4)}
    rows["vitad: the same recipe"] = milliseconds(ours("perlin"), rounds)
    torch.set_num_threads(1)
    rows["  with one thread"] = milliseconds(ours("perlin"), rounds)
    torch.set_num_threads(threads)
    for kind in [k for k in KINDS if k != "perlin"]:
        rows[f"vitad: {kind}"] = milliseconds(ours(kind), rounds)
    rows["vitad: all kinds mixed"] = milliseconds(ours(*KINDS), rounds)
    rows["vitad: foreground mask"] = milliseconds(lambda step: foreground_mask(images), 1 + rounds // 10)

    print(f"{BATCH} images of {SIDE} x {SIDE}, every one damaged; torch threads: {threads}")
    print(f"{'ms per image':30}{'min':>8}{'median':>9}{'faster':>9}")
    slowest = np.median(rows["plain, one image at a time"])
    for name, times in rows.items():
        print(f"{name:30}{times[0]:8.3f}{np.median(times):9.3f}{slowest / np.median(times):8.1f}x")


if __name__ == "__main__":
    main()
