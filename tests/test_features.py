"""Rivals that look at the features of a pretrained network: MKD imitates, DFR rebuilds, CFLOW weighs them."""

import pytest
import torch
from helpers import CPU, make, state
from torch import nn

from vitad.errors import UserError
from vitad.methods.rivals import cflow, dfr, mkd, psvdd
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


# --- Patch SVDD -------------------------------------------------------------------------------------------


def test_psvdd_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = psvdd.Model(psvdd.Settings())
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder.small, model.classifiers[0], model)]
    assert counts == [360_832, 25_864, 453_712]


@pytest.mark.parametrize("number", [0, 1])
def test_one_pass_gives_the_embeddings_of_all_patches(number):
    model, images = make(psvdd), torch.rand(2, 3, 64, 64)
    size, stride = model.sizes[number], model.settings.strides[number]
    with torch.no_grad():
        grid = model.grid(images, number)
        for row in range(grid.shape[2]):
            for column in range(0, grid.shape[3], 3):
                top, left = row * stride, column * stride
                alone = model.encoder(images[..., top : top + size, left : left + size], number)
                torch.testing.assert_close(alone[..., 0, 0], grid[..., row, column], atol=1e-5, rtol=1e-5)


def test_patches_lie_inside_and_their_sides_are_right():
    at = psvdd.places(4000, 64, 32, torch.Generator().manual_seed(0))
    assert at[:, :8].min() >= 0 and at[:, :8].max() <= 32
    assert (at[:, :2] - at[:, 2:4]).abs().max() == 1
    move = at[:, 6:8] - at[:, 4:6]
    assert (move.sign() == psvdd.SIDES[at[:, 8]]).all()
    moved = move.abs()[move != 0]
    assert moved.min() >= 24 and moved.max() < 32 and len(at[:, 8].unique()) == 8


def test_patches_are_cut_where_they_lie():
    images = torch.rand(3, 3, 20, 20)
    at = torch.tensor([[0, 0], [5, 2], [1, 1], [12, 12], [3, 7], [0, 12]])  # two of each image
    for k, (patch, (top, left)) in enumerate(zip(psvdd.crops(images, at, 8), at.tolist(), strict=True)):
        assert torch.equal(patch, images[k // 2, :, top : top + 8, left : left + 8])


def test_a_training_image_has_no_distance_to_itself(gears):
    model = make(psvdd, bank_size=0)
    model.prepare(gears.train, CPU)
    model.finish(gears.train, CPU)
    with torch.no_grad():
        known = model.anomaly_map(gears.train.batch([3])["image"])
        other = model.anomaly_map(gears.test.batch([8])["image"])
    assert known.max() < 1e-2 * other.max()


def test_the_map_is_the_mean_distance_of_the_patches_at_a_pixel(gears):
    """By a loop over patches."""
    model = make(psvdd)
    model.finish(gears.train, CPU)
    image = gears.test.batch([8])["image"]
    with torch.no_grad():
        found, embedded = model.distances(image, 1)[0], model.grid(image, 1)[0]
    total, count = torch.zeros(64, 64), torch.zeros(64, 64)
    for row in range(5):
        for column in range(5):
            nearest = (model.large_bank - embedded[:, row, column]).norm(dim=1).min()
            area = (slice(8 * row, 8 * row + 32), slice(8 * column, 8 * column + 32))
            total[area] += nearest
            count[area] += 1
    torch.testing.assert_close(found, total / count, atol=1e-3, rtol=1e-3)


def test_psvdd_learns_on_which_side_a_patch_lies(gears):
    """And with a large lambda, that all patches are one."""
    shares = {}
    for weight in (1e-3, 100.0):
        torch.manual_seed(0)
        model = make(psvdd, epochs=60, lambda_svdd=weight, lr=3e-3, batch_size=6, pairs=8)
        model.prepare(gears.train, CPU)
        before = model.observe(gears.train, CPU)
        train(model, gears.train, 0, CPU, amp=False)
        shares[weight] = model.observe(gears.train, CPU)
    assert before["sides_large"] < 0.25 and shares[1e-3]["sides_large"] > 0.5  # chance is an eighth
    assert shares[1e-3]["near_large"] < 0.7
    assert shares[100.0]["sides_large"] < 0.4


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ({"widths": "8,8,8,8,8,8,8,8,8"}, "9 widths need 144 px at least"),
        ({"strides": "3,8"}, "3 has to be even"),
        ({"strides": "4,10"}, "10 has to be even and to divide 32"),
        ({"pairs": 0}, "pairs=0"),
    ],
)
def test_psvdd_refuses_bad_settings(overrides, mend):
    with pytest.raises(UserError, match=mend):
        make(psvdd, **overrides)
