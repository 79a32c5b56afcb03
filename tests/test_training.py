"""The training loop: what it feeds, when it stops, what it keeps, and that nothing is lost when it is broken off."""

import math

import pytest
import torch
from helpers import CPU, Watched, equal, state
from torch import nn

from vitad import data, training
from vitad.errors import UserError
from vitad.methods import anovit
from vitad.methods.rivals import l2cae
from vitad.settings import resolve
from vitad.training import Phase, autocast, train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


@pytest.fixture(scope="module")
def images(toy_root):
    """Twelve pictures of gears, 16 px."""
    return data.load("toy", toy_root, "gear", image_size=16).train


class Net(nn.Module):
    """A small autoencoder whose outcome depends on dropout, batch statistics and the order of the images."""

    settings = "settings of Net"

    def __init__(self, *phases, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.ConvTranspose2d(4, 3, 4, 2, 1)
        self.stages = phases or [options]
        self.calls = 0

    def losses(self, batch):
        self.calls += self.training
        x = batch["image"]
        error = (self.head(self.body(x)) - x).square().mean()
        return {"error": error, "size": 1e-3 * self.head.weight.square().sum()}

    def phases(self):
        defaults = dict(epochs=3, batch_size=4, lr=0.01)
        return [
            Phase(f"phase {n}", [p for p in self.parameters() if p.requires_grad], **defaults | options)
            for n, options in enumerate(self.stages, 1)
        ]


# --- what is fed ------------------------------------------------------------------------------------------


def test_every_epoch_shows_each_image_once_in_another_order(images):
    watched = Watched(images)
    train(Net(epochs=3, batch_size=5), watched, 0, CPU)
    assert list(map(len, watched.requested)) == [5, 5, 2] * 3
    epochs = [sum(watched.requested[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    again, other = Watched(images), Watched(images)
    train(Net(epochs=3, batch_size=5), again, 0, CPU)
    train(Net(epochs=3, batch_size=5), other, 1, CPU)
    assert again.requested == watched.requested != other.requested


def test_held_out_images_are_never_trained_on(images):
    watched = Watched(images)
    history = train(Net(epochs=2, batch_size=3, val_fraction=0.3), watched, 0, CPU)
    fit, val = watched.requested[:3], watched.requested[3:5]  # ceil(0.3 * 12) = 4 are held out
    assert sorted(sum(fit + val, [])) == list(range(12)) and len(sum(val, [])) == 4
    assert watched.requested[8:] == val and sorted(sum(watched.requested[5:8], [])) == sorted(sum(fit, []))
    assert all(math.isfinite(row["val"]) for row in history)
    other = Watched(images)
    train(Net(epochs=1, batch_size=3, val_fraction=0.3), other, 1, CPU)
    assert sorted(sum(other.requested[3:], [])) != sorted(sum(val, []))


def test_something_has_to_be_left_for_training(images):
    with pytest.raises(UserError, match="val_fraction=0.95 leaves none of 12 images for training"):
        train(Net(val_fraction=0.95), images, 0, CPU)


# --- what comes out ---------------------------------------------------------------------------------------


def test_history_has_a_row_an_epoch(images):
    history = train(Net({"epochs": 2}, {"epochs": 1, "val_fraction": 0.2}), images, 0, CPU)
    assert [(row["phase"], row["epoch"]) for row in history] == [("phase 1", 1), ("phase 1", 2), ("phase 2", 1)]
    assert list(history[0]) == ["phase", "epoch", "error", "size", "seconds"]
    assert list(history[2]) == ["phase", "epoch", "error", "size", "val", "seconds"]
    seconds = [row["seconds"] for row in history]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_the_row_holds_the_mean_of_the_losses(images):
    model, seen = Net(epochs=1, batch_size=4), []
    losses = model.losses

    def watched(batch):
        seen.append(losses(batch))
        return seen[-1]

    model.losses = watched
    (row,) = train(model, images, 0, CPU)
    for name in ("error", "size"):
        assert row[name] == pytest.approx(sum(s[name].item() for s in seen) / 3)


@pytest.mark.parametrize("method", [anovit, l2cae])
def test_the_loss_falls(method, toy_root):
    overrides = {"epochs": 12, "batch_size": 4, "lr": 1e-3}
    settings = resolve(method.Settings, method.PRESETS, "smoke", overrides)
    images = data.load("toy", toy_root, "gear", image_size=settings.image_size).train
    torch.manual_seed(0)
    history = train(method.Model(settings), images, 0, CPU, amp=False)
    assert history[-1]["mse"] < 0.6 * history[0]["mse"]


def test_a_frozen_encoder_stays_as_it_is(toy_root):
    settings = resolve(
        anovit.Settings, anovit.PRESETS, "smoke", {"image_size": 32, "freeze_encoder": True, "epochs": 1, "lr": 0.01}
    )
    model = anovit.Model(settings)
    (phase,) = model.phases()
    assert {id(p) for p in phase.parameters} == {id(p) for p in model.decoder.parameters()}
    modes = []
    model.encoder.blocks[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    before = state(model)
    train(model, data.load("toy", toy_root, "gear", image_size=32).train, 0, CPU, amp=False)
    after = state(model)
    assert modes and not any(modes)
    assert all(p.grad is None for p in model.encoder.parameters())
    for name in before:
        if name.startswith("encoder."):
            assert torch.equal(before[name], after[name])
    assert not torch.equal(before["decoder.0.weight"], after["decoder.0.weight"])


def test_the_same_seed_gives_the_same_weights(images):
    results = []
    for seed in (5, 5, 6):
        model = Net()
        train(model, images, seed, CPU)
        results.append(state(model))
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


# --- settings of a phase ----------------------------------------------------------------------------------


class Spy(torch.optim.Adam):
    """Adam that notes its options and the norm of every gradient."""

    made = []

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.options, self.norms = options, []
        Spy.made.append(self)

    def step(self):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        self.norms.append(float(torch.stack(grads).norm()))
        super().step()


def test_the_optimiser_gets_what_the_phase_says(images):
    Spy.made.clear()
    first = dict(optimizer=Spy, epochs=1, lr=0.25, betas=(0.5, 0.6), weight_decay=0.125)
    train(Net(first, dict(optimizer=Spy, epochs=1)), images, 0, CPU)
    assert [spy.options for spy in Spy.made] == [
        {"lr": 0.25, "betas": (0.5, 0.6), "weight_decay": 0.125},
        {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.0},
    ]


def test_what_has_one_dimension_decays_only_where_asked(images):
    """MAE's code lets neither biases nor the weights of norms decay."""
    Spy.made.clear()
    both = dict(optimizer=Spy, epochs=1, weight_decay=0.125)
    train(Net(both, both | {"decay_vectors": False}), images, 0, CPU)
    (everything,), (matrices, vectors) = (spy.param_groups for spy in Spy.made)
    assert everything["weight_decay"] == matrices["weight_decay"] == 0.125 and vectors["weight_decay"] == 0
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(everything["params"])
    assert matrices["params"] and vectors["params"] and matrices["lr"] == vectors["lr"]


def test_gradients_are_clipped_where_asked(images):
    Spy.made.clear()
    train(Net(dict(optimizer=Spy, epochs=1), dict(optimizer=Spy, epochs=1, clip=0.01)), images, 0, CPU)
    free, clipped = (spy.norms for spy in Spy.made)
    assert min(free) > 0.02
    assert clipped == pytest.approx([0.01] * len(clipped), rel=1e-3)


def test_the_learning_rate_follows_the_schedule(images):
    """Of 4 epochs of 3 steps, a quarter warms up."""
    rates = []

    class Rates(torch.optim.SGD):
        def __init__(self, parameters, lr, betas, weight_decay):
            super().__init__(parameters, lr=lr, weight_decay=weight_decay)

        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    train(Net(optimizer=Rates, epochs=4, lr=0.5, schedule=training.warm_up_then_cosine(0.25)), images, 0, CPU)
    assert rates[:3] == pytest.approx([0.5 / 3, 1 / 3, 0.5])
    cosine = [0.25 + 0.25 * math.cos(math.pi * n / 9) for n in range(1, 10)]
    assert rates[3:] == pytest.approx(cosine) and rates[-1] < 1e-9
    to_a_tenth = training.warm_up_then_cosine(0.25, 0.1)
    assert [to_a_tenth(done) for done in (0.125, 0.25, 0.625, 1)] == pytest.approx([0.5, 1, 0.55, 0.1])


class Scripted(nn.Module):
    """Its validation loss follows a script; `age` counts the epochs it was trained for."""

    settings = "settings of Scripted"

    def __init__(self, script, patience):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("age", torch.zeros((), dtype=torch.long))
        self.script, self.patience = script, patience

    def losses(self, batch):
        if self.training:
            self.age += 1
            return {"loss": self.weight.square()}
        return {"loss": torch.tensor(self.script[int(self.age) - 1])}

    def phases(self):
        return [
            Phase("p", [self.weight], len(self.script), 12, 0.1, val_fraction=0.1, patience=self.patience),
        ]


@pytest.mark.parametrize(
    "script, patience, epochs, best",
    [
        ([5.0, 4.0, 3.0, 3.5, 3.25, 1.0], 2, 5, 3),
        ([5.0, 4.0, 3.0, 3.5, 3.25, 1.0], 3, 6, 6),
        ([5.0, 4.0, 4.5, 3.0, 3.5, 3.25], 2, 6, 4),
        ([5.0, 5.0, 5.0, 5.0], 1, 2, 1),  # a tie is no progress
        ([5.0, 4.0, 6.0, 7.0], None, 4, 2),
    ],
)
def test_stops_without_progress_and_keeps_the_best_epoch(images, script, patience, epochs, best):
    model = Scripted(script, patience)
    history = train(model, images, 0, CPU)
    assert [row["val"] for row in history] == script[:epochs]
    assert model.age == best


# --- losses that are not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_loss_that_is_not_finite_stops_with_step_and_settings(images, step, monkeypatch):
    monkeypatch.setattr(training, "CHECK_STEPS", 2)
    model = Net(epochs=3, batch_size=4)
    losses = model.losses

    def broken(batch):
        found = losses(batch)
        return found | {"size": found["size"] * math.nan} if model.calls == 3 + step else found

    model.losses = broken
    with pytest.raises(UserError, match=f"not finite at phase phase 1, epoch 2, step {step}, with settings of Net"):
        train(model, images, 0, CPU)


def test_a_huge_learning_rate_stops_before_anything_is_kept(toy_root, tmp_path):
    settings = resolve(anovit.Settings, anovit.PRESETS, "smoke", {"image_size": 32, "lr": 1e30})
    images = data.load("toy", toy_root, "gear", image_size=32).train
    with pytest.raises(UserError, match=r"not finite at phase train, epoch \d.*lr=1e\+30.*A smaller lr"):
        train(anovit.Model(settings), images, 0, CPU, state_path=tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())


def test_a_validation_loss_that_is_not_finite_stops_too(images):
    with pytest.raises(UserError, match="validation loss is not finite at phase p, epoch 2, with settings of Scripted"):
        train(Scripted([3.0, math.nan, 1.0], None), images, 0, CPU)


# --- broken off and started again -------------------------------------------------------------------------

STAGES = (
    {"epochs": 2, "val_fraction": 0.2},
    {"epochs": 2, "lr": 0.003, "clip": 0.5, "schedule": training.warm_up_then_cosine(0.3)},
)
STEPS = 2 * 3 + 2 * 3


@pytest.fixture
def save_always(monkeypatch):
    """Checked and saved after every step."""
    monkeypatch.setattr(training, "CHECK_STEPS", 1)
    if_due = training._Saver.if_due

    def always(self, *parts):
        self.last, self.took = -math.inf, 0
        if_due(self, *parts)

    monkeypatch.setattr(training._Saver, "if_due", always)


@pytest.mark.parametrize("device", DEVICES)
def test_broken_off_at_any_step_it_ends_with_the_same_weights(images, tmp_path, save_always, device):
    device = torch.device(device)
    unbroken = Net(*STAGES).to(device)
    history = train(unbroken, images, 3, device)
    assert unbroken.calls == STEPS

    for stop in range(1, STEPS + 1):
        path = tmp_path / f"{stop}.pt"
        model = Net(*STAGES).to(device)
        losses = model.losses

        def breaking(batch, model=model, losses=losses, stop=stop):
            if model.training and model.calls == stop - 1:
                raise KeyboardInterrupt
            return losses(batch)

        model.losses = breaking
        with pytest.raises(KeyboardInterrupt):
            train(model, images, 3, device, state_path=path)
        assert path.exists() == (stop > 1)

        again = Net(*STAGES).to(device)
        torch.manual_seed(99)  # whatever was drawn before it, a step draws the same
        resumed = train(again, images, 3, device, state_path=path)
        assert equal(state(again), state(unbroken)), f"broken off before step {stop}"
        assert again.calls == STEPS - (stop - 1), "steps were repeated"
        for row, expected in zip(resumed, history, strict=True):
            assert row | {"seconds": 0} == expected | {"seconds": 0}


def test_a_state_of_an_earlier_version_is_resumed(images, tmp_path, save_always):
    """The names in the saved state stay as they are: 'at' holds how far the training had come."""
    unbroken = Net(*STAGES)
    train(unbroken, images, 3, CPU, state_path=tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved.keys() == {"at", "model", "optimizer"}
    assert saved["at"].keys() == {"phase", "epoch", "step", "losses", "best", "history", "seconds"}
    again = Net(*STAGES)
    train(again, images, 3, CPU, state_path=tmp_path / "state.pt")
    assert equal(state(again), state(unbroken)) and again.calls == 0
    torch.save(saved | {"at": saved["at"] | {"of another version": 1}}, tmp_path / "state.pt")
    with pytest.raises(TypeError, match="of another version"):
        train(Net(*STAGES), images, 3, CPU, state_path=tmp_path / "state.pt")


def test_patience_and_the_best_epoch_survive(images, tmp_path, save_always):
    script = [5.0, 3.0, 4.0, 4.5, 1.0]
    for stop in range(1, 5):
        path = tmp_path / f"{stop}.pt"
        model = Scripted(script, 2)
        phases = model.phases

        def cut(phases=phases, stop=stop):
            (phase,) = phases()
            return [Phase(**vars(phase) | {"epochs": stop})]

        model.phases = cut
        train(model, images, 0, CPU, state_path=path)
        again = Scripted(script, 2)
        history = train(again, images, 0, CPU, state_path=path)
        assert [row["val"] for row in history] == script[:4] and again.age == 2


def test_the_state_is_saved_now_and_then_and_whole(images, tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    train(Net(), images, 0, CPU, state_path=path)
    assert not path.exists()  # shorter than half a minute
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    train(Net(), images, 0, CPU, state_path=path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    before = path.read_bytes()

    def full(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*state.pt: No space left"):
        train(Net(epochs=9), images, 0, CPU, state_path=path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


# --- half precision ---------------------------------------------------------------------------------------


def test_autocast_where_it_is_asked_for_and_helps(monkeypatch):
    x = torch.ones(2, 2)
    for gains, enabled, dtype in [
        (True, True, torch.bfloat16),
        (True, False, torch.float32),
        (False, True, torch.float32),
    ]:
        monkeypatch.setattr(training, "_cpu_gains_from_bfloat16", lambda gains=gains: gains)
        with autocast(CPU, enabled):
            assert (x @ x).dtype == dtype
