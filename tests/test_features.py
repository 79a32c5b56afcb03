"""MKD: what a small network imitates of a pretrained one, and where the two disagree."""

import pytest
import torch
from helpers import CPU, make, state
from torch import nn

from vitad.errors import UserError
from vitad.methods.rivals import mkd
from vitad.training import train

# --- MKD --------------------------------------------------------------------------------------------------


def test_the_cloner_of_vgg16_has_the_published_number_of_parameters():
    cloner = mkd.Cloner([128, 256, 512, 512], stride=2, width=16)
    assert sum(p.numel() for p in cloner.parameters()) == 343_984
    assert [m.shape[1:] for m in cloner(torch.rand(2, 3, 128, 128))] == [
        (128, 32, 32),
        (256, 16, 16),
        (512, 8, 8),
        (512, 4, 4),
    ]


@pytest.mark.parametrize("kind", ["features", "gradients", "guided"])
def test_a_perfect_clone_agrees_everywhere(kind, gears, monkeypatch):
    model, images = make(mkd, map=kind), gears.test.batch(range(3))["image"]
    with torch.no_grad():
        assert model.anomaly_map(images).max() > 1e-3
        pairs = model.pairs
        monkeypatch.setattr(model, "pairs", lambda x: [(source, source) for source, _ in pairs(x)])
        assert model.score(images).abs().max() < 1e-5 and model.anomaly_map(images).max() < 1e-5


@pytest.mark.parametrize("kind", ["gradients", "guided"])
def test_the_image_score_is_that_of_the_paper(kind, gears):
    """The mean of the map is the disagreement at all but the first depth, whatever the gradient looks like."""
    model, images = make(mkd, map=kind), gears.test.batch(range(3))["image"]
    with torch.no_grad():
        scores = model.image_score(model.anomaly_map(images))
        terms = [mkd.disagreement(pair) for pair in model.pairs(images)[1:]]
    torch.testing.assert_close(scores, sum(cosine + 0.5 * mse for cosine, mse in terms), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_guided_no_negative_gradient_passes_a_relu(sign, monkeypatch):
    """Through one ReLU: with positive weights nothing is held back, with a negative slope above it everything is."""
    maps = {}
    for kind in ("gradients", "guided"):
        model = make(mkd, map=kind, sigma=0)
        conv = nn.Conv2d(3, 4, 3, padding=1)
        conv.weight.data.abs_()
        model.cloner = nn.Sequential(conv, nn.ReLU())
        monkeypatch.setattr(model, "score", lambda x, net=model.cloner: 9 + sign * net(x).mean((1, 2, 3)))
        torch.manual_seed(0)
        conv.reset_parameters()
        conv.weight.data.abs_()
        maps[kind] = model.anomaly_map(torch.rand(1, 3, 64, 64))
    assert torch.equal(maps["guided"], maps["gradients"]) if sign > 0 else maps["guided"].max() == 0
    assert maps["gradients"].min() >= 0 and maps["gradients"].max() > 0


def test_the_disagreement_falls_on_normal_images_most(gears):
    """Training leaves the source as it is; on negatives of new good images the two go on to disagree."""
    model = make(mkd, epochs=30, batch_size=6, lr=3e-3)
    before, source = model.score(gears.train.batch(range(6))["image"]).mean(), state(model.source)
    train(model, gears.train, 0, CPU, amp=False)
    model.eval()
    with torch.no_grad():
        after = model.score(gears.train.batch(range(6))["image"]).mean()
        good = gears.test.batch([i for i, label in enumerate(gears.test.labels) if label == 0])["image"]
        normal, negative = model.score(good), model.score(1 - good)
    assert after < 0.3 * before and all(torch.equal(v, source[k]) for k, v in state(model.source).items())
    assert negative.min() > 2 * normal.max()


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ({"strides": "4"}, "such as"),
        ({"strides": "2,8"}, "double"),
        ({"strides": "1,2"}, "begin at 2"),
        ({"image_size": 72}, "a multiple of 16"),
        ({"map": "smooth"}, "setting map: 'smooth'"),
    ],
)
def test_mkd_refuses_bad_settings(overrides, mend):
    with pytest.raises(UserError, match=mend):
        make(mkd, **overrides)
