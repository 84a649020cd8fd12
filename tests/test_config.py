from __future__ import annotations

import json
import re
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


def test_a_renamed_setting_is_read_from_old_files_and_named_on_the_command_line(tmp_path):
    run = tmp_path / "config.yaml"
    run.write_text(
        config.load("imf-xpred", ["training.augmentation=false"]).to_yaml().replace("augmentation:", "flip:")
    )
    assert "flip: false" in run.read_text()
    assert config.from_yaml(run).training.augmentation is False
    with pytest.raises(UserError, match=r"(?s)no setting 'training\.flip'.*it is called training\.augmentation now"):
        config.load("imf-xpred", ["training.flip=false"])
    (tmp_path / "mine.yaml").write_text("training: {flip: true}\n")
    with pytest.raises(UserError, match="give that one alone"):  # phase4 sets it by its present name
        config.load("phase4", config=tmp_path / "mine.yaml")


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
        ("ema.select=0.5", "ema.select=0.5 is not among the averages 0.9995, 0.999, 0.9999"),
        ("ema.select=500kimg", "ema.select=500kimg is not among the averages"),
        ("objective.prediction=", "'u' or 'x'"),
        ("times.data_proportion=1.5", r"times.data_proportion: .*less than or equal to 1 \(found 1.5\)"),
        ("times.data_proportion=-0.1", r"times.data_proportion: .*greater than or equal to 0 \(found -0.1\)"),
        ("objective.tangent=v-head", "needs a second head: set network.v_head_blocks to 1 or more"),
        ("network.v_head_blocks=2", "trains nothing with objective.name=imf and tangent boundary"),
        ("objective.name=alphaflow", r"needs objective.alpha_schedule, such as \[0.0, 1.0\]"),
        ("objective.alpha_schedule=[0, 1]", "belongs to alphaflow, not to imf"),
        ("network.conditioning=t", "does not show r to the network, and imf needs it: use t"),
        ("network.guidance=true", "takes scales that nothing draws: set guidance.enabled=true"),
        ("guidance.enabled=true", "needs network.classes=true"),
        ("guidance.interval=[0.7, 0.2]", r"guidance.interval=\[0.7, 0.2\]: the lower time comes first"),
        ("guidance.omega_max=1", "greater than 1"),
        ("times.gap_start=0.3", "times.gap_curriculum above 0 together"),
        ("times.gap_curriculum=0.3", "times.gap_start below 1"),
        ("network.name=transformer", "no such network; available: maisi-unet, mit, mlp"),
        ("training.lr=-1", "greater than 0"),
        ("training.lr=nan", "greater than 0"),
        ("objective.name=imff", "imf"),
        ("training.updates=", "exactly one"),
    ],
)
def test_impossible_values_are_refused_with_the_reason(preset, override, message):
    with pytest.raises(UserError, match=message):
        config.load(preset, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.name=pmf", "objective.prediction=u"], "pmf compares data estimates: .*objective.prediction=x"),
        (["objective.name=meanflow", "objective.tangent=v-head"], "belongs to imf and pmf, not to meanflow"),
        (["objective.name=alphaflow", "objective.alpha_schedule=[0.8, 0.2]"], "must rise"),
        (["objective.channel_weights=learned", "objective.norm_p=1"], "grow without end under objective.norm_p=1"),
        (["objective.perceptual_weight=1", "objective.prediction=u"], "it needs prediction x"),
        (["network.classes=true", "guidance.enabled=true"], "imf draws a scale .*: set network.guidance=true"),
        (["guidance.enabled=true", "network.classes=true", "objective.name=rectflow"], "not to rectflow"),
        (["guidance.enabled=true", "network.classes=true", "guidance.label_drop=0"], "set guidance.label_drop above 0"),
        (["network.name=mit", "network.channels=[8, 8]"], "network.channels is a setting of maisi-unet, .* is mit"),
        (["network.name=mlp", "network.patch=2"], "network.patch is a setting of maisi-unet and mit, .* is mlp"),
        (["network.size=B"], "network.size is a setting of mit, and this network is maisi-unet"),
        (["network.name=mit"], "network.v_head_blocks=8 trains nothing"),
        (["network.name=mlp", "network.conditioning=decoupled"], "'t\\+h', 'r\\+t' or 'h'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_reason(preset, overrides, message):
    with pytest.raises(UserError, match=message):
        config.load(preset, overrides)


def test_every_contradiction_between_sections_is_named_at_once(preset):
    with pytest.raises(UserError) as caught:
        config.load(preset, ["objective.tangent=v-head", "guidance.enabled=true", "network.guidance=false"])
    assert "second head" in caught.value.message
    assert "network.classes=true" in caught.value.message
    assert "network.guidance=true" in caught.value.message


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


# --- one of several networks ---------------------------------------------------------------------------------


NETWORKS = {
    "maisi-unet": {"name": "maisi-unet", "channels": [8, 16], "attention_levels": [False, True], "norm_groups": 4},
    "mit": {"name": "mit", "size": None, "depth": 2, "width": 24, "heads": 2, "v_head_blocks": 0},
    "mlp": {"name": "mlp", "width": 16, "depth": 2, "conditioning": "h"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_the_same_from_a_preset_overrides_the_environment_and_a_run(tmp_path, monkeypatch, name):
    wanted = NETWORKS[name]
    whole = config.load(str(write(tmp_path / "whole.yaml", network=wanted)))
    assert whole.network.name == name
    plain = str(write(tmp_path / "plain.yaml"))
    overrides = [f"network.{key}={json.dumps(value)}" for key, value in wanted.items()]
    assert config.load(plain, overrides).network == whole.network
    assert config.load(plain, config=tmp_path / "whole.yaml").network == whole.network
    (tmp_path / "run.yaml").write_text(whole.to_yaml())
    assert config.from_yaml(tmp_path / "run.yaml") == whole
    for key, value in wanted.items():  # null is spoken there as in YAML
        monkeypatch.setenv(f"NEUROMF_NETWORK__{key.upper()}", value if isinstance(value, str) else json.dumps(value))
    assert config.load(plain).network == whole.network


def test_layers_of_a_network_settings_are_merged(tmp_path, monkeypatch):
    preset = str(write(tmp_path / "p.yaml", network={"name": "mlp", "width": 16, "depth": 2}))
    monkeypatch.setenv("NEUROMF_NETWORK__DEPTH", "3")
    network = config.load(preset, ["network.conditioning=h"]).network
    assert (network.name, network.width, network.depth, network.conditioning) == ("mlp", 16, 3, "h")


def test_a_preset_that_names_no_network_means_the_u_net(tmp_path):
    assert config.load(str(write(tmp_path / "p.yaml", network={"res_blocks": 1}))).network.name == "maisi-unet"


def test_an_average_is_selected_by_its_decay_or_its_half_life(preset):
    ema = config.load(preset, ["ema.decays=[0.9]", "ema.half_lives_kimg=[0.5, 500]", "ema.select=500kimg"]).ema
    assert ema.names == ["0.9", "0.5kimg", "500kimg"]
    assert ema.selected == "500kimg"
    assert config.load(preset, ["ema.select=0.99990"]).ema.selected == "0.9999"


# --- the shipped presets ---------------------------------------------------------------------------------------


def test_the_recommended_preset_is_shipped():
    assert {"imf-xpred", "rectflow"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_loads_and_builds_without_memory(name):
    import torch

    from neuromf.models.networks import build_network, parameter_count

    settings = config.load(name)
    with torch.device("meta"):
        network = build_network(settings.network.model_dump(), (LATENT_CHANNELS, 48, 48, 48), classes=2)
    assert parameter_count(network) > 1000


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_opens_with_purpose_source_and_command(name):
    path = config.preset_files()[name]
    header = config.preset_header(path)
    assert len(header[0]) > 20
    assert any(line.startswith(("Source: ", "Purpose: ")) for line in header)
    command = next(line for line in header if line.startswith("Command: "))
    assert re.search(rf"\bneuromf(_cli)? (train|toy|demo|lora)\b.*\b{name}\b", command)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30


def test_reading_settings_needs_no_heavy_import():
    code = (
        "import sys, neuromf.config as c; c.load('imf-xpred'); "
        "heavy = {'torch', 'monai', 'scipy', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
