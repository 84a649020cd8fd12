"""Services by name: what they are given, and that a resumed run goes on there and sends nothing twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.tracking
import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from PIL import Image

from neuromf.errors import UserError
from neuromf.training import trackers
from neuromf.training.trackers import Service, check_installed

SETTINGS = {"preset": "demo", "training": {"lr": 0.1, "betas": [0.9, 0.95], "clip": None}}


class Fake(GeneralTracker):
    """A tracker that remembers what it was told."""

    name, requires_logging_directory = "fake", False
    made: list[Fake]

    def __init__(self, project: str, **how: Any) -> None:
        super().__init__()
        self.project, self.how = project, how
        self.log_calls: list[tuple[int | None, dict[str, Any]]] = []
        self.settings: dict[str, Any] = {}
        self.started = self.finished = False
        Fake.made.append(self)

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=self.how.get("run_id") or "given-by-server"))

    def start(self) -> None:
        self.started = True

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.log_calls.append((step, values))

    def finish(self) -> None:
        self.finished = True


class FakeWandB(Fake):
    """It takes pictures as arrays."""

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.log_calls.append((step, {name: [image.shape for image in images] for name, images in values.items()}))


class FakeMLflow(Fake):
    """It takes files."""

    def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
        self.log_calls.append((None, {artifact_path or "": Path(local_path).name}))


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake.made = []
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", FakeWandB)
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "mlflow", FakeMLflow)


def epoch(number: int) -> dict[str, Any]:
    return {"epoch": number, "global_step": 10 * number, "raw_loss_mean": 1 / number, "nested": {"a": 2}, "no": None}


def session(name: str, run: Path, *epochs: int) -> Fake:
    """One session of a run that goes through these epochs."""
    service = Service(name, run, "brains", SETTINGS)
    for number in epochs:
        service.write(epoch(number))
    service.close()
    return Fake.made[-1]


# --- what is asked for -------------------------------------------------------------------------------------------


def test_a_missing_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.MLFLOW])
    check_installed([])
    check_installed(["mlflow"])
    with pytest.raises(UserError, match="wandb, which is not installed") as caught:
        check_installed(["mlflow", "wandb"])
    assert "pip install wandb" in caught.value.hint
    assert "--track wandb" in caught.value.hint


def test_a_service_that_does_not_start_tells_how_to_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Fake) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(FakeWandB, "start", refuse)
    with pytest.raises(UserError, match="wandb did not start: no route to host") as caught:
        Service("wandb", tmp_path / "run", "brains", SETTINGS)
    assert "WANDB_MODE=offline" in caught.value.hint


# --- what is sent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_numbers_and_settings_are_sent_under_flat_names(tmp_path: Path, name: str) -> None:
    fake = session(name, tmp_path / "tiny", 1, 2)
    assert fake.project == "brains"
    assert fake.started
    assert fake.finished
    assert fake.settings == {
        "preset": "demo", "training.lr": 0.1, "training.betas": "[0.9, 0.95]", "training.clip": None,
    }  # fmt: skip
    assert fake.log_calls == [
        (10, {"raw_loss_mean": 1.0, "nested/a": 2.0}),
        (20, {"raw_loss_mean": 0.5, "nested/a": 2.0}),
    ]


def test_the_run_is_called_like_its_folder(tmp_path: Path) -> None:
    assert session("wandb", tmp_path / "tiny").how["name"] == "tiny"
    assert session("mlflow", tmp_path / "tiny").how["run_name"] == "tiny"


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("wandb", (10, {"samples/decoded": [(4, 6, 3)]})),
        ("mlflow", (None, {"samples/decoded/00000010": "epoch_0001.png"})),
    ],
)
def test_pictures_are_sent_as_the_service_takes_them(tmp_path: Path, name: str, sent: Any) -> None:
    file = tmp_path / "epoch_0001.png"
    Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8)).save(file)
    Service(name, tmp_path / "run", "brains", SETTINGS).picture("samples/decoded", file, 10)
    assert Fake.made[-1].log_calls == [sent]


# --- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("mlflow", "run_id")])
def test_a_resumed_run_goes_on_in_the_same_run_there(tmp_path: Path, name: str, key: str) -> None:
    first, second = session(name, tmp_path, 1, 2), session(name, tmp_path, 3)
    kept = json.loads((tmp_path / "logs" / f"{name}.json").read_text())
    assert second.how[key] == kept["run_id"]
    assert second.how[key] == (first.how["id"] if name == "wandb" else "given-by-server")
    assert second.settings == {}  # MLflow refuses to change a parameter
    assert kept["global_step"] == 30
    assert session(name, tmp_path / "other").how[key] != kept["run_id"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_was_sent_before_a_kill_is_not_sent_again(tmp_path: Path, name: str) -> None:
    file = tmp_path / "p.png"
    Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8)).save(file)
    killed = Service(name, tmp_path, "brains", SETTINGS)
    for number in (1, 2):
        killed.write(epoch(number))
    resumed = Service(name, tmp_path, "brains", SETTINGS)  # from a checkpoint of the first epoch
    for number in (2, 3):
        resumed.write(epoch(number))
        resumed.picture("samples/decoded", file, 10 * number)
    calls = Fake.made[-1].log_calls
    assert [step for step, values in calls if "raw_loss_mean" in values] == [30]
    assert len(calls) == 2  # and the picture of that epoch


# --- the real ones -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mlflow_itself_keeps_one_run_with_each_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is optional: pip install neuromf[track]")
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "p.png"
    Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8)).save(file)
    for epochs in ((1, 2), (2, 3)):
        service = Service("mlflow", tmp_path / "tiny", "brains", SETTINGS)
        for number in epochs:
            service.write(epoch(number))
        service.picture("samples/decoded", file, 30)
        service.close()
    (found,) = mlflow.search_runs(experiment_names=["brains"], output_format="list")
    assert found.info.run_name == "tiny"
    assert found.data.params["training.lr"] == "0.1"
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "raw_loss_mean")
    assert [point.step for point in history] == [10, 20, 30]


@pytest.mark.slow
def test_wandb_itself_records_offline_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is optional: pip install neuromf[track]")
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for number in (1, 2):
        service = Service("wandb", tmp_path / "tiny", "brains", SETTINGS)
        service.write(epoch(number))
        service.close()
    run_id = json.loads((tmp_path / "tiny/logs/wandb.json").read_text())["run_id"]
    assert len(list((tmp_path / "tiny/logs/wandb").glob(f"offline-run-*/run-{run_id}.wandb"))) == 2
    assert "wandb" in sys.modules
