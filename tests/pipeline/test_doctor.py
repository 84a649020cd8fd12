"""`neuromf doctor`: the environment, and du/dt on a preset's own network."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neuromf import config
from neuromf.errors import UserError
from neuromf.pipeline import doctor, doctor_jvp
from neuromf.pipeline.doctor import check_environment
from neuromf.pipeline.doctor_jvp import check_derivative, smallest_size
from neuromf.pipeline.doctor_report import REFERENCE_LIMIT

Run = Callable[..., Any]
MLP = "network: {name: mlp, width: 16, depth: 2}\ntraining: {updates: 10}\n"
UNET = (
    "network: {channels: [8, 16], attention_levels: [false, true], head_channels: 8, res_blocks: 1, norm_groups: 4}\n"
    "training: {updates: 10}\n"
)
MIT = (
    "network: {name: mit, size: null, depth: 2, width: 24, heads: 2, patch: 1, v_head_blocks: 1, classes: true, "
    "guidance: true}\n"
    "objective: {prediction: u, tangent: v-head}\n"
    "guidance: {enabled: true}\n"
    "training: {updates: 10}\n"
)
FINITE = ("objective.derivative=finite-difference", "training.precision=bf16")


@pytest.fixture
def preset(in_tmp: Path) -> Callable[[str], str]:
    """Writes a preset called `tiny` and gives its path."""

    def write(text: str) -> str:
        Path("tiny.yaml").write_text(text, encoding="utf-8")
        return "tiny.yaml"

    return write


def status_of(name: str) -> tuple[str, str]:
    check = next(check for check in check_environment("cpu").checks if check.name == name)
    return check.status, f"{check.found} {check.advice}"


# --- the environment ------------------------------------------------------------------------------------------


def test_the_environment_of_the_tests_has_no_problem(neuromf: Run) -> None:
    shown = neuromf("doctor")
    assert shown.exit_code == 0, shown.stdout + shown.stderr
    report = json.loads(neuromf("doctor", "--json", "--device", "cpu").stdout)
    assert report["passed"]
    for check in report["checks"]:
        assert check["status"] in ("ok", "warning")
        assert any(line.split()[:2] == [check["status"], check["name"]] for line in shown.stdout.splitlines()) or (
            check["name"] == "device"  # a GPU, where auto finds one
        )


def test_a_damaged_autoencoder_ends_with_4_and_what_to_do(neuromf: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "sha256_file", lambda path: "0" * 64)
    result = neuromf("doctor")
    assert result.exit_code == 4
    assert "is damaged: sha256 000000000000" in result.stderr
    assert doctor.REINSTALL in result.stdout


def test_the_excluded_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.9.1" if name == "torch" else real(name))
    status, words = status_of("torch")
    assert status == "problem"
    assert "166122" in words


def test_a_library_too_old_is_named_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "nibabel" else real(name))
    status, words = status_of("libraries")
    assert status == "problem"
    assert "nibabel is 0.1, needed >=5.2" in words


def test_a_library_that_cannot_be_imported_is_a_finding_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so: cannot open")

    monkeypatch.setattr(doctor, "import_module", broken)
    assert status_of("monai") == ("problem", f"OSError: libcudart.so: cannot open {doctor.REINSTALL}")


def test_a_device_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert any("no CUDA device" in problem for problem in check_environment("cuda").problems)


def test_the_weights_folder_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status_of("weights")[0] == "ok"
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path / "absent"))
    assert status_of("weights")[0] == "problem"
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path))
    assert status_of("weights") == ("warning", f"{tmp_path} holds no known weights neuromf weights list")
    torch.save({"a": torch.zeros(3)}, tmp_path / "autoencoder_v1.pt")
    assert status_of("weights") == ("ok", f"{tmp_path}: maisi ")
    (tmp_path / "autoencoder_v2.pt").write_bytes(b"<html>please log in</html>")
    status, words = status_of("weights")
    assert status == "problem"
    assert "autoencoder_v2.pt is a web page" in words


def test_a_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert status_of("disk")[0] == "problem"


def test_settings_in_the_environment_that_break_every_preset_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROMF_TRAINING__LRR", "1")
    status, words = status_of("presets")
    assert status == "problem"
    assert "NEUROMF_TRAINING__LRR names no setting" in words


# --- the derivative -------------------------------------------------------------------------------------------


def test_every_strategy_is_compared_and_the_configured_one_passes(neuromf: Run, preset: Run) -> None:
    result = neuromf("doctor", "--jvp", "--preset", preset(UNET), "--json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    errors = {(row["strategy"], row["precision"], row["times"]): row["error"] for row in report["rows"]}
    ways = [("exact", "fp32"), ("exact", "bf16"), (doctor_jvp.LEFT_IN_AUTOCAST, "bf16")]
    ways += [("finite-difference", "fp32"), ("finite-difference", "bf16")]
    assert list(errors) == [(*way, times) for times in (1, 1000) for way in ways]
    assert [row["strategy"] for row in report["rows"] if row["in_use"]] == ["exact"]
    assert report["passed"]
    assert [found["times"] for found in report["references"]] == [1, 1000]
    assert max(found["disagreement"] for found in report["references"]) < REFERENCE_LIMIT
    assert errors["exact", "bf16", 1] == errors["exact", "fp32", 1] < 1e-4
    assert errors["finite-difference", "fp32", 1000] > 10 * errors["finite-difference", "fp32", 1] > 1e-3
    assert errors["finite-difference", "bf16", 1] > 0.5
    assert report["latent_shape"] == [4, 2, 2, 2]


def test_the_table_and_the_verdict_are_shown(neuromf: Run, preset: Run) -> None:
    result = neuromf("doctor", "--jvp", "--preset", preset(MLP), "--device", "cpu")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert next(line for line in lines if line.startswith("du/dt")).split()[:3] == ["du/dt", "precision", "times"]
    assert sum(" x1 " in line for line in lines) == 6  # no factor on its times: the reference and five strategies
    assert sum(line.endswith("ok (in use)") for line in lines) == 1
    assert lines[-1].startswith("tiny: du/dt by objective.derivative=exact at training.precision=fp32")


def test_finite_differences_under_bf16_end_with_4_and_the_reason(neuromf: Run, preset: Run) -> None:
    result = neuromf("doctor", "--jvp", "--preset", preset(MLP), "--device", "cpu", *FINITE)
    assert result.exit_code == 4
    assert "bf16 keeps 8 bits of u, and the difference is divided by fd_step=0.001" in result.stderr
    assert "set objective.derivative=exact" in result.stderr
    assert "too far (in use)" in result.stdout


def test_flow_matching_uses_no_derivative(preset: Run) -> None:
    report = check_derivative(config.load(preset(MLP), ["objective.name=rectflow"]), device="cpu")
    assert report.used is None
    assert not report.failed
    assert report.verdict.endswith("takes no du/dt")


def test_conditions_guidance_and_a_second_head_take_part(preset: Run) -> None:
    report = check_derivative(config.load(preset(MIT)), device="cpu")
    assert report.facts["latent_shape"] == (4, 2, 2, 2)
    assert not report.failed
    assert float(report.references[0].du_dt.norm()) > 1e-3  # layers that start at zero were drawn


def test_a_network_that_computes_in_float32_does_not_pass_for_the_truth(
    preset: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rounding(nn.Module):
        def forward(self, z, r, t):
            return (z * torch.sin(t)[:, None, None, None, None]).float().to(z.dtype)

    monkeypatch.setattr(doctor_jvp, "build_network", lambda *settings, **more: Rounding())
    report = check_derivative(config.load(preset(MLP)), device="cpu")
    assert "computes in less" in report.failed[0]


def test_the_answer_of_one_seed_is_always_the_same(preset: Run) -> None:
    path, state = preset(MLP), torch.get_rng_state()
    first, again, other = (check_derivative(config.load(path), device="cpu", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.references[0].du_dt, again.references[0].du_dt)
    assert not torch.equal(first.references[0].du_dt, other.references[0].du_dt)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("preset_name", "overrides", "cells"),
    [
        ("imf-xpred", (), 8),
        ("imf-xpred", ("network.pad=true",), 8),
        ("cpu-small", (), 8),
        ("demo", (), 4),
        ("mit-b", (), 8),
        ("toy-torus", (), 1),
    ],
)
def test_the_smallest_latents_are_those_the_network_takes(
    preset_name: str, overrides: tuple[str, ...], cells: int
) -> None:
    settings = config.load(preset_name, overrides).network.model_dump()
    assert smallest_size(settings) == (cells, cells, cells)


def test_another_size_is_taken_or_refused_with_the_rule(neuromf: Run, preset: Run) -> None:
    path = preset(UNET)
    report = check_derivative(config.load(path), size=(2, 4, 2), device="cpu")
    assert report.facts["latent_shape"] == (4, 2, 4, 2)
    refused = neuromf("doctor", "--jvp", "--preset", path, "--size", "3", "4", "4")
    assert refused.exit_code == 2
    assert "multiple of 2" in refused.stderr


def test_a_network_larger_than_the_memory_is_refused(preset: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_jvp, "available", lambda device: (1000, "a small machine"))
    with pytest.raises(UserError, match="a small machine has"):
        check_derivative(config.load(preset(MLP)), device="cpu")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--jvp", "--preset", "imf-xperd"), "did you mean 'imf-xpred'"),
        (("--jvp", "network.wid=3"), "network.width"),
        (("--preset", "imf-xpred"), "add --jvp"),
        (("objective.derivative=exact",), "add --jvp"),
    ],
)
def test_what_cannot_be_checked_is_refused(words: tuple[str, ...], told: str, neuromf: Run) -> None:
    result = neuromf("doctor", *words)
    assert result.exit_code == 2
    assert told in result.stderr
