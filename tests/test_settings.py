"""Recipes and changes on top of them become one validated object; mistakes are named with what would be right."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nnunet_lite.errors import UserError
from nnunet_lite.settings import (
    Settings,
    changed_values,
    differences,
    keys,
    load_settings,
    recipe_folder,
    recipes,
    with_changes,
)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def resolved(settings: Settings) -> dict[str, Any]:
    return flat(json.loads(settings.model_dump_json()))


def test_recipes_are_all_the_files_of_configs_and_described_below() -> None:
    assert set(recipes()) == {*DISTINGUISHING, *PRESETS, *(f"ablations/{name}" for name in ABLATED)}
    files = [file for file in recipe_folder().rglob("*.toml") if file.parent.name != "cluster"]
    assert sorted(recipes().values()) == sorted(files)


@pytest.mark.parametrize(
    ("changes", "minutes"),
    [({}, 4), ({"training.epochs": 4}, None), ({"training.epochs": 4, "training.time_limit": "8m"}, 8),
     ({"training.time_limit": "none"}, None)],
)  # fmt: skip
def test_a_length_takes_the_place_of_the_recipes(changes: dict[str, Any], minutes: float | None) -> None:
    assert load_settings("cpu", changes).training.time_limit == minutes


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_is_what_its_file_says(name: str) -> None:
    text = recipes()[name].read_text()
    assert text.startswith("#"), "a recipe begins with a comment that says what it is for"
    values = tomllib.loads(text)
    base = values.pop("base", None)
    settings = load_settings(name)
    assert settings.recipe == Path(name).name
    expected = (
        (resolved(load_settings(base)) if base else resolved(Settings())) | flat(values) | {"recipe": settings.recipe}
    )
    assert resolved(settings) == expected


# Some values of each recipe.
DISTINGUISHING: dict[str, dict[str, Any]] = {
    "distill": {
        "network.features_base": 8, "training.patch_voxels": 90_000, "training.time_limit": 30.0,
        "augmentation.mirror_axes": [], "loss.distillation": 0.5, "training.teachers": [],
    },
    "default": {
        "optimizer.name": "sgd", "optimizer.lr": 0.01, "optimizer.momentum": 0.99, "optimizer.weight_decay": 3e-5,
        "schedule.name": "poly", "training.epochs": 1000, "training.iterations": 250, "training.gradient_clip": 12.0,
        "augmentation.pipeline": "native",
    },
    "paper2018": {
        "optimizer.name": "adam", "optimizer.lr": 3e-4, "schedule.name": "plateau", "schedule.patience": 30,
        "schedule.factor": 0.2, "schedule.min_lr": 1e-6, "training.epochs": 1000, "training.iterations": 250,
        "training.deep_supervision": False, "network.features_base": 30, "augmentation.pipeline": "batchgenerators",
        "augmentation.p_noise": 0.0, "augmentation.p_gamma": 0.3,
    },
    "fast": {"optimizer.name": "adamw", "optimizer.ema": 0.999, "schedule.name": "cosine", "training.epochs": 100},
    "mednext": {"plan.preset": "mednext_b", "optimizer.name": "adamw", "optimizer.lr": 1e-3, "training.epochs": 1000},
    "cpu": {"optimizer.name": "muon", "training.time_limit": 4.0, "augmentation.mirror_axes": []},
    "cpu_body": {"plan.spacing": [2.5, 2.5, 2.5], "optimizer.name": "muon", "augmentation.mirror_axes": []},
    "finetune": {"optimizer.name": "sgd", "optimizer.lr": 1e-3, "schedule.warmup": 0.1, "training.epochs": 150},
}  # fmt: skip
PRESETS = ("resenc_m", "resenc_l", "resenc_xl")
# The only keys in which an ablation differs from its base.
ABLATED: dict[str, dict[str, Any]] = {
    "batch_norm": {"network.norm": "batch"},
    "no_norm": {"network.norm": "none"},
    "relu": {"network.activation": "relu"},
    "no_augmentation": {"augmentation.enabled": False},
    "ce_only": {"loss.dice": 0.0},
    "dice_only": {"loss.cross_entropy": 0.0},
}


@pytest.mark.parametrize("name", DISTINGUISHING)
def test_a_recipe_has_its_distinguishing_values(name: str) -> None:
    found = resolved(load_settings(name))
    assert {key: found[key] for key in DISTINGUISHING[name]} == DISTINGUISHING[name]


@pytest.mark.parametrize("name", ABLATED)
def test_an_ablation_changes_one_thing_of_the_original_recipe(name: str) -> None:
    base, found = resolved(load_settings("paper2018")), resolved(load_settings(f"ablations/{name}"))
    assert {key: found[key] for key in found if found[key] != base[key] and key != "recipe"} == ABLATED[name]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_as_the_default_recipe_does(preset: str) -> None:
    assert differences(load_settings("default"), load_settings(preset)) == [f"plan.preset: None -> {preset}"]


def test_a_file_builds_on_a_recipe_and_changes_build_on_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "cpu"\n[optimizer]\nlr = 0.5\n')
    settings = load_settings(str(file), {"training.epochs": "7"})
    assert (settings.recipe, settings.optimizer.lr, settings.training.epochs) == ("mine", 0.5, 7)
    assert settings.network == load_settings("cpu").network


def test_epochs_of_a_recipe_take_the_place_of_the_time_limit_of_its_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    for limit, expected in (("", None), ('time_limit = "1h"', 60.0)):
        file.write_text(f'base = "cpu"\n[training]\nepochs = 7\n{limit}')
        training = load_settings(str(file)).training
        assert (training.epochs, training.time_limit) == (7, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'base = "mine.toml"', r"mine\.toml: builds on itself"),
        (b"[optimiser]\nlr = 1", r"mine\.toml: unknown setting 'optimiser\.lr'.*'optimizer\.lr'"),
        (b"[training]\nepochs = 3\nseed = = 4", r"mine\.toml: invalid TOML.*line 3, column 8"),
        (b"# \xff\xfe", r"mine\.toml: .*UTF-8"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_settings(str(tmp_path / "mine.toml"))


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no recipe 'defualt'\. Did you mean 'default'\? Or give a TOML file"):
        load_settings("defualt")
    with pytest.raises(UserError, match=r"no recipe 'x'\. There are: ablations/batch_norm, .*, resenc_xl\. Or give"):
        load_settings("x")


def test_the_file_of_a_network_is_stored_with_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(changes={"network.factory": "own.py:make"}).network.factory == f"{tmp_path / 'own.py'}:make"
    assert load_settings(changes={"network.factory": "own.module:make"}).network.factory == "own.module:make"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.lr", "3e-4", 3e-4),
        ("training.deep_supervision", "false", False),
        ("training.patch_size", "[40, 56, 40]", (40, 56, 40)),
        ("training.gradient_clip", "none", None),
        ("training.time_limit", "None", None),
        ("training.time_limit", "90s", 1.5),
        ("training.precision", "bf16", "bf16"),
        ("training.channels_last", "true", True),
        ("training.channels_last", "auto", "auto"),
        ("augmentation.gamma", "[0.5, 2]", (0.5, 2.0)),
        ("network.norm", "none", "none"),
        ("network.norm", "batch", "batch"),
    ],
)
def test_text_is_read_as_a_toml_value(key: str, text: str, value: object) -> None:
    section, name = key.split(".")
    found = getattr(getattr(load_settings(changes={key: text}), section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("training.epoch", 1, "unknown setting 'training.epoch'. Did you mean 'training.epochs'?"),
        ("lr", 1, "unknown setting 'lr'. Did you mean 'optimizer.lr'?"),
        ("lrr", 1, "unknown setting 'lrr'. Did you mean 'optimizer.lr'?"),
        ("qqq", 1, "unknown setting 'qqq'. The nearest are "),
        ("loss.dise", 1, "unknown setting 'loss.dise'. Did you mean 'loss.dice'?"),
        ("network.kind", "mednext", "The network is planned: --set plan.preset=mednext_s"),
        ("training.epochs", "many", "training.epochs = 'many': "),
        ("optimizer.lr", "inf", "optimizer.lr = inf: Input should be a finite number"),
        ("augmentation.scaling", "[0.7]", "augmentation.scaling = [0.7]: "),
        ("augmentation.scaling", [1.4, 0.7], "[1.4, 0.7]: must be [low, high] with 0 < low <= high"),
        ("augmentation.scaling", [0, 1], "[0, 1]: must be [low, high] with 0 < low <= high"),
        ("augmentation.scaling", [1, float("inf")], "[1, inf]: Input should be a finite number"),
        ("augmentation.blur_sigma", [0, 1], "0 < low <= high"),
        ("augmentation.brightness", [0, 1], "0 < low <= high"),
        ("augmentation.noise_std", [-0.1, 0.1], "0 <= low <= high"),
        ("augmentation.low_resolution", [0.5, 1.5], "0 < low <= high <= 1"),
        ("augmentation.mirror_axes", [0, 3], "different axes, each 0, 1 or 2"),
        ("augmentation.mirror_axes", [1, 1], "different axes, each 0, 1 or 2"),
    ],
)
def test_a_mistake_names_key_value_and_what_is_legal(key: str, value: object, says: str) -> None:
    with pytest.raises(UserError) as raised:
        load_settings(changes={key: value})
    assert says in str(raised.value) and key in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("scaling", [1, 1]), ("noise_std", [0, 0]), ("low_resolution", [1, 1]), ("mirror_axes", []), ("rotation", 0)],
)
def test_the_ends_of_a_range_are_legal(key: str, value: object) -> None:
    assert load_settings(changes={f"augmentation.{key}": value}).recipe == "default"


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("ablations/dice_only", {"loss.dice": 0}, r"^loss: one of the weights must be greater than 0"),
        ("paper2018", {"optimizer.lr": 1e-7}, r"^optimizer\.lr = 1e-07 is below schedule\.min_lr = 1e-06, where pl"),
        ("default", {"training.early_stop": 20, "training.validation_iterations": 0}, "early_stop.*of at least 1"),
        ("default", {"schedule.warmup": 0.6, "schedule.cooldown": 0.5}, r"^schedule: .*are more than the whole run"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(recipe: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_settings(recipe, changes)
    assert load_settings("default", {"training.early_stop": 20}).training.early_stop == 20


def test_only_some_sections_may_be_changed() -> None:
    only = ("inference",)
    assert with_changes(Settings(), {"inference.step_size": "0.75"}, sections=only).inference.step_size == 0.75
    with pytest.raises(UserError, match=r"^training.epochs is no setting of inference. There are: inference.step_size"):
        with_changes(Settings(), {"inference.step_size": 0.75, "training.epochs": "7"}, sections=only)
    with pytest.raises(UserError, match=r"unknown setting 'inference.step'.*'inference.step_size'"):
        with_changes(Settings(), {"inference.step": "7"}, sections=only)


def test_settings_survive_json_and_are_frozen() -> None:
    settings = load_settings("cpu", {"training.patch_size": "[40, 56, 40]"})
    assert Settings.model_validate(json.loads(settings.model_dump_json())) == settings
    with pytest.raises(ValueError, match="frozen"):
        settings.training.epochs = 1  # type: ignore[misc]


def test_tensorboard_has_become_a_logger(tmp_path: Path) -> None:
    """Models and recipes of older versions are read."""
    (tmp_path / "mine.toml").write_text("[training]\ntensorboard = true\n")
    assert load_settings(str(tmp_path / "mine.toml")).training.logger == "tensorboard"
    assert load_settings("default", {"training.tensorboard": "true"}).training.logger == "tensorboard"
    older = Settings().model_dump(mode="json")
    del older["training"]["logger"]
    older["training"]["tensorboard"] = False
    assert Settings.model_validate(older) == Settings()
    assert "training.tensorboard" not in keys()


def test_differences_lists_what_changed_and_not_the_recipes_name() -> None:
    old = load_settings("default")
    assert differences(old, old.model_copy(update={"recipe": "other"})) == []
    new = with_changes(old, {"training.epochs": 3, "training.patch_size": [8, 8, 8]})
    assert differences(old, new) == ["training.epochs: 1000 -> 3", "training.patch_size: None -> [8, 8, 8]"]


def test_keys_are_all_legal() -> None:
    tree = Settings().model_dump()
    assert len(keys()) > 40
    assert with_changes(Settings(), {k: tree[k.split(".")[0]][k.split(".")[1]] for k in keys()}) == Settings()


def test_numbers_that_changed_are_rounded_unless_they_look_equal_then() -> None:
    before = {"spacing": [5.5534009841132495, 1.0], "lr": 0.1 + 0.2, "same": 1 / 3, "epochs": 1000}
    after = {"spacing": [2, 1.0], "lr": 0.3, "same": 1 / 3, "patch": (32, 32)}
    assert changed_values(before, after) == {
        "spacing": ([5.5534, 1.0], [2, 1.0]),
        "lr": (0.1 + 0.2, 0.3),
        "epochs": (1000, None),
        "patch": (None, [32, 32]),
    }
