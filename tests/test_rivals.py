"""The systems that the papers compare with, beside `l2cae` and `patchknn`: the ideas that make them work."""

import numpy as np
import pytest
import torch
from helpers import CPU, make
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from vitad.errors import UserError
from vitad.methods.rivals import padim

# --- PaDiM ------------------------------------------------------------------------------------------------


def padim_of(images, **overrides):
    model = make(padim, **overrides)
    model.prepare(images, CPU)
    return model


@pytest.mark.parametrize("shared", [False, True])
def test_padim_map_is_the_mahalanobis_distance_at_each_place(gears, shared):
    """Against numpy, in double precision, place by place."""
    model = padim_of(gears.train, shared=shared, batch_size=5)
    images = gears.test.batch(range(3))["image"]

    def grid(images):
        """(B,64,C): coarse cells repeated; all three maps begin at the grid of stride 8, which is the mean of 2 x 2."""
        fine, same, coarse = model.backbone(images)
        fine = F.avg_pool2d(fine, 2)
        coarse = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return torch.cat([fine, same, coarse], 1)[:, model.chosen].flatten(2).mT.double().numpy()

    normal, tested = grid(gears.train.batch(range(12))["image"]), grid(images)
    expected = np.zeros((3, 64))
    for place in range(64):
        samples = normal.reshape(-1, 20) if shared else normal[:, place]
        inverse = np.linalg.inv(np.cov(samples.T) + 0.01 * np.eye(20))
        for i in range(3):
            d = tested[i, place] - samples.mean(0)
            expected[i, place] = np.sqrt(d @ inverse @ d)
    expected = torch.from_numpy(expected).view(3, 1, 8, 8)
    expected = F.interpolate(expected, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    expected = np.stack([gaussian_filter(m, 1.0) for m in expected.numpy()])
    maps = model.anomaly_map(images)
    np.testing.assert_allclose(maps, expected, rtol=2e-3)
    assert torch.equal(model.image_score(maps), maps.amax((1, 2)))


def test_padim_distances_of_fresh_draws_have_the_mean_that_theory_gives(gears):
    """The squared distance of a Gaussian vector of 20 channels is 20 on average."""
    model, random = make(padim, ridge=0.0, shared=True), torch.Generator().manual_seed(0)
    mix = torch.randn(20, 20, generator=random)
    model.features = lambda images: torch.randn(1, 4000, 20, generator=random) @ mix + 3
    model.prepare(gears.train, CPU)
    centred = model.features(None)[0] - model.mean
    assert (centred @ model.whiten[0].T).square().sum(1).mean() == pytest.approx(20, rel=0.05)


def test_padim_without_a_ridge_does_not_care_for_the_scale_of_a_channel(gears):
    def distance(scale):
        model, random = make(padim, ridge=0.0, shared=True), torch.Generator().manual_seed(0)
        model.features = lambda images: torch.randn(1, 64, 20, generator=random) * scale
        model.prepare(gears.train, CPU)
        return model.anomaly_map(torch.zeros(1, 3, 64, 64))

    scale = torch.ones(20)
    scale[3] = 10
    torch.testing.assert_close(distance(scale), distance(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"channels": 273}, "channels=273: the maps of test_resnet have 272 in all"),
        ({"grid": 7}, "grid=7 does not divide image_size=64"),
        ({"strides": (3,)}, r"strides=\(3,\): test_resnet has 2, 4, 8"),
    ],
)
def test_padim_refuses_what_it_cannot_do(overrides, message):
    with pytest.raises(UserError, match=message):
        make(padim, **overrides)


def test_padim_needs_a_ridge_where_images_are_few(gears):
    with pytest.raises(UserError, match="ridge=0.0 leaves covariances of 12 samples singular"):
        padim_of(gears.train, ridge=0.0)
