"""What a switch changes, and that it changes nothing else: weights, images, order and all other draws are shared."""

from dataclasses import fields, replace
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from helpers import CPU, equal, state
from torch import nn

from vitad import data, methods, training
from vitad.methods import METHODS, anovit, mala, ssltok, vitmem
from vitad.methods.rivals import dinomaly, draem, fanogan, psvdd, uniad, vtadl
from vitad.randomness import generator, next_seed, seed_of, seeded
from vitad.settings import resolve
from vitad.training import Phase, train

# Not all of the twelve images, and several steps, so that a draw that moves is seen.
BASE = {
    "anovit": {"batch_size": 5},
    "vitmem": {"batch_size": 5},
    "mala": {"stage1_images": 8, "stage2_images": 9, "stage1_batch_size": 3, "batch_size": 4},
    "ssltok": {"batch_size": 5, "pool": 2},
    "l2cae": {"batch_size": 5},
    "aessim": {"batch_size": 5},
    "vae": {"batch_size": 5},
    "mkd": {"batch_size": 5},
    "dfr": {"batch_size": 5},
    "cflow": {"batch_size": 5},
    "patchknn": {"bank_size": 50},
    "padim": {},
    "dinomaly": {"batch_size": 5},
    "draem": {"batch_size": 5},
    "uniad": {"batch_size": 5},
    "psvdd": {"batch_size": 5},
    "vtadl": {"batch_size": 5},
    "fanogan": {"batch_size": 5},
}
CNNS = ("padim", "mkd", "dfr", "cflow", "uniad")  # whose backbone is no ViT

# Parts and draws that a switch adds, takes away or makes anew. A switch that is not named here does so with none.
CHANGES = {
    "anovit pretrained=True": {"encoder"},
    "vitmem pretrained=True": {"encoder"},
    "vitmem memory=False": {"memory"},
    "vitmem coord_att=False": {"coord_att"},
    "vitmem decoder=exact": {"decoder"},
    "vitmem base": {"memory", "coord_att"},
    "vitmem base_m": {"coord_att"},
    "vitmem base_ca": {"memory"},
    "mala pretrained=True": {"encoder"},
    "mala pipeline=recon": {"tbm", "stage2 order", "stage2 damage"},
    "mala recon": {"tbm", "stage2 order", "stage2 damage"},
    "mala stage1=False": {"plpm", "stage1 order", "stage1 visible"},
    "mala no_stage1": {"plpm", "stage1 order", "stage1 visible"},
    "mala resample_each_epoch=True": {"stage1 order"},
    "mala plpm=off": {"plpm"},
    "mala no_plpm": {"plpm"},
    "mala tbm=False": {"tbm"},
    "mala no_tbm": {"tbm"},
    "mala mode=global": {"stage2 damage"},
    "mala mode=local": {"stage2 damage"},
    "ssltok pretrained=True": {"tokenizer", "bank"},
    "ssltok mode=local": {"train damage"},
    "ssltok mode=global": {"train damage"},
    "ssltok remember=False": {"bank"},
    "ssltok no_mem": {"bank"},
    "ssltok reconstruct=False": {"reconstruction", "train masked", "train dropout"},
    "ssltok no_rec": {"reconstruction", "train masked", "train dropout"},
    "ssltok segment=False": {"segmentation"},
    "ssltok no_seg": {"segmentation"},
    "ssltok no_mask": {"train masked"},
    "ssltok no_synth": {"segmentation", "train damage"},
    "mkd pretrained=True": {"source"},
    "dfr pretrained=True": {"backbone"},
    "cflow pretrained=True": {"backbone"},
    "patchknn pretrained=True": {"backbone", "bank"},
    "padim pretrained=True": {"backbone"},
    "dinomaly pretrained=True": {"backbone"},
    "dinomaly no_dropout": {"train dropout"},
    "uniad pretrained=True": {"backbone"},
    "uniad no_jitter": {"train jitter"},
    "vtadl no_noise": {"train noise"},
    "draem sspcab": {"sspcab"},
    "draem sspcab=True": {"sspcab"},
    "patchknn sampling=coreset": {"bank"},
    "patchknn rotations": {"bank"},
    "patchknn rotations_x8": {"bank"},
    "patchknn large": {"backbone", "bank"},  # random weights are drawn after those of the places, which are more
}


def switches(name):
    """(label, overrides) of the variants of a method, and of every other value of its settings that are a choice."""
    module = methods.get(name)
    usual, types = resolve(module.Settings, module.PRESETS, "smoke", BASE[name]), get_type_hints(module.Settings)
    found = dict(module.VARIANTS)
    for field in fields(module.Settings):
        values = get_args(types[field.name]) if get_origin(types[field.name]) is Literal else ()
        for value in (False, True) if types[field.name] is bool else values:
            if value != getattr(usual, field.name) and field.name != "amp":
                found[f"{field.name}={value}"] = {field.name: value}
    return found.items()


CASES = {f"{name} {label}": (name, overrides) for name in METHODS for label, overrides in switches(name)}


@pytest.fixture(scope="module")
def traced(toy_root, weights, cnn_weights):
    """A function: the weights that a model of a method starts from, and all that is drawn when it is trained."""
    load = cache(lambda size: data.load("toy", toy_root, "gear", image_size=size).train)

    @cache
    def trace(name, overrides=(), seed=0):
        model = make(name, seed, cnn_weights if name in CNNS else weights, **dict(overrides))
        found = {part: state(module) for part, module in model.named_children() if state(module)}
        images = load(model.settings.image_size)
        model.prepare(images, CPU)
        if name in ("patchknn", "ssltok"):
            found["bank"] = {"chosen": model.bank}
        drawn = watched(model)
        train(model, images, seed, CPU, amp=False)
        return found | {purpose: {str(i): draw for i, draw in enumerate(draws)} for purpose, draws in drawn.items()}

    return trace


def make(name, seed=0, weights="auto", **overrides):
    """A model as a run makes it: torch is seeded, then the model is made."""
    module = methods.get(name)
    settings = resolve(module.Settings, module.PRESETS, "smoke", BASE[name] | overrides)
    torch.manual_seed(seed)
    return module.Model(settings, weights)


def watched(model):
    """{"<phase> <purpose>": draws}, which fills up while the model is trained."""
    drawn, phases, at = {}, model.phases, []

    def note(purpose, draw):
        drawn.setdefault(f"{at[-1]} {purpose}", []).append(draw.clone())

    def noting(function, purpose, chosen):
        def noted(*arguments):
            result = function(*arguments)
            note(purpose, chosen(result))
            return result

        return noted

    def with_order(phase):
        losses = phase.losses or model.losses

        def noted(batch):
            at.append(phase.name)
            if model.training:
                note("order", batch["index"])
            return losses(batch)

        return replace(phase, losses=noted)

    model.phases = lambda: [with_order(phase) for phase in phases()]
    if isinstance(model, mala.Model):
        model.random_visible = noting(model.random_visible, "visible", lambda visible: visible)
    if isinstance(model, (mala.Model, draem.Model)):
        model.damaged = noting(model.damaged, "damage", lambda damaged: damaged["mask"])
    if isinstance(model, ssltok.Model):
        model.pairs = noting(model.pairs, "damage", lambda pairs: pairs[3])
        if R := model.reconstruction:
            R.register_forward_pre_hook(lambda _, arguments: note("masked", arguments[1]))
            R.dropout.register_forward_hook(lambda _, __, tokens: note("dropout", tokens == 0))
    if isinstance(model, uniad.Model):
        model.noise = noting(model.noise, "jitter", lambda noise: noise)
    if isinstance(model, psvdd.Model):
        model.draws = noting(model.draws, "patches", lambda draws: draws[0])
        model.draws = noting(model.draws, "colours", lambda draws: draws[1])
    if isinstance(model, vtadl.Model):
        model.noise = noting(model.noise, "noise", lambda noise: noise)
    if isinstance(model, fanogan.Model):
        model.latent = noting(model.latent, "latent", lambda z: z)
    if isinstance(model, dinomaly.Model):
        model.bottleneck[0].register_forward_hook(lambda _, __, tokens: note("dropout", tokens == 0))
    return drawn


def changed(one, other):
    """Names of what is in one trace only, or differs in what both have: layers of the same shape, or draws."""

    def same(name):
        a, b = one.get(name, {}), other.get(name, {})
        both = a.keys() & b.keys()
        reshaped = {key.rpartition(".")[0] for key in both if a[key].shape != b[key].shape}  # layers
        shared = [key for key in both if key.rpartition(".")[0] not in reshaped]
        return shared and all(torch.equal(a[key], b[key]) for key in shared)

    return {name for name in one.keys() | other.keys() if not same(name)}


# --- variants -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_switch_changes_what_it_names_and_nothing_else(case, traced):
    name, overrides = CASES[case]
    assert changed(traced(name), traced(name, tuple(overrides.items()))) == CHANGES.get(case, set())


def test_every_switch_that_changes_something_exists():
    assert CHANGES.keys() <= CASES.keys()


@pytest.mark.parametrize("name", METHODS)
def test_another_seed_changes_everything(name, traced):
    assert changed(traced(name), traced(name, seed=1)) == traced(name).keys()


def test_all_draws_of_a_training_are_watched(traced):
    steps = {name: {purpose: len(draws) for purpose, draws in traced(name).items() if " " in purpose} for name in BASE}
    assert steps == {
        "anovit": {"train order": 2},  # two of twelve images are held out
        "vitmem": {"train order": 3},
        "mala": {"stage1 order": 6, "stage1 visible": 6, "stage2 order": 6, "stage2 damage": 6},
        "ssltok": {"train order": 6, "train damage": 6, "train masked": 6, "train dropout": 6},
        "l2cae": {"train order": 6},
        "aessim": {"train order": 6},
        "vae": {"train order": 6},
        "mkd": {"train order": 6},
        "dfr": {"train order": 6},
        "cflow": {"train order": 6},
        "patchknn": {},
        "padim": {},
        "dinomaly": {"train order": 3, "train dropout": 3},
        "draem": {"train order": 18, "train damage": 18},
        "uniad": {"train order": 6, "train jitter": 6},
        "psvdd": {"train order": 6, "train patches": 12, "train colours": 12},
        "vtadl": {"train order": 6, "train noise": 6},
        "fanogan": {"gan order": 9, "gan latent": 9, "encoder order": 6},
    }
    for name in ("mala", "ssltok"):
        for purpose, draws in traced(name).items():
            if " " in purpose:
                assert len({draw.numpy().tobytes() for draw in draws.values()}) > 4, (
                    f"{purpose} is the same in each step"
                )


# --- parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [anovit, vitmem, mala, ssltok])
def test_what_a_part_draws_for_its_weights_is_no_matter_to_the_others(module, monkeypatch):
    name = module.__name__.rpartition(".")[2]
    usual, vit = make(name), module.vit

    def wasteful(*arguments, **options):
        torch.rand(1000)
        made = vit(*arguments, **options)
        torch.rand(1000)
        return made

    monkeypatch.setattr(module, "vit", wasteful)
    other = make(name)
    assert other.seed == usual.seed
    differing = {
        key.split(".")[0] for key, tensor in state(usual).items() if not torch.equal(tensor, state(other)[key])
    }
    assert differing == {"tokenizer" if name == "ssltok" else "encoder"}


def test_parts_can_be_made_in_any_order():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    made = []
    for order in (("encoder", "decoder"), ("decoder", "encoder")):
        parts = {}
        for part in order:
            with seeded(7, part):
                parts[part] = nn.Linear(3, 4)
        made.append({part: state(module) for part, module in parts.items()})
    assert all(equal(made[0][part], made[1][part]) for part in made[0])
    assert not torch.equal(made[0]["encoder"]["weight"], made[0]["decoder"]["weight"])
    assert torch.equal(torch.get_rng_state(), before) and torch.initial_seed() == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_model_made_twice_with_one_seed_has_equal_weights(name):
    assert equal(state(make(name)), state(make(name)))


# --- seeds --------------------------------------------------------------------------------------------------


def test_each_purpose_has_a_seed_of_its_own():
    words = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", "0"), (0, "a", 1, 2), (0, "a", 12)]
    assert len({seed_of(*word) for word in words}) == len(words)
    assert all(0 <= seed_of(*word) < 2**64 for word in words)
    assert torch.equal(torch.rand(3, generator=generator(0, "a")), torch.rand(3, generator=generator(0, "a")))


def test_the_next_seed_follows_the_state_of_torch():
    torch.manual_seed(3)
    first, second = next_seed(), next_seed()
    torch.manual_seed(3)
    assert first == next_seed() != second


# --- training -----------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A number that is pulled to random ones, and that draws more or fewer of them where it is validated."""

    settings = "settings of Noisy"

    def __init__(self, n_in_validation):
        super().__init__()
        self.x, self.n, self.validated = nn.Parameter(torch.zeros(())), n_in_validation, []

    def losses(self, batch):
        if not self.training:
            self.validated.append(torch.rand(self.n)[0].item())
        return {"error": (self.x - torch.rand(())).square()}

    def phases(self):
        return [Phase("only", [self.x], 3, 4, 0.1, val_fraction=0.25)]


def test_validation_does_not_disturb_the_training(gears):
    few, many = Noisy(1), Noisy(99)
    errors = [[row["error"] for row in train(model, gears.train, 0, CPU, amp=False)] for model in (few, many)]
    assert errors[0] == errors[1]
    assert few.validated == [few.validated[0]] * 3, "each epoch is validated with the same draws"


@pytest.mark.parametrize("name", ["mala", "ssltok"])
@pytest.mark.parametrize("stop", [2, 5, 8])
def test_a_resumed_run_draws_what_an_unbroken_one_does(name, stop, gears, tmp_path, monkeypatch):
    """The resumed one starts from another state of torch, and draws nothing for the steps that are done."""
    monkeypatch.setattr(training, "CHECK_STEPS", 1)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    overrides = {"epochs": 3, "min_steps": 0} if name == "ssltok" else {}

    def run(state_path=None, stop=None):
        model = make(name, **overrides)
        model.prepare(gears.train, CPU)
        drawn, step = watched(model), training._check_finite
        torch.manual_seed(99)
        left = iter(range(stop or 1000))

        def check(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            step(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(training, "_check_finite", check)
            train(model, gears.train, 3, CPU, amp=False, state_path=state_path)
        return state(model), drawn

    weights, drawn = run()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state.pt", stop)
    resumed, rest = run(tmp_path / "state.pt")
    assert equal(resumed, weights)
    for purpose, draws in rest.items():
        assert all(torch.equal(a, b) for a, b in zip(draws, drawn[purpose][-len(draws) :], strict=True))
    assert sum(map(len, rest.values())) < sum(map(len, drawn.values()))
