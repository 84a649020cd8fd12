"""P2: the whole method on a torus (SPEC section 12).

The short forms train a smaller network for seconds and have wider limits; the full ones are the shipped presets, as
`neuromf toy` runs them.
"""

from __future__ import annotations

import json

import pytest

from neuromf.pipeline.toy import ToyReport, toy

SHORT = ["training.updates=1100", "training.batch_size=256"]
SHORT_DISTANCE, SHORT_KS = 0.15, 1e-4
SHORT_VOLUMES = ["training.updates=150", "training.batch_size=64", "training.warmup_steps=50"]
SHORT_VOLUME_DISTANCE = 0.7  # of the mean volume, which a network knows that learned nothing else: 1.0


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> ToyReport:
    return toy("toy-torus", tmp_path_factory.mktemp("p2"), seeds=[0], overrides=SHORT, device="cpu")


def passed(report: ToyReport) -> dict[str, bool]:
    return {gate.id: gate.passed for gate in report.gates}


def value(report: ToyReport, name: str, evaluations: int = 1, prediction: str = "x") -> float:
    return next(
        row[name] for row in report.rows if (row["evaluations"], row["prediction"]) == (evaluations, prediction)
    )


@pytest.mark.gate("P2-T1")
@pytest.mark.gate("P2-T2")
@pytest.mark.gate("P2-T3")
@pytest.mark.gate("P2-T4")
def test_data_loss_and_derivative_are_valid_and_the_raw_loss_falls(short):
    assert all(passed(short)[f"P2-T{n}"] for n in (1, 2, 3, 4)), short.lines()


@pytest.mark.gate("P2-T5")
def test_one_evaluation_lands_near_the_torus(short):
    assert value(short, "distance") < SHORT_DISTANCE
    assert value(short, "abs(norm - 1)") < SHORT_DISTANCE


@pytest.mark.gate("P2-T6")
def test_one_evaluation_covers_both_angles(short):
    assert min(value(short, "KS p (a)"), value(short, "KS p (b)")) > SHORT_KS


@pytest.mark.gate("P2-T7")
@pytest.mark.gate("P2-T8")
def test_five_steps_and_the_other_prediction_are_reported(short, record_property):
    record_property("P2-T7 and T8", json.dumps([gate._asdict() for gate in short.gates[-2:]]))
    assert value(short, "distance", evaluations=5) < 2 * SHORT_DISTANCE
    assert value(short, "distance", prediction="u") > 0


@pytest.mark.gate("P2-T1")
@pytest.mark.gate("P2-T2")
@pytest.mark.gate("P2-T3")
@pytest.mark.gate("P2-T5")
def test_volumes_are_learned_the_same_way(tmp_path):
    report = toy("toy-volume", tmp_path, seeds=[0], overrides=SHORT_VOLUMES, both=False, device="cpu")
    assert all(passed(report)[f"P2-T{n}"] for n in (1, 2, 3)), report.lines()
    assert value(report, "distance") < SHORT_VOLUME_DISTANCE
    assert value(report, "distance", evaluations=5) < value(report, "distance")


@pytest.mark.slow
@pytest.mark.gate("P2-T1")
@pytest.mark.gate("P2-T2")
@pytest.mark.gate("P2-T3")
@pytest.mark.gate("P2-T4")
@pytest.mark.gate("P2-T5")
@pytest.mark.gate("P2-T6")
@pytest.mark.gate("P2-T7")
@pytest.mark.gate("P2-T8")
@pytest.mark.parametrize(("preset", "seeds"), [("toy-torus", (0, 1, 2)), ("toy-volume", (1,))])
def test_the_shipped_preset_passes_every_required_gate(preset, seeds, tmp_path, record_property):
    report = toy(preset, tmp_path, seeds=seeds, device="cpu", jobs=None)
    record_property(f"P2 {preset}", json.dumps(report.to_dict()))
    assert report.failed == []
