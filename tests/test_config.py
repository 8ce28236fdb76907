"""Settings: precedence, wrong names and types, dicts."""

import json

import pytest

import config as settings
from config import Config, ConfigError


@pytest.mark.parametrize("mode", settings.PRESETS)
def test_presets_survive_json(mode):
    config = settings.PRESETS[mode]()
    assert config.mode == mode
    assert settings.from_dict(json.loads(json.dumps(settings.to_dict(config)))) == config


def test_defaults_are_those_that_the_users_asked_for():
    asked = {
        "data.image_size": 128, "diffusion.num_train_timesteps": 1000, "model.base_channels": 64,
        "model.time_embed_dim": 128, "model.class_embed_dim": 128, "sample.sampler": "ddpm",
        # and what the recipe rests on
        "diffusion.reference_size": 32, "diffusion.prediction_type": "v_prediction",
        "diffusion.min_snr_gamma": 5.0, "train.class_dropout_prob": 0.1,
    }
    defaults = settings.flatten(settings.to_dict(settings.full()))
    assert asked == {name: defaults[name] for name in asked}


def test_overrides_win_over_the_preset_and_leave_the_rest():
    config = settings.apply_overrides(settings.overfit(), {"train.epochs": "7"})
    assert config.train.epochs == 7
    assert config.train.batch_size == settings.overfit().train.batch_size
    assert config.train.compile == settings.demo().train.compile == "false"
    assert config.data == settings.overfit().data


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("train.learning_rate", "3e-4", 3e-4),
        ("train.learning_rate", "1", 1),  # a whole number is fine for a float
        ("train.epochs", " 12 ", 12),
        ("data.horizontal_flip", "False", False),
        ("data.horizontal_flip", "1", True),
        ("model.channel_mult", "1,2,3", (1, 2, 3)),
        ("data.data_dir", "a folder, with a comma", "a folder, with a comma"),
    ],
)
def test_values_are_read_as_typed(name, text, value):
    section, key = name.split(".")
    config = settings.apply_overrides(Config(), {name: text})
    assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("train.epoch", "train.epochs"),
        ("batch_size", "train.batch_size"),
        ("modle.dropout", "model.dropout"),
    ],
)
def test_unknown_name_names_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=nearest.replace(".", r"\.")):
        settings.apply_overrides(Config(), {name: "1"})


@pytest.mark.parametrize(
    "name, value, word",
    [
        ("train.batch_size", "-4", "at least 0"),
        ("train.batch_size", "4.5", "whole number"),
        ("train.batch_size", True, "whole number"),
        ("train.learning_rate", "nan", "number"),
        ("train.learning_rate", "fast", "a number"),
        ("train.learning_rate", 0.0, "above 0"),
        ("data.horizontal_flip", "maybe", "true or false"),
        ("model.channel_mult", "1,x", "commas"),
        ("model.channel_mult", "1,2", "one entry per level"),
        ("model.time_embed_dim", "127", "even"),
        ("train.class_dropout_prob", "1.5", "at most 1"),
        ("diffusion.prediction_type", "velocity", "v_prediction"),
        ("data.image_size", "100", "multiple of 16"),
        ("model.attention_sizes", "7,9", "32, 16, 8 positions"),
        ("sample.num_inference_steps", "1001", "1000 diffusion timesteps"),
        ("train.class_dropout_prob", "0", "null label"),
        ("model.base_channels", "9" * 30, "at most 2147483647"),
        ("model.largest_unit", "1e308", "at most 1e"),
        ("data.repeats", "10001", "at most 10000"),
    ],
)
def test_unusable_value_names_setting_and_cure(name, value, word):
    with pytest.raises(ConfigError, match=word) as error:
        settings.apply_overrides(Config(), {name: value})
    assert name.split(".")[1] in str(error.value)


def test_from_dict_refuses_unknown_keys_and_types():
    plain = settings.to_dict(Config())
    plain["train"]["epochs"] = 1.5
    with pytest.raises(ConfigError, match="train.epochs"):
        settings.from_dict(plain)
    plain["train"]["epochs"] = 1
    plain["train"]["momentum"] = 0.9
    with pytest.raises(ConfigError, match="train.momentum"):
        settings.from_dict(plain)


@pytest.mark.parametrize("part", ["mode", "sample"])
def test_from_dict_names_what_is_missing(part):
    plain = settings.to_dict(Config())
    del plain[part]
    with pytest.raises(ConfigError, match=f"{part} missing"):
        settings.from_dict(plain)


@pytest.mark.parametrize("names", ["cat", (), ("cat", "Cat"), ("", "dog"), ("pick/up",), ("..",)])
def test_class_names_must_be_different_names_of_folders(monkeypatch, names):
    monkeypatch.setattr(settings, "CLASS_NAMES", names)
    with pytest.raises(ConfigError, match="CLASS_NAMES in config.py"):
        settings.full()


def test_every_setting_explains_itself():
    assert all(len(field.metadata["help"]) > 10 for field in settings.OPTIONS.values())
    assert len(settings.CLASS_NAMES) == len(set(settings.CLASS_NAMES)) == 10
