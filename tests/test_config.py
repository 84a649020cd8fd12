from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from neuromf import config
from neuromf.errors import UserError

SHIPPED = sorted(config.preset_files())
LATENT_CHANNELS = 4


def write(path: Path, **sections) -> Path:
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


@pytest.fixture
def preset(tmp_path) -> str:
    return str(write(tmp_path / "mine.yaml", training={"updates": 7, "lr": 1e-3, "batch_size": 3, "seed": 5}))


# --- precedence ----------------------------------------------------------------------------------------------


def test_each_layer_wins_over_the_ones_below(preset, tmp_path, monkeypatch):
    file = write(tmp_path / "file.yaml", training={"lr": 2e-3, "batch_size": 4, "accumulation": 2})
    monkeypatch.setenv("NEUROMF_TRAINING__BATCH_SIZE", "5")
    monkeypatch.setenv("NEUROMF_TRAINING__ACCUMULATION", "6")
    training = config.load(preset, ["training.accumulation=8"], file).training
    assert training.weight_decay == 0.01  # default
    assert training.seed == 5  # preset
    assert training.lr == 2e-3  # file over preset
    assert training.batch_size == 5  # environment over file and preset
    assert training.accumulation == 8  # override over all


LAYERS = ("preset", "file", "environment", "override")


@pytest.mark.parametrize(("low", "high"), [("epochs", "updates"), ("updates", "epochs")])
@pytest.mark.parametrize(("lower", "upper"), combinations(LAYERS, 2))
def test_a_length_replaces_the_other_kind_of_any_lower_layer(tmp_path, monkeypatch, lower, upper, low, high):
    set_here = {lower: {low: 11}, upper: {high: 13}}
    preset = write(tmp_path / "p.yaml", training={"lr": 1e-3, **set_here.get("preset", {})})
    file = write(tmp_path / "f.yaml", training={"seed": 1, **set_here.get("file", {})})
    for key, value in set_here.get("environment", {}).items():
        monkeypatch.setenv(f"NEUROMF_TRAINING__{key.upper()}", str(value))
    overrides = [f"training.{key}={value}" for key, value in set_here.get("override", {}).items()]
    training = config.load(str(preset), overrides, file).training
    assert (getattr(training, high), getattr(training, low)) == (13, None)


def test_without_any_length_the_default_one_holds_whatever_else_is_set(tmp_path):
    plain = config.TrainConfig(_environment=False).training.updates
    empty = write(tmp_path / "empty.yaml")
    assert config.load(str(empty)).training.updates == plain
    assert config.load(str(empty), ["training.lr=1e-3"]).training.updates == plain


def test_both_lengths_in_one_layer_are_refused(preset):
    with pytest.raises(UserError, match="set exactly one of"):
        config.load(preset, ["training.epochs=3", "training.updates=4"])


def test_the_preset_is_remembered_by_its_name(preset):
    assert config.load(preset).preset == "mine"


# --- mistakes ------------------------------------------------------------------------------------------------


def test_an_unknown_override_is_refused_with_the_nearest_key():
    with pytest.raises(UserError, match=r"no setting 'training.learnrate'.*\n.*'training.lr"):
        config.load("imf-xpred", ["training.learnrate=1"])


def test_an_override_without_a_value_shows_the_form():
    with pytest.raises(UserError, match=r"training.lr=2e-4"):
        config.load("imf-xpred", ["training.lr"])


def test_all_mistakes_of_a_file_are_named_at_once(tmp_path):
    file = write(tmp_path / "bad.yaml", training={"updates": 3, "lrr": 1, "batch_size": 0}, objectiv={"name": "imf"})
    with pytest.raises(UserError) as caught:
        config.load(str(file))
    text = str(caught.value)
    assert "no setting 'training.lrr': did you mean 'training.lr'" in text
    assert "training.batch_size" in text
    assert "found 0" in text
    assert "no setting 'objectiv'" in text


def test_an_environment_variable_that_names_nothing_is_refused(preset, monkeypatch):
    monkeypatch.setenv("NEUROMF_TRAINING__LRR", "1")
    with pytest.raises(UserError, match="NEUROMF_TRAINING__LR'"):
        config.load(preset)


@pytest.mark.parametrize("name", sorted(config.RESERVED_ENVIRONMENT))
def test_variables_with_another_purpose_are_left_alone(preset, monkeypatch, name):
    monkeypatch.setenv(name, "somewhere")
    config.load(preset)


def test_an_unknown_preset_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'imf-xpred'"):
        config.load("imf-xperd")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.channels=[32,64]", "2 levels and network.attention_levels 4"),
        ("network.norm_groups=48", "does not divide"),
        ("objective.t_min=0", "divides by zero"),
        ("ema.select=0.5", "not among ema.decays"),
        ("training.lr=-1", "greater than 0"),
        ("training.lr=nan", "greater than 0"),
        ("objective.name=imff", "imf"),
        ("training.updates=", "exactly one"),
    ],
)
def test_impossible_values_are_refused_with_the_reason(preset, override, message):
    with pytest.raises(UserError, match=message):
        config.load(preset, [override])


def test_exponents_and_weights_of_different_numbers_of_channels_are_refused(preset):
    with pytest.raises(UserError, match=r"2 channels and objective\.channel_weights 3"):
        config.load(preset, ["objective.lp=[1.5,2]", "objective.channel_weights=[1,1,2]"])


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "just words"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.yaml"):
        config.load(str(tmp_path / "bad.yaml"))


# --- values --------------------------------------------------------------------------------------------------


def test_override_values_are_read_as_yaml_and_exponents_as_numbers(preset):
    settings = config.load(
        preset,
        ["training.lr=2e-4", "training.clip=null", "network.pad=true", "objective.lp=[1.5, 2]", "ema.decays=[0.9]",
         "ema.select=0.9"],
    )  # fmt: skip
    assert (settings.training.lr, settings.training.clip, settings.network.pad) == (2e-4, None, True)
    assert (settings.objective.lp, settings.ema.decays) == ((1.5, 2.0), (0.9,))


def test_a_configuration_is_frozen(preset):
    with pytest.raises(Exception, match="frozen"):
        config.load(preset).training.lr = 1.0


@pytest.mark.parametrize("name", SHIPPED)
def test_the_resolved_settings_survive_their_file(name, tmp_path, monkeypatch):
    settings = config.load(name, ["objective.lp=[1.5,2,2,2]"])
    (tmp_path / "config.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    monkeypatch.setenv("NEUROMF_TRAINING__LR", "0.5")  # a run folder is not swayed by the environment
    assert config.from_yaml(tmp_path / "config.yaml") == settings


# --- the shipped presets ---------------------------------------------------------------------------------------


def test_the_recommended_preset_is_shipped():
    assert {"imf-xpred", "rectflow"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_loads_and_builds_without_memory(name):
    import torch

    from neuromf.models.unet import build_network, parameter_count

    settings = config.load(name)
    with torch.device("meta"):
        network = build_network(latent_channels=LATENT_CHANNELS, **settings.network.model_dump())
    assert parameter_count(network) > 1000


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_opens_with_purpose_source_and_command(name):
    path = config.preset_files()[name]
    header = config.preset_header(path)
    assert len(header[0]) > 20
    assert any(line.startswith(("Source: ", "Purpose: ")) for line in header)
    assert any(line.startswith("Command: neuromf ") and name in line for line in header)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30


def test_reading_settings_needs_no_heavy_import():
    code = (
        "import sys, neuromf.config as c; c.load('imf-xpred'); "
        "heavy = {'torch', 'monai', 'scipy', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
