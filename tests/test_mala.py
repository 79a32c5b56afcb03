"""Chen et al. 2023: masking, positions, both stages and their losses, what stays frozen, the score, given weights."""

import argparse
import math
import weakref
from collections import Counter
from functools import partial

import helpers
import numpy as np
import pytest
import torch
from helpers import CPU, Watched, equal, state
from safetensors.torch import save_file
from scipy.ndimage import uniform_filter
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitad import data, runs, training
from vitad.backbones import normalise, vit
from vitad.data import samples
from vitad.data.synthesis import foreground_mask
from vitad.errors import UserError
from vitad.methods import mala
from vitad.methods.mala import TokenBalance, draw, focal, load_mae, n_visible, plpm, sincos, unpatchify
from vitad.settings import resolve
from vitad.training import train

make = partial(helpers.make, mala)


def patchify(images, P):
    """(B,C,S,S) -> (B,N,P*P*C), one patch at a time, one pixel at a time."""
    B, C, H, W = images.shape
    corners = [(y, x) for y in range(0, H, P) for x in range(0, W, P)]
    return torch.stack(
        [
            torch.stack([images[:, :, y + i, x + j] for i in range(P) for j in range(P)], 1).flatten(1)
            for y, x in corners
        ],
        1,
    )


# --- parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 3])
def test_unpatchify_is_the_inverse_of_patchify(channels):
    images = torch.rand(2, channels, 12, 20)
    assert torch.equal(unpatchify(patchify(images, 4), (3, 5), channels), images)


def test_positions_are_those_of_mae_number_by_number():
    table = sincos((3, 5), 16)
    assert table.shape == (1, 1 + 15, 16) and not table[0, 0].any()
    for row, column in [(0, 0), (1, 4), (2, 3)]:
        expected = []
        for place in (column, row):  # MAE's first half belongs to the column
            angles = [place / 10000 ** (k / 4) for k in range(4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        np.testing.assert_allclose(table[0, 1 + 5 * row + column], expected, atol=1e-6)
    assert len({tuple(p.tolist()) for p in table[0]}) == 16


def test_positions_are_fixed(gears):
    model = make(stage1_lr=0.1)
    before = model.encoder.pos_embed.clone(), model.decoder.pos_embed.clone()
    assert torch.equal(before[0], sincos((4, 4), 64)) and torch.equal(before[1], sincos((4, 4), 32))
    train(model, gears.train, 0, CPU, amp=False)
    assert torch.equal(model.encoder.pos_embed, before[0]) and torch.equal(model.decoder.pos_embed, before[1])


def test_a_quarter_of_the_patches_stays_visible_new_ones_each_time():
    assert [n_visible(196, r) for r in (0.75, 0.0, 0.9, 0.999)] == [49, 196, 20, 1]
    model = make()
    drawn = torch.cat([model.random_visible(50, CPU) for _ in range(20)])
    assert drawn.shape == (1000, 4)
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    assert len({tuple(sorted(row)) for row in drawn.tolist()}) > 500
    counts = Counter(drawn.flatten().tolist())
    assert sorted(counts) == list(range(16)) and min(counts.values()) > 180 and max(counts.values()) < 320


def test_the_encoder_computes_only_what_is_visible(gears):
    model, images = make(), gears.train.batch(range(3))["image"]
    lengths = []
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    visible = torch.tensor([[3, 0, 9, 14], [1, 2, 3, 4], [15, 14, 13, 12]])
    with torch.no_grad():
        first, last = model.tokens(images, visible)
        assert first.shape == last.shape == (3, 4, 64) and lengths == [5] * 6
        rebuilt = model.reconstruct(images, visible)
        assert rebuilt.shape == images.shape and lengths == [5] * 12 + [16]
        hidden = images.clone()
        tiles = hidden.view(3, 3, 4, 16, 4, 16)
        for b, kept in enumerate(visible.tolist()):
            for patch in set(range(16)) - set(kept):
                tiles[b, :, patch // 4, :, patch % 4] = torch.rand(3, 16, 16)
        assert torch.equal(model.reconstruct(hidden, visible), rebuilt)
        tiles[1, :, 0, :, 2] = torch.rand(3, 16, 16)  # patch 2 is visible in the second image
        changed = (model.reconstruct(hidden, visible) != rebuilt).flatten(1).any(1)
        assert changed.tolist() == [False, True, False]


def test_all_tokens_are_those_of_the_plain_vit(gears):
    """With every patch visible, in any order, the masked encoder is the encoder of timm."""
    model, images = make(), gears.test.batch(range(2))["image"]
    with torch.no_grad():
        expected = model.encoder.forward_features(normalise(images))[:, 1:]
        torch.testing.assert_close(model.tokens(images)[1], expected)
        order = torch.stack([torch.randperm(16) for _ in range(2)])
        first, last = model.tokens(images, order)
        torch.testing.assert_close(last, expected.gather(1, order[..., None].expand(-1, -1, 64)))
        torch.testing.assert_close(first, model.tokens(images)[0].gather(1, order[..., None].expand(-1, -1, 64)))
        rebuilt = model.reconstruct(images)
        torch.testing.assert_close(model.reconstruct(images, order), rebuilt)


@pytest.mark.parametrize("fill", ["zeros", "mask_token"])
def test_masked_places_are_filled_and_every_token_is_in_its_place(fill):
    model = make(mask_fill=fill)
    seen = []
    model.decoder.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens, visible = torch.randn(2, 3, 64), torch.tensor([[5, 0, 12], [1, 15, 7]])
    with torch.no_grad():
        decoded = model.decoder(tokens, visible)
        embedded = model.decoder.embed(tokens)
    assert decoded.shape == (2, 16, 32)
    content = (seen[0] - sincos((4, 4), 32)[:, 1:]).detach()
    filling = model.decoder.mask_token[0, 0].detach() if fill == "mask_token" else torch.zeros(32)
    for b, kept in enumerate(visible.tolist()):
        for place in range(16):
            expected = embedded[b, kept.index(place)] if place in kept else filling
            torch.testing.assert_close(content[b, place], expected, atol=1e-6, rtol=1e-5)
    assert ("mask_token" in model.decoder.state_dict()) == (fill == "mask_token")


def test_fewer_blocks_are_the_first_ones(gears):
    images = gears.train.batch(range(2))["image"]
    whole, cut = make(), make(depth=2)
    assert len(cut.encoder.blocks) == 2 and len(whole.encoder.blocks) == 6
    cut.encoder.load_state_dict(whole.encoder.state_dict(), strict=False)
    outputs = []
    whole.encoder.blocks[1].register_forward_hook(lambda _, __, z: outputs.append(whole.encoder.norm(z)[:, 1:]))
    with torch.no_grad():
        whole.tokens(images)
        assert torch.equal(cut.tokens(images)[1], outputs[0])


def test_the_paper_s_sizes():
    """Sec. IV-C on the meta device: nothing is computed, shapes and counts are real."""
    with torch.device("meta"):
        model = mala.Model(resolve(mala.Settings, mala.PRESETS, "paper", {"pretrained": False}))
        count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        images = torch.empty(2, 3, 224, 224)
        visible = model.random_visible(2, "meta")
        first, last = model.tokens(images, visible)
        rebuilt, (E_first, E_last) = model.reconstruct(images, visible), model.tokens(images)
        logits = unpatchify(model.tbm(E_first, E_last, model.decoder(E_last)), model.grid, 2)
    assert visible.shape == (2, 49) and first.shape == last.shape == (2, 49, 1024)
    assert rebuilt.shape == (2, 3, 224, 224) and logits.shape == (2, 2, 224, 224)
    assert count["encoder"] == pytest.approx(303.3e6, rel=1e-3)
    assert count["tbm"] == 2048 * 512 + 512 + 1024 * 512 + 512 == pytest.approx(1.57e6, rel=5e-3)
    assert len(model.encoder.blocks) == 24 and len(model.decoder.blocks) == 8
    stage1, stage2 = model.phases()
    assert (stage1.epochs, stage1.batch_size, stage1.lr) == (2000, 128, 5e-4)
    assert (stage2.epochs, stage2.batch_size, stage2.lr, stage2.schedule) == (700, 32, 1e-4, None)
    assert stage1.optimizer is torch.optim.AdamW and (stage1.betas, stage1.weight_decay) == ((0.9, 0.95), 0.05)


def test_token_balance_is_equation_5():
    torch.manual_seed(0)
    tbm = TokenBalance(6, 4, 10)
    first, last, decoded = torch.randn(2, 9, 6), torch.randn(2, 9, 6), torch.randn(2, 9, 4)
    inner = np.concatenate([first, last], -1) @ tbm.lp1.weight.detach().numpy().T + tbm.lp1.bias.detach().numpy()
    outer = np.concatenate([inner, decoded], -1) @ tbm.lp2.weight.detach().numpy().T + tbm.lp2.bias.detach().numpy()
    np.testing.assert_allclose(tbm(first, last, decoded).detach(), outer, atol=1e-5)


def test_plpm_gives_one_logit_an_image():
    net = plpm((64, 128, 256, 512))
    sides = []
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, y: sides.append(tuple(y.shape[1:])))
    assert net(torch.randn(3, 3, 64, 64)).shape == (3,)
    assert sides == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert net(torch.randn(1, 3, 64, 64)).shape == (1,)


# --- stage 1 ----------------------------------------------------------------------------------------------


def rebuilt_as_in_training(model, images):
    torch.manual_seed(7)
    visible = model.random_visible(len(images), CPU)
    torch.manual_seed(7)  # the same mask for the losses
    return model.reconstruct(images, visible)


def test_losses_of_stage_1_are_equation_3_corrected(gears):
    from skimage.metrics import structural_similarity

    model, images = make(alpha=(2.0, 0.5, 0.1)), gears.train.batch(range(4))["image"]
    with torch.no_grad():
        rebuilt = rebuilt_as_in_training(model, images)
        losses = {k: v.item() for k, v in model.stage1_losses({"image": images}).items()}
        lb_o, lb_p = (model.plpm(normalise(x)).double().numpy() for x in (images, rebuilt))
    X, X_bar = images.double().numpy(), rebuilt.double().numpy()
    assert losses["l1"] == pytest.approx(2 * np.abs(X - X_bar).mean(), rel=1e-5)  # complete images, in [0,1]
    pads = ((8, 8), (8, 8), (0, 0))  # zeros beyond the edges
    pairs = [[np.pad(t.transpose(1, 2, 0), pads) for t in pair] for pair in zip(X, X_bar, strict=True)]
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=2)
    ssim = [structural_similarity(a, b, full=True, **options)[1][8:-8, 8:-8].mean() for a, b in pairs]
    assert losses["ssim"] == pytest.approx(0.5 * (1 - np.mean(ssim)), rel=1e-4)

    def sigma(t):
        return 1 / (1 + np.exp(-t))

    cross_entropy = -np.log(1 - sigma(lb_o)).mean() / 2 - np.log(sigma(lb_p)).mean() / 2
    assert losses["plpm"] == pytest.approx(cross_entropy, rel=1e-5)
    assert losses["fool"] == pytest.approx(0.1 * -np.log(1 - sigma(lb_p)).mean(), rel=1e-5)


def test_the_losses_have_the_corrected_signs(gears):
    """A PLPM that is right costs less than one that is wrong; what fools it costs the autoencoder less."""
    model, images = make(), gears.train.batch(range(4))["image"]
    model.plpm = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 1), nn.Flatten(0))
    model.plpm[1].weight.data.fill_(1e-3)  # bright images get high logits: taken for rebuilt ones
    bright, dark = torch.ones_like(images), torch.zeros_like(images)
    assert model.label_loss(dark, bright) < 0.1 < math.log(2) < 2 < model.label_loss(bright, dark)
    fooled = []
    for bias in (-3.0, 0.0, 3.0):
        model.plpm[1].weight.data.zero_()
        model.plpm[1].bias.data.fill_(bias)
        with torch.no_grad():
            fooled.append(model.stage1_losses({"image": images})["fool"].item())
    assert fooled == sorted(fooled) and fooled[0] < 0.2 * fooled[2]  # least where rebuilt images pass for originals
    assert fooled == pytest.approx([0.01 * math.log(1 + math.exp(bias)) for bias in (-3, 0, 3)])


def gradients(model, loss, parts):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {
        f"{part}.{name}": None if p.grad is None else p.grad.clone()
        for part in parts
        for name, p in getattr(model, part).named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("reading", ["adversarial", "joint", "off"])
def test_one_backward_gives_each_parameter_the_gradient_of_its_own_objective(reading, gears):
    """Against two separate backward passes, as two optimisers would do them."""
    model, images = make(plpm=reading, alpha=(1.0, 1.0, 0.5)).train(), gears.train.batch(range(6))["image"]
    batch, autoencoder = {"image": images}, ("encoder", "decoder")

    def objective():
        torch.manual_seed(7)
        losses = model.stage1_losses(batch)
        rebuilt = rebuilt_as_in_training(model, images)
        return losses, rebuilt

    losses, _ = objective()
    together = gradients(model, sum(losses.values()), (*autoencoder, *(("plpm",) if reading != "off" else ())))
    _, rebuilt = objective()
    error = (images - rebuilt).abs().mean() + (1 - mala.ssim_map(images, rebuilt, 1.0)).mean()
    if reading == "off":
        assert model.plpm is None and set(losses) == {"l1", "ssim"}
        expected = gradients(model, error, autoencoder)
    elif reading == "joint":
        expected = gradients(model, error + 0.5 * model.label_loss(images, rebuilt), (*autoencoder, "plpm"))
    else:
        fool = -(1 - model.plpm(normalise(rebuilt)).sigmoid()).log().mean()
        expected = gradients(model, error + 0.5 * fool, autoencoder)
        expected |= gradients(model, model.label_loss(images, rebuilt.detach()), ("plpm",))
    assert together.keys() == expected.keys()
    for name, gradient in together.items():
        if gradient is None:
            assert expected[name] is None
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
    reached = {name.split(".")[0] for name, g in together.items() if g is not None and g.abs().sum() > 0}
    assert reached == {*autoencoder, *(("plpm",) if reading != "off" else ())}


@pytest.mark.parametrize("reading", ["adversarial", "joint", "off"])
def test_stage_1_in_micro_batches_is_stage_1(reading, gears):
    """Losses and gradients. PLPM's batch norm sees the whole batch, which sums over micro-batches would not give."""
    batch, found = gears.train.batch(range(7)), []
    for size in (0, 3):
        model = make(plpm=reading, micro_batch=size).train()
        rows = []
        model.encoder.patch_embed.register_forward_hook(lambda *call, rows=rows: rows.append(len(call[1][0])))
        torch.manual_seed(7)
        losses = model.stage1_losses(batch)
        found.append((losses, gradients(model, sum(losses.values()), ("encoder", "decoder"))))
        if model.plpm:
            found[-1][1].update({name: p.grad for name, p in model.plpm.named_parameters()})
        assert rows == ([3, 3, 1, 1, 3, 3] if size else [7])
    (losses, expected), (parts, got) = found
    assert losses.keys() == parts.keys() and expected.keys() == got.keys()
    for name in losses:
        torch.testing.assert_close(parts[name], losses[name])
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


class Held(TorchDispatchMode):
    """Counts the bytes that tensors hold, and the most that they ever held."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, address, size):
        self.storages.remove(address)
        self.now -= size


def test_stage_1_of_the_paper_fits_11_gib_in_micro_batches():
    """128 images in half precision, forward and back. Nothing is computed, sizes are real. At once they take 17 GiB."""
    with torch.device("meta"):
        overrides = {"pretrained": False, "micro_batch": 16}
        model = mala.Model(resolve(mala.Settings, mala.PRESETS, "paper", overrides)).train()
    with FakeTensorMode(allow_non_fake_inputs=True), Held() as held:
        model.to_empty(device="cpu")
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(model.stage1_losses({"image": torch.rand(128, 3, 224, 224)}).values())
        loss.backward()
    moments = 2 * 4 * sum(p.numel() for p in model.phases()[0].parameters)  # of AdamW
    assert 7 < (held.peak + moments) / 2**30 < 9.5  # what is left is for CUDA itself


def test_plpm_learns_to_tell_and_the_autoencoder_to_fool_it(gears):
    """Each of the two objectives falls when only its own parameters move."""
    batch = gears.train.batch(range(12))
    for part, name in (("plpm", "plpm"), ("decoder", "fool")):
        model = make(alpha=(0.0, 0.0, 1.0)).train()
        model.plpm[-2].weight.data *= 4  # so that its answer depends on what it sees
        optimizer = torch.optim.Adam(getattr(model, part).parameters(), lr=3e-3)
        seen = []
        for _ in range(30):
            losses = model.stage1_losses(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            seen.append(losses[name].item())
        assert np.mean(seen[-3:]) < 0.9 * np.mean(seen[:3]), part


def test_stage_1_learns_to_rebuild_what_is_hidden(gears):
    model = make(stage1_epochs=75, pipeline="recon", stage1_batch_size=12, stage1_lr=0.09)
    images = gears.train.batch(range(12))["image"]
    visible = model.random_visible(12, CPU)
    shown = torch.zeros(12, 16).scatter(1, visible, 1).view(12, 1, 4, 4)
    hidden = 1 - F.interpolate(shown, (64, 64))

    def error():
        with torch.no_grad():
            return ((model.eval().reconstruct(images, visible) - images).abs() * hidden).sum().item()

    before = error()
    history = train(model, gears.train, 0, CPU, amp=False)
    assert error() < 0.6 * before
    assert history[-1]["ssim"] < 0.8 * history[0]["ssim"]
    assert set(history[0]) == {"phase", "epoch", "l1", "ssim", "plpm", "fool", "seconds"}


# --- stage 2 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 2.0, 4.0])
def test_focal_loss_pixel_by_pixel(gamma):
    torch.manual_seed(0)
    logits, Y = 4 * torch.randn(2, 2, 5, 5), torch.rand(2, 5, 5) < 0.3
    total = 0.0
    for b in range(2):
        for y in range(5):
            for x in range(5):
                anomalous, normal = (math.exp(v) for v in logits[b, :, y, x].tolist())
                p = (anomalous if Y[b, y, x] else normal) / (anomalous + normal)
                total -= (1 - p) ** gamma * math.log(p)
    assert focal(logits, Y, gamma).item() == pytest.approx(total / 50, rel=1e-4)


def test_focal_loss_still_pulls_at_certain_mistakes():
    logits = torch.tensor([-60.0, 60.0]).view(1, 2, 1, 1).requires_grad_()
    focal(logits, torch.ones(1, 1, 1, dtype=torch.bool), 4.0).backward()
    np.testing.assert_allclose(logits.grad.flatten(), [-1, 1], atol=1e-4)


def test_losses_of_stage_2_are_equation_6(gears):
    model, batch = make(beta=(2.0, 0.3), gamma=3.0), gears.train.batch(range(6))
    with torch.no_grad():
        torch.manual_seed(3)
        damaged = model.damaged(batch)
        torch.manual_seed(3)
        losses = {k: v.item() for k, v in model.stage2_losses(batch).items()}
        logits = model.predict(damaged["image"])
    Y, p = damaged["mask"][:, 0], logits.softmax(1)
    assert damaged["image"].shape == (6, 3, 64, 64) and Y.any()
    assert losses == {
        "l1": pytest.approx(2 * (p[:, 0] - Y.float()).abs().mean().item(), rel=1e-5),
        "focal": pytest.approx(0.3 * focal(logits, Y, 3.0).item(), rel=1e-5),
    }


def test_channel_0_is_the_anomaly(gears):
    model, images = make(), gears.test.batch(range(2))["image"]
    bias = model.tbm.lp2.bias.data.view(256, 2)
    with torch.no_grad():
        low = model.anomaly_map(images)
        bias[:, 0] += 3
        assert (model.anomaly_map(images) > low).all()
        bias[:, 1] += 3
        torch.testing.assert_close(model.anomaly_map(images), low)


def test_of_each_category_exactly_64_of_80_images_are_damaged_others_in_every_epoch(toy_root, monkeypatch):
    images = data.load("toy", toy_root, "all", image_size=64).train  # 12 of each category
    model = make(stage2_images=10, stage1=False, epochs=3, batch_size=8)
    model.prepare(images, CPU)
    damaged, masks = [], []
    original = model.damaged

    def watched(batch):
        result = original(batch)
        differs = (result["image"] != batch["image"]).any(1, keepdim=True)
        assert torch.equal(differs, result["mask"])
        damaged.extend(batch["index"][result["label"] == 1].tolist())
        masks.extend(m.numpy().tobytes() for m in result["mask"][result["label"] == 1])
        return result

    monkeypatch.setattr(model, "damaged", watched)
    train(model, images, 0, CPU, amp=False)
    assert round(0.8 * 80) == 64 and len(damaged) == 3 * 24  # three epochs, 8 of the 10 of each category
    epochs = [damaged[:24], damaged[24:48], damaged[48:]]
    for epoch in epochs:
        assert Counter(images.categories[epoch].tolist()) == {f"toy/{c}": 8 for c in ("weave", "grain", "gear")}
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 3
    assert len(set(masks)) == len(masks)


@pytest.mark.parametrize("mode", ["global", "both"])
def test_damage_that_is_made_ahead_is_the_same(mode, gears, elsewhere, monkeypatch):
    """As with a GPU: by threads, on the host, from the seeds that the losses would have drawn."""
    found = []
    for device in (CPU, elsewhere):
        monkeypatch.setattr(
            training, "batches", lambda images, parts, _, *given, on=device: samples.batches(images, parts, on, *given)
        )
        model, seeds = make(mode=mode, batch_size=5), []
        model.prepare(gears.train, CPU)
        damaged = model.damaged
        model.damaged = lambda *given, damaged=damaged, seeds=seeds: seeds.append(given[1:]) or damaged(*given)
        history = train(model, gears.train, 0, CPU, amp=False)
        found.append((state(model), [row | {"seconds": 0} for row in history], seeds))
    (usual, history, drawn), (ahead, again, given) = found
    assert equal(usual, ahead) and history == again
    assert len(drawn) == len(given) == 6 and not any(drawn) and len(set(given)) == 6


def test_local_damage_keeps_to_the_foreground_which_is_found_once(gears, monkeypatch):
    model = make(mode="local", damage=1.0, stage2_images=7).train()
    model.prepare(gears.train, CPU)
    assert model.foreground.shape == (7, 1, 64, 64)
    monkeypatch.setattr("vitad.data.synthesis.foreground_mask", None)  # not asked again
    monkeypatch.setattr("vitad.data.synthesis.foreground.foreground_mask", None)
    chosen = model.chosen[2]
    batch = gears.train.batch(chosen[[4, 0, 6]])
    expected = model.foreground[[4, 0, 6]]
    torch.testing.assert_close(expected, foreground_mask(batch["image"]))
    masks = torch.stack([model.damaged(batch)["mask"] for _ in range(10)])
    assert masks.any() and not (masks & ~expected).any()
    assert make(mode="global").prepare(gears.train, CPU) is None and make(mode="global").foreground is None


def test_a_material_that_fills_the_picture_has_no_background(toy_root):
    images = data.load("toy", toy_root, "all", image_size=64).train
    model = make(mode="local")
    model.prepare(images, CPU)
    everywhere = model.foreground.flatten(1).all(1).numpy()
    of_category = images.categories[model.chosen[2]]
    assert everywhere[of_category != "toy/gear"].all() and not everywhere[of_category == "toy/gear"].any()


def test_biases_and_norms_do_not_decay(gears):
    """With a rate of 0 for the gradients and a large decay, what has one dimension stays and all else shrinks."""
    model = make(lr=1e-2, weight_decay=10.0, stage1=False, stage2_images=8, batch_size=8, epochs=1, beta=(0.0, 0.0))
    model.prepare(gears.train, CPU)
    before = state(model)
    train(model, gears.train, 0, CPU, amp=False)
    for name, p in [*model.decoder.named_parameters(), *model.tbm.named_parameters()]:
        full = next(key for key in before if key.endswith(name) and before[key].shape == p.shape)
        changed = not torch.equal(model.state_dict()[full], before[full])
        assert changed == (p.ndim > 1 and p.grad is not None), full


def test_stage_2_builds_no_graph_through_the_encoder(gears):
    model = make().train()
    grad_modes = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, _, y: grad_modes.append((y.requires_grad, module.training)))
    losses = model.stage2_losses(gears.train.batch(range(4)))
    sum(losses.values()).backward()
    assert grad_modes == [(False, False)] * 6
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is None for p in model.decoder.pred.parameters())
    for part in (model.decoder.embed, model.decoder.blocks, model.tbm):
        assert all(p.grad.abs().sum() > 0 for p in part.parameters() if p.grad is not None and p.dim() > 1)


def test_the_encoder_stays_as_stage_1_left_it(gears):
    model, at_the_border = make(stage1_epochs=2, epochs=3), {}
    stage2 = model.stage2_losses

    def watched(batch):
        if not at_the_border:
            at_the_border.update(encoder=state(model.encoder), plpm=state(model.plpm), decoder=state(model.decoder))
        return stage2(batch)

    model.stage2_losses = watched
    before = state(model.encoder)
    train(model, gears.train, 0, CPU, amp=False)
    assert equal(state(model.encoder), at_the_border["encoder"]) and equal(state(model.plpm), at_the_border["plpm"])
    assert not equal(before, at_the_border["encoder"])
    after = state(model.decoder)
    same = {k.split(".")[0] for k, v in after.items() if torch.equal(v, at_the_border["decoder"][k])}
    assert same == {"pos_embed", "pred"}


def test_stage_1_can_leave_the_encoder_as_it_comes(gears):
    model = make(stage1_encoder=False)
    encoder, decoder, judge = state(model.encoder), state(model.decoder), state(model.plpm)
    model.stage1_losses(gears.train.batch(range(4)))["l1"].backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    train(model, gears.train, 0, CPU, amp=False)
    assert equal(state(model.encoder), encoder)
    assert not equal(state(model.decoder), decoder) and not equal(state(model.plpm), judge)


@pytest.mark.parametrize("keep", [False, True])
def test_grey_images_can_stay_grey(keep, gears):
    grey = {"image": gears.train.batch(range(12))["image"][:, :1].expand(-1, 3, -1, -1)}
    damaged = make(keep_grey=keep, mode="global").damaged(grey)
    assert damaged["mask"].any()
    assert torch.equal(damaged["image"][:, 0], damaged["image"][:, 2]) == keep


def test_without_stage_1_the_encoder_is_never_trained(gears):
    model = make(stage1=False)
    before = state(model.encoder)
    train(model, gears.train, 0, CPU, amp=False)
    assert equal(state(model.encoder), before) and model.plpm is None
    assert [phase.name for phase in model.phases()] == ["stage2"]
    assert not any(p.requires_grad for p in model.encoder.parameters())


# --- stages, images, resuming -----------------------------------------------------------------------------


def test_each_category_gives_as_many_images():
    random = np.random.default_rng(0)
    categories = np.array(["a"] * 30 + ["b"] * 5 + ["c"] * 20)
    chosen = draw(categories, 8, random)
    assert Counter(categories[chosen]) == {"a": 8, "b": 5, "c": 8}  # b has no more
    assert (np.diff(chosen) > 0).all()
    assert draw(categories, 0, random).tolist() == list(range(55))
    assert draw(categories, 8, random).tolist() != chosen.tolist()


def test_the_stages_are_trained_on_their_images(gears):
    model = make(stage1_images=9, stage2_images=5, stage1_batch_size=4, batch_size=2, mode="global")
    watched = Watched(gears.train)
    model.prepare(watched, CPU)
    train(model, watched, 0, CPU, amp=False)
    assert list(map(len, watched.requested)) == [4, 4, 1] * 2 + [2, 2, 1] * 2
    for first, last, stage in ((0, 3, 1), (3, 6, 1), (6, 9, 2), (9, 12, 2)):
        assert sorted(sum(watched.requested[first:last], [])) == model.chosen[stage].tolist()
    assert len(model.chosen[1]) == 9 and len(model.chosen[2]) == 5


def test_stage_1_can_draw_other_images_in_each_epoch(gears):
    switches = dict(stage1_images=8, stage2_images=5, stage1_batch_size=4, batch_size=5, stage1_epochs=4)
    epochs_of = {}
    for again in (False, True):
        model, watched = make(**switches, resample_each_epoch=again), Watched(gears.train)
        model.prepare(watched, CPU)
        watched.requested.clear()
        train(model, watched, 0, CPU, amp=False)
        assert list(map(len, watched.requested)) == [4] * 8 + [5] * 2
        epochs = [set(a + b) for a, b in zip(watched.requested[:8:2], watched.requested[1:8:2], strict=True)]
        assert all(len(epoch) == 8 for epoch in epochs)  # none twice
        epochs_of[again] = {frozenset(epoch) for epoch in epochs}, set(watched.requested[8])
    assert len(epochs_of[False][0]) == 1 and len(epochs_of[True][0]) == 4
    assert epochs_of[False][1] == epochs_of[True][1]  # stage 2 has its own as before


def test_one_model_for_all_categories_is_the_default(toy_root, tmp_path):
    request = dict(data_root=toy_root, preset="smoke", device="cpu", overrides={"stage2_images": 3, "mode": "global"})
    record = runs.run("mala", **request, out=tmp_path / "run")
    assert record["category"] == "all" and record["counts"]["train"] == 36
    assert list(record["metrics_by_category"]) == ["toy/weave", "toy/grain", "toy/gear"]
    model = make(**request["overrides"])
    images = data.load("toy", toy_root, "all", image_size=64).train
    model.prepare(images, CPU)
    assert Counter(images.categories[model.chosen[2]]) == {"toy/weave": 3, "toy/grain": 3, "toy/gear": 3}


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 9])
def test_a_run_broken_off_in_either_stage_ends_with_the_same_weights(stop, gears, tmp_path, monkeypatch):
    """Stage 1 has 2 x 2 steps, stage 2 has 2 x 3; it is saved after every step."""
    settings = dict(stage1_images=8, stage1_batch_size=4, stage2_images=9, batch_size=3)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    monkeypatch.setattr(training, "CHECK_STEPS", 1)

    def start(stop=None):
        model = make(**settings)  # sets the seed, as a run does
        model.prepare(gears.train, CPU)
        steps = iter(range(100))

        def watched(losses):
            def stopping(batch):
                if next(steps) == stop:
                    raise Stop
                return losses(batch)

            return stopping

        model.stage1_losses, model.stage2_losses = watched(model.stage1_losses), watched(model.stage2_losses)
        return model

    whole = start()
    history = train(whole, gears.train, 0, CPU, amp=False)
    with pytest.raises(Stop):
        train(start(stop), gears.train, 0, CPU, amp=False, state_path=tmp_path / "state.pt")
    again = start()
    resumed = train(again, gears.train, 0, CPU, amp=False, state_path=tmp_path / "state.pt")
    assert equal(state(whole), state(again))
    assert [(r["phase"], r["epoch"], r["l1"]) for r in resumed] == [(r["phase"], r["epoch"], r["l1"]) for r in history]
    assert [r["phase"] for r in history] == ["stage1"] * 2 + ["stage2"] * 2


def test_a_run_keeps_the_weights_after_stage_1(toy_root, tmp_path):
    runs.run("mala", data_root=toy_root, category="gear", preset="smoke", device="cpu", out=tmp_path)
    one, two = (state(runs.load_model(tmp_path, "cpu", phase)) for phase in ("stage1", None))
    moved = {k.split(".")[0] for k in one if not torch.equal(one[k], two[k])}
    assert moved == {"decoder", "tbm"}, "the encoder is frozen, PLPM is not used any more"
    with pytest.raises(UserError, match="checkpoint-stage3.safetensors does not exist"):
        runs.load_model(tmp_path, "cpu", "stage3")


# --- score ------------------------------------------------------------------------------------------------


def test_image_score_is_the_maximum_of_the_plain_mean_filter():
    torch.manual_seed(0)
    maps = torch.rand(3, 64, 64)
    expected = [uniform_filter(m, 5, mode="constant").max() for m in maps.numpy()]
    np.testing.assert_allclose(make().image_score(maps), expected, rtol=1e-5)
    assert torch.equal(make(window=1).image_score(maps), maps.amax((1, 2)))


def test_without_tbm_the_map_comes_from_the_decoder_alone(gears):
    model, images = make(tbm=False), gears.test.batch(range(3))["image"]
    assert isinstance(model.tbm, nn.Linear) and model.tbm.weight.shape == (2 * 16 * 16, 32)
    with torch.no_grad():
        decoded = model.decoder(model.tokens(images)[1])
        expected = unpatchify(model.tbm(decoded), (4, 4), 2).softmax(1)[:, 0]
        torch.testing.assert_close(model.anomaly_map(images), expected)


def test_the_other_pipeline_scores_the_error_of_the_reconstruction(gears):
    images = gears.test.batch(range(3))["image"]
    plain, complementary = (make(pipeline="recon", recon_passes=p) for p in ("unmasked", "complementary"))
    assert plain.tbm is None and [phase.name for phase in plain.phases()] == ["stage1"]
    with torch.no_grad():
        expected = (images - plain.reconstruct(images)).abs().mean(1)
        torch.testing.assert_close(plain.anomaly_map(images), expected)
        seen, tokens = [], complementary.tokens
        complementary.tokens = lambda images, visible: seen.append(visible) or tokens(images, visible)
        maps = complementary.anomaly_map(images)
        errors = [(images - complementary.reconstruct(images, v)).abs().mean(1) for v in seen[:4]]
        torch.testing.assert_close(maps, sum(errors) / 4)
        assert torch.equal(complementary.anomaly_map(images), maps)
    assert [v.shape for v in seen[:4]] == [(3, 4)] * 4
    assert all(sorted(torch.cat(seen[:4], 1)[b].tolist()) == list(range(16)) for b in range(3))


# --- weights ----------------------------------------------------------------------------------------------


def mae_file(path, decoder=True, grid=(4, 4), **wrapping):
    """A file with the names of MAE's visualisation checkpoints, of the sizes of the preset `smoke`."""
    torch.manual_seed(3)
    encoder = vit("test_vit", 64, "random")[0].state_dict()
    names = {k: v for k, v in encoder.items() if k.startswith(("cls_token", "patch_embed.proj", "blocks.", "norm."))}
    names["pos_embed"] = sincos(grid, 64)
    if decoder:
        blocks = make().decoder.blocks.state_dict()
        names |= {f"decoder_blocks.{k}": torch.randn_like(v) for k, v in blocks.items()}
        names |= {
            "mask_token": torch.randn(1, 1, 32),
            "decoder_pos_embed": sincos(grid, 32),
            "decoder_embed.weight": torch.randn(32, 64),
            "decoder_embed.bias": torch.randn(32),
            "decoder_norm.weight": torch.randn(32),
            "decoder_norm.bias": torch.randn(32),
            "decoder_pred.weight": torch.randn(16 * 16 * 3, 32),
            "decoder_pred.bias": torch.randn(16 * 16 * 3),
        }
    if path.suffix == ".pth":
        torch.save({"model": names} | wrapping, path)
    else:
        save_file({k: v.contiguous() for k, v in names.items()}, path)
    return names


@pytest.mark.parametrize("name", ["mae.pth", "mae.safetensors"])
@pytest.mark.parametrize("fill", ["zeros", "mask_token"])
def test_a_visualisation_checkpoint_fills_encoder_and_decoder(name, fill, tmp_path):
    names = mae_file(tmp_path / name)
    model = make(str(tmp_path / name), pretrained=True, mask_fill=fill)
    assert model.weights["source"] == f"file {name}" and len(model.weights["sha256"]) == 64
    encoder, decoder = model.encoder.state_dict(), model.decoder.state_dict()
    used = {k for k in names if not k.startswith(("decoder_", "mask_token"))}
    assert used == encoder.keys() and all(torch.equal(encoder[k], names[k]) for k in used)
    for k, v in names.items():
        if k.startswith("decoder_"):
            assert torch.equal(decoder.pop(k.removeprefix("decoder_")), v)
    assert decoder.keys() == ({"mask_token"} if fill == "mask_token" else set())
    if fill == "mask_token":
        assert torch.equal(decoder["mask_token"], names["mask_token"])


def test_a_checkpoint_of_another_size_is_resampled(tmp_path):
    mae_file(tmp_path / "mae.pth", grid=(6, 6))
    model = make(tmp_path / "mae.pth", pretrained=True)
    assert model.encoder.pos_embed.shape == (1, 17, 64) and model.decoder.pos_embed.shape == (1, 17, 32)
    table = model.decoder.pos_embed[0, 1:].view(4, 4, 32)
    assert table[0, 0, 0] < table[0, 1, 0] and not table[0, 0].equal(table[1, 0])


def test_a_file_without_decoder_leaves_it_random_and_says_so(tmp_path):
    names = mae_file(tmp_path / "mae.safetensors", decoder=False)
    model, untrained = make(tmp_path / "mae.safetensors", pretrained=True), make()
    assert model.weights["source"] == "file mae.safetensors, decoder random"
    assert torch.equal(model.encoder.norm.weight, names["norm.weight"])
    assert equal(state(model.decoder), state(untrained.decoder))
    assert untrained.weights == {"source": "random"}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda names: names.pop("blocks.3.norm1.weight"), "does not fit: Missing key.*encoder.blocks.3.norm1.weight"),
        (lambda names: names.update(surplus=torch.ones(1)), "does not fit: Unexpected key.*encoder.surplus"),
        (
            lambda names: names.update(cls_token=torch.ones(1, 1, 7)),
            "does not fit: size mismatch for encoder.cls_token",
        ),
        (lambda names: names.pop("decoder_pred.bias"), "does not fit: Missing key.*decoder.pred.bias"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(spoil, message, tmp_path):
    path = tmp_path / "mae.pth"
    names = mae_file(path)
    spoil(names)
    torch.save({"model": names}, path)
    with pytest.raises(UserError, match=message):
        make(path, pretrained=True)


def test_nothing_is_ever_unpickled(tmp_path):
    path = tmp_path / "mae.pth"
    mae_file(path, args=argparse.Namespace(lr=1))
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        load_mae(make(), path)
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        load_mae(make(), path)
    with pytest.raises(UserError, match="weights file .* does not exist"):
        load_mae(make(), tmp_path / "none.pth")
    with pytest.raises(UserError, match="weights file .* does not exist"):
        load_mae(make(), tmp_path / "none.safetensors")


def test_a_run_with_given_weights_says_so_in_its_record(toy_root, tmp_path):
    mae_file(tmp_path / "mae.pth")
    options = dict(data_root=toy_root, preset="smoke", device="cpu", weights=tmp_path / "mae.pth")
    said = []
    record = runs.run("mala", overrides={"pretrained": True}, out=tmp_path / "run", say=said.append, **options)
    assert record["weights"]["source"] == "file mae.pth" and "weights: file mae.pth" in said
    with pytest.raises(UserError, match="would not be used.*pretrained=true"):
        runs.run("mala", out=tmp_path / "other", **options)
    model = runs.load_model(tmp_path / "run")
    batch = data.load("toy", toy_root, "all", image_size=64).test.batch(range(3))["image"]
    maps = runs.read_maps(tmp_path / "run")["maps"]
    with torch.no_grad():
        np.testing.assert_allclose(model.anomaly_map(batch), maps[:3], atol=1e-5)


# --- settings ---------------------------------------------------------------------------------------------


def test_paper_preset_is_section_4_c():
    paper = resolve(mala.Settings, mala.PRESETS, "paper")
    assert (paper.image_size, paper.decoder_width, paper.decoder_depth, paper.mask_ratio) == (224, 512, 8, 0.75)
    assert (paper.stage1_images, paper.stage1_epochs, paper.stage1_batch_size, paper.stage1_lr) == (
        200,
        2000,
        128,
        1e-3,
    )
    assert (paper.stage2_images, paper.epochs, paper.batch_size, paper.damage) == (80, 700, 32, 64 / 80)
    assert (paper.betas, paper.weight_decay, paper.mask_fill, paper.pretrained) == ((0.9, 0.95), 0.05, "zeros", True)


def test_small_is_the_paper_with_a_smaller_encoder_and_fewer_epochs():
    small = resolve(mala.Settings, mala.PRESETS, "small", {"pretrained": False})
    model = mala.Model(small)
    assert (len(model.encoder.blocks), model.encoder.embed_dim, model.grid) == (12, 768, (14, 14))
    stage1, stage2 = model.phases()
    assert (stage1.epochs, stage2.epochs) == (100, 50)
    assert all(p.requires_grad for name, p in model.encoder.named_parameters() if name != "pos_embed")
    changed = {"encoder": small.encoder, "stage1_epochs": 100, "epochs": 50, "pretrained": False}
    assert small == resolve(mala.Settings, mala.PRESETS, "paper", changed)


def test_variants_differ_in_one_part_each():
    kinds = {name: make(**switches) for name, switches in mala.VARIANTS.items()}
    stages = {name: [phase.name for phase in model.phases()] for name, model in kinds.items()}
    assert stages == {
        "full": ["stage1", "stage2"],
        "recon": ["stage1"],
        "no_stage1": ["stage2"],
        "no_plpm": ["stage1", "stage2"],
        "no_tbm": ["stage1", "stage2"],
    }
    assert [name for name, model in kinds.items() if model.plpm is None] == ["no_stage1", "no_plpm"]
    assert [name for name, model in kinds.items() if not isinstance(model.tbm, TokenBalance)] == ["recon", "no_tbm"]
    first = state(kinds["full"].encoder)
    assert all(equal(first, state(model.encoder)) for model in kinds.values())


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"pipeline": "recon", "stage1": False}, "nothing would ever be trained"),
        ({"damage": 0}, "damage=0 leaves stage 2 nothing"),
        ({"alpha": "1,1"}, r"alpha=\(1.0, 1.0\): give 3 numbers"),
        ({"beta": "1"}, r"beta=\(1.0,\): give 2 numbers"),
        ({"betas": "0.9,1"}, "below 1"),
        ({"mask_ratio": 1}, "mask_ratio=1.0 has to be below 1"),
        ({"warm_up": 1}, "warm_up=1.0 has to be below 1"),
        ({"stage1_epochs": 0}, "stage1_epochs=0 has to be at least 1"),
        ({"stage1_batch_size": 0}, "stage1_batch_size=0 has to be at least 1"),
        ({"decoder_heads": 3}, "decoder_width=32 has to be a multiple of 4 and of decoder_heads=3"),
        ({"decoder_heads": 0}, "decoder_heads=0"),
        ({"decoder_width": 34}, "decoder_width=34 has to be a multiple of 4"),
        ({"plpm_channels": ""}, "plpm_channels is empty"),
        ({"window": 4}, "window=4: give an odd number"),
        ({"depth": 0}, "depth=0: test_vit has 1 to 6 blocks"),
        ({"depth": 7}, "depth=7: test_vit has 1 to 6 blocks"),
        ({"encoder": "vit_small_patch14_reg4_dinov2", "image_size": 70}, "more or fewer than one token"),
    ],
)
def test_unusable_settings_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        make(**overrides)
