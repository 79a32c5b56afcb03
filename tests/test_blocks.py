"""Parts that several methods share."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from vitad.blocks import gaussian_blur, top_mean


def maps(shape=(3, 20, 33)):
    return torch.from_numpy(np.random.default_rng(0).random(shape))


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5, 6.0, 15.0, 60.0])
def test_gaussian_blur_equals_scipy(sigma):
    """At any ratio of sigma to the sides, 20 and 33 px here, far more than once around the mirror too."""
    x = maps()
    expected = np.stack([gaussian_filter(m, sigma, mode="reflect") for m in x.numpy()])
    np.testing.assert_allclose(gaussian_blur(x, sigma).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(gaussian_blur(x.float(), sigma).numpy(), expected, atol=1e-6)


def test_gaussian_blur_by_nothing():
    assert torch.equal(gaussian_blur(maps(), 0), maps())


def test_gaussian_blur_keeps_mean_and_constants():
    assert gaussian_blur(maps(), 5.0).mean().item() == pytest.approx(maps().mean().item())
    torch.testing.assert_close(gaussian_blur(torch.full((1, 9, 9), 0.3), 4.0), torch.full((1, 9, 9), 0.3))


def test_one_blur_after_another_is_one_of_the_root_of_the_sum_of_squares():
    x = maps((2, 64, 64))
    twice, once = gaussian_blur(gaussian_blur(x, 3.0), 4.0), gaussian_blur(x, 5.0)
    assert (twice - once).abs().max() < 1e-3 * (once.max() - once.min())


def test_gaussian_blur_is_exact_under_autocast():
    """Half precision would leave a map with some hundred different values."""
    x = maps().float()
    with torch.autocast("cpu", torch.bfloat16):
        blurred = gaussian_blur(x, 2.0)
    assert blurred.dtype == torch.float32
    assert torch.equal(blurred, gaussian_blur(x, 2.0))


def test_top_mean():
    x = torch.arange(200.0).flip(0).reshape(2, 10, 10)
    assert top_mean(x, 0.05).tolist() == [197, 97]  # the highest five of a hundred
    assert top_mean(x, 1.0).tolist() == [149.5, 49.5]
    assert top_mean(x, 1e-6).tolist() == [199, 99]  # at least one pixel
