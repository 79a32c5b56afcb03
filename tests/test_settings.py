"""Settings are checked against their fields and types before anything runs."""

import doctest
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Literal

import pytest

from vitad import errors, methods
from vitad import settings as settings_module
from vitad.errors import UserError
from vitad.settings import as_json, parse_overrides, resolve


@dataclass(frozen=True)
class Settings:
    whole: int = 3
    real: float = 0.5
    flag: bool = False
    text: str = "a"
    choice: Literal["one", "two"] = "one"
    sizes: tuple[int, ...] = (1, 2)
    limit: float | None = None
    image_size: int = 64
    epochs: int = 2
    batch_size: int = 8
    val_fraction: float = 0.1


PRESETS = {"plain": {}, "other": {"whole": 7, "text": "b"}}


def settings(**overrides):
    """Settings of the preset `plain`."""
    return resolve(Settings, PRESETS, "plain", overrides)


@pytest.mark.parametrize(
    "key, given, value",
    [
        ("whole", 4, 4),
        ("whole", "4", 4),
        ("whole", 4.0, 4),
        ("real", 2, 2.0),
        ("real", "1e-4", 1e-4),
        ("flag", True, True),
        ("flag", "True", True),
        ("flag", "false", False),
        ("flag", "1", True),
        ("text", "b c", "b c"),
        ("choice", "two", "two"),
        ("sizes", "3,4,5", (3, 4, 5)),
        ("sizes", "(3, 4)", (3, 4)),
        ("sizes", "7", (7,)),
        ("sizes", [3, 4], (3, 4)),
        ("limit", None, None),
        ("limit", "None", None),
        ("limit", "1.5", 1.5),
    ],
)
def test_each_type_takes_a_value_of_python_and_a_text(key, given, value):
    converted = getattr(settings(**{key: given}), key)
    assert converted == value and type(converted) is type(value)


@pytest.mark.parametrize(
    "key, given, expected",
    [
        ("whole", "four", "a whole number"),
        ("whole", "4.5", "a whole number"),
        ("whole", 4.5, "a whole number"),
        ("whole", True, "a whole number"),
        ("whole", None, "a whole number"),
        ("whole", float("inf"), "a whole number"),
        ("real", "much", "a number"),
        ("real", [1.0], "a number"),
        ("flag", "maybe", "true or false"),
        ("flag", 1, "true or false"),
        ("text", 3, "a text"),
        ("sizes", 3, "tuple"),
        ("sizes", "3;4", "a whole number"),
        ("sizes", ["x"], "a whole number"),
        ("limit", "high", "float"),
        ("limit", "1,5", "float"),
    ],
)
def test_a_wrong_type_names_setting_value_and_type(key, given, expected):
    with pytest.raises(UserError, match=f"setting {key}=.*wrong type.*{expected}") as caught:
        settings(**{key: given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, given",
    [
        ("real", -0.1),
        ("real", "nan"),
        ("real", "inf"),
        ("whole", -1),
        ("epochs", 0),
        ("batch_size", 0),
        ("image_size", 0),
        ("val_fraction", 1),
        ("sizes", "4,-1"),
    ],
)
def test_out_of_range_names_the_setting(key, given):
    with pytest.raises(UserError, match=f"setting {key}=.* is out of range"):
        settings(**{key: given})


def test_a_typo_names_the_nearest_field():
    with pytest.raises(UserError, match="unknown setting 'epoch'. Did you mean 'epochs'?"):
        settings(epoch=3)
    with pytest.raises(UserError, match="unknown preset 'othr'. Did you mean 'other'?"):
        resolve(Settings, PRESETS, "othr")
    with pytest.raises(UserError, match="setting choice.*'tow'.*Did you mean 'two'?"):
        settings(choice="tow")


def test_overrides_stand_above_the_preset_and_the_preset_above_the_defaults():
    s = resolve(Settings, PRESETS, "other", {"text": "c"})
    assert (s.whole, s.text, s.real) == (7, "c", 0.5)


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        settings().whole = 1


@pytest.mark.parametrize(
    "given, overrides",
    [
        (["lr=1e-4", "name = a=b"], {"lr": "1e-4", "name": "a=b"}),
        ({"lr": 1}, {"lr": 1}),
        (None, {}),
        ([], {}),
        ("", {}),
        (" \n", {}),
        ("lr=1e-4", {"lr": "1e-4"}),
        ("lr=1e-4 epochs=3", {"lr": "1e-4", "epochs": "3"}),
        ("lr=1e-4\nepochs=3\n", {"lr": "1e-4", "epochs": "3"}),
        ("lr=1e-4;epochs=3; blocks=4,6,8;", {"lr": "1e-4", "epochs": "3", "blocks": "4,6,8"}),
        ("lr = 1e-4  epochs = 3", {"lr": "1e-4", "epochs": "3"}),
        ("blocks=(4, 6, 8) textures=my folder;lr=1", {"blocks": "(4, 6, 8)", "textures": "my folder", "lr": "1"}),
        ('{"lr": 1e-4}', {"lr": 1e-4}),
        (' {"blocks": [4, 6], "amp": false, "limit": null} ', {"blocks": [4, 6], "amp": False, "limit": None}),
        ("{'lr': 1e-4}", {"lr": 1e-4}),
        ("{'blocks': (4, 6), 'amp': False, 'limit': None}", {"blocks": (4, 6), "amp": False, "limit": None}),
        ("{}", {}),
    ],
)
def test_overrides_are_read_from_pairs_a_dict_and_text(given, overrides):
    assert parse_overrides(given) == overrides


@pytest.mark.parametrize(
    "given, message",
    [
        (["lr"], "setting 'lr' has no value. Write it as key=value."),
        ([3], "setting '3' has no value. Write it as key=value."),
        ("lr", "setting 'lr' has no value. Write it as key=value."),
        ("lr 1e-4", "setting 'lr 1e-4' has no value. Write it as key=value."),
        ("lr:1; epochs=3", "setting 'lr:1' has no value. Write it as key=value."),
        ("{lr: 1}", """overrides '{lr: 1}' cannot be read. Write them as {"lr": 1e-4} or as lr=1e-4."""),
        ("{'lr'}", """overrides "{'lr'}" cannot be read. Write them as {"lr": 1e-4} or as lr=1e-4."""),
        ("{'lr': 1", """overrides "{'lr': 1" cannot be read. Write them as {"lr": 1e-4} or as lr=1e-4."""),
        (3, "overrides 3 have no keys. Write them as {key: value}."),
    ],
)
def test_overrides_that_cannot_be_read_are_named_with_the_mend(given, message):
    with pytest.raises(UserError) as caught:
        parse_overrides(given)
    assert str(caught.value) == message


def test_a_text_of_overrides_changes_the_settings():
    s = resolve(Settings, PRESETS, "plain", parse_overrides("whole=4 sizes=(4, 6) flag=true; limit=None"))
    assert (s.whole, s.sizes, s.flag, s.limit) == (4, (4, 6), True, None)


@pytest.mark.parametrize("module", [settings_module, errors])
def test_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_the_presets_and_paper_is_its_defaults(name):
    """All of a preset's differences are known fields."""
    module = methods.get(name)
    assert {"smoke", "demo", "paper"} <= set(module.PRESETS)
    assert resolve(module.Settings, module.PRESETS, "paper") == module.Settings()
    for preset, differences in module.PRESETS.items():
        s = resolve(module.Settings, module.PRESETS, preset)
        for field in fields(s):
            assert getattr(s, field.name) == differences.get(field.name, field.default)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_record_gives_the_settings_back(name):
    module = methods.get(name)
    s = resolve(module.Settings, module.PRESETS, "smoke")
    assert resolve(module.Settings, {"recorded": {}}, "recorded", as_json(s)) == s
