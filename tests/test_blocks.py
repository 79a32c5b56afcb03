"""Parts that several methods share."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from vitad.blocks import gaussian_blur, ssim_map, top_mean


def maps(shape=(3, 20, 33)):
    return torch.from_numpy(np.random.default_rng(0).random(shape))


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5, 6.0, 15.0, 60.0])
def test_gaussian_blur_equals_scipy(sigma):
    """At any ratio of sigma to the sides, 20 and 33 px here, far more than once around the mirror too."""
    x = maps()
    expected = np.stack([gaussian_filter(m, sigma, mode="reflect") for m in x.numpy()])
    np.testing.assert_allclose(gaussian_blur(x, sigma).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(gaussian_blur(x.float(), sigma).numpy(), expected, atol=1e-6)


def test_gaussian_blur_can_be_cut_off_earlier():
    expected = np.stack([gaussian_filter(m, 4.0, mode="reflect", radius=2) for m in maps().numpy()])
    np.testing.assert_allclose(gaussian_blur(maps(), 4.0, radius=2).numpy(), expected, atol=1e-12)


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


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_map_equals_scikit_image(data_range):
    """On an image and a noisy one; scikit-image sees the zeros that are assumed beyond the edges."""
    rng = np.random.default_rng(0)
    x = data_range * rng.random((2, 3, 30, 41)).cumsum(3) / 41
    y = x + 0.1 * data_range * rng.standard_normal(x.shape)
    expected = []
    for a, b in zip(x, y, strict=True):
        a, b = (np.pad(t, ((0, 0), (12, 12), (12, 12))) for t in (a, b))
        options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=data_range)
        full = structural_similarity(a, b, full=True, channel_axis=0, **options)[1]
        expected.append(full[:, 12:-12, 12:-12].mean(0, keepdims=True))
    found = ssim_map(torch.from_numpy(x), torch.from_numpy(y), data_range)
    assert found.shape == (2, 1, 30, 41)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert 0.1 < found.mean() < 0.9


def test_ssim_of_an_image_with_itself_is_1_and_gradients_point_there():
    x = torch.rand(1, 3, 24, 24)
    torch.testing.assert_close(ssim_map(x, x, 1.0), torch.ones(1, 1, 24, 24))
    y = (x + 0.2 * torch.randn_like(x)).requires_grad_()
    before = ssim_map(x, y, 1.0).mean()
    before.backward()
    after = ssim_map(x, y + 10 * y.grad, 1.0).mean()
    assert y.grad.isfinite().all() and after > before
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim_map(x, y, 1.0).mean(), before)


def test_top_mean():
    x = torch.arange(200.0).flip(0).reshape(2, 10, 10)
    assert top_mean(x, 0.05).tolist() == [197, 97]  # the highest five of a hundred
    assert top_mean(x, 1.0).tolist() == [149.5, 49.5]
    assert top_mean(x, 1e-6).tolist() == [199, 99]  # at least one pixel
