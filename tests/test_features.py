"""Rivals that look at the features of a pretrained network: MKD imitates, DFR rebuilds, CFLOW weighs them."""

import pytest
import torch
from helpers import CPU, make, state
from torch import nn

from vitad.errors import UserError
from vitad.methods.rivals import cflow, dfr, mkd
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


# --- DFR --------------------------------------------------------------------------------------------------


def test_the_principal_components_are_counted():
    torch.manual_seed(0)
    x = torch.randn(2000, 5) @ torch.randn(5, 30)  # of rank 5
    assert dfr.components(x, 1.0) == 5 and 1 <= dfr.components(x, 0.5) < 5
    axes = torch.randn(5000, 4) * torch.tensor([3.0, 1.0, 1.0, 0.1])  # 82 %, 9 %, 9 %, 0 %
    assert [dfr.components(axes, share) for share in (0.5, 0.85, 0.95)] == [1, 2, 3]


def test_dfr_finds_what_a_bottleneck_cannot_hold():
    """Trained on features of rank 3, it rebuilds new ones, but not those whose channels are shuffled."""
    torch.manual_seed(0)
    basis, model = torch.randn(3, 80), make(dfr)
    model.build(3)
    optimizer = torch.optim.Adam(model.autoencoder.parameters(), 3e-3)

    def features(n):
        return (torch.randn(n, 8, 8, 3) @ basis).permute(0, 3, 1, 2)

    for _ in range(150):
        optimizer.zero_grad()
        x = features(4)
        (model.autoencoder(x) - x).square().mean().backward()
        optimizer.step()
    model.eval()
    new = features(4)
    shuffled = new[:, torch.randperm(80)]
    with torch.no_grad():
        error = [(model.autoencoder(x) - x).square().mean() for x in (new, shuffled)]
    assert error[1] > 5 * error[0]


def test_dfr_state_carries_its_bottleneck(gears):
    model, other = make(dfr, variance=0.99), make(dfr, variance=0.99)
    model.prepare(gears.train, CPU)
    other.load_state_dict(model.state_dict())
    images = gears.test.batch([0])["image"]
    with torch.no_grad():
        assert torch.equal(other.eval().anomaly_map(images), model.eval().anomaly_map(images))
    assert model.observe(gears.train, CPU) == {"latent": other.latent} != {"latent": make(dfr).latent}


@pytest.mark.parametrize(("overrides", "mend"), [({"grid": 7}, "grid=7"), ({"variance": 0.0}, "variance=0.0")])
def test_dfr_refuses_bad_settings(overrides, mend):
    with pytest.raises(UserError, match=mend):
        make(dfr, **overrides)


# --- CFLOW-AD ---------------------------------------------------------------------------------------------


def flow(channels=5, condition=8, couplings=3):
    """A flow whose parameters are not those of the start."""
    torch.manual_seed(0)
    made = cflow.Flow(channels, condition, couplings)
    for p in made.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return made.double()


def test_a_flow_can_be_inverted():
    x, where = torch.randn(20, 5).double(), torch.randn(20, 8).double()
    with torch.no_grad():
        torch.testing.assert_close(flow().inverse(flow()(x, where)[0], where), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [5, 6])
def test_the_likelihood_is_the_change_of_variables(channels):
    """log N(z; 0, 1) + log |det dz/dx|, the determinant by autograd."""
    made, x, where = flow(channels), torch.randn(4, channels).double(), torch.randn(4, 8).double()
    found = made.log_likelihood(x, where)
    for i in range(4):
        z = made(x[i : i + 1], where[i : i + 1])[0][0]
        J = torch.autograd.functional.jacobian(lambda v, i=i: made(v[None], where[i : i + 1])[0][0], x[i])
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum() + J.det().abs().log()
        torch.testing.assert_close(found[i], expected)


def test_a_trained_flow_knows_density_and_place():
    """Features N(mean of their place, .5): the likelihood nears the true one, and falls where places are swapped."""
    torch.manual_seed(0)
    made, where = cflow.Flow(4, 8, 4), cflow.places(1, 2, 8, CPU)
    means = torch.tensor([[2.0, 0, 0, 1], [-2.0, 1, 0, 0]])
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    for _ in range(250):
        x = (means + 0.5 * torch.randn(64, 2, 4)).flatten(0, 1)
        optimizer.zero_grad()
        (-made.log_likelihood(x, where.repeat(64, 1)).mean()).backward()
        optimizer.step()
    x = means + 0.5 * torch.randn(500, 2, 4)
    true = torch.distributions.Normal(means, 0.5).log_prob(x).sum(2).mean().item()
    with torch.no_grad():
        right, swapped = (
            made.log_likelihood(x.flatten(0, 1), w.repeat(500, 1)).mean().item() for w in (where, where.flip(0))
        )
    assert abs(right - true) < 0.4 and swapped < right - 2


def test_places_have_codes_of_their_own():
    codes = cflow.places(3, 4, 16, CPU)
    assert codes.shape == (12, 16) and len(codes.unique(dim=0)) == 12
    assert torch.equal(codes[0, :8], codes[1, :8]) and torch.equal(codes[0, 8:], codes[4, 8:])


@pytest.mark.parametrize(("overrides", "mend"), [({"couplings": 0}, "couplings=0"), ({"condition": 6}, "condition=6")])
def test_cflow_refuses_bad_settings(overrides, mend):
    with pytest.raises(UserError, match=mend):
        make(cflow, **overrides)
