"""Services that a run's figures are sent to when they are asked for, through Accelerate's trackers.

Which run it is there is kept in `logs/<service>.json`, with the last update that was sent: a resumed run goes on
there, and sends nothing twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from neuromf.errors import UserError
from neuromf.files import read_json, write_json
from neuromf.training.telemetry import numbers, pixels

OFFLINE = {
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline and send the records later with `wandb sync`",
    "mlflow": "set MLFLOW_TRACKING_URI to a server that answers, or to a folder, as in file:./mlruns",
}


def check_installed(services: Sequence[str]) -> None:
    """Refuse services whose package is not there.

    Raises:
        UserError: with what to install.
    """
    there = [str(name) for name in get_available_trackers()]
    missing = [name for name in services if name not in there]
    if missing:
        raise UserError(
            f"tracking needs the package {' and '.join(missing)}, which is not installed",
            f"pip install {' '.join(missing)} (or neuromf[track]), or train without --track {missing[0]}",
        )


class Service:
    """A run in one service.

    Args:
        name: wandb or mlflow.
        run: the run folder; its name is the run's.
        project: the service's project or experiment.
        settings: resolved, nested; recorded when the run begins there.

    Raises:
        UserError: it does not start.
    """

    def __init__(self, name: str, run: Path, project: str, settings: Mapping[str, Any]) -> None:
        self.name, self.file = name, run / "logs" / f"{name}.json"
        known = read_json(self.file) if self.file.exists() else {}
        self.run_id: str | None = known.get("run_id")
        self.sent: int = known.get("global_step", -1)
        begins = self.run_id is None
        try:
            self.tracker = self._start(run, project)
            if begins:
                self.tracker.store_init_configuration(_flat(settings))
        except Exception as error:  # each service has its own exceptions
            raise UserError(
                f"{name} did not start: {error}", f"{OFFLINE[name]}; or leave out --track {name}"
            ) from error
        self._last = self.sent
        self._remember()

    def _start(self, run: Path, project: str) -> GeneralTracker:
        tracker_class = LOGGER_TYPE_TO_CLASS[self.name]
        if self.name == "wandb":
            self.run_id = self.run_id or uuid.uuid4().hex[:12]
            folder = run / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            tracker = tracker_class(project, id=self.run_id, resume="allow", name=run.name, dir=str(folder))
        else:
            tracker = tracker_class(project, run_id=self.run_id, run_name=run.name)
        if hasattr(tracker, "start"):  # in older versions of Accelerate the constructor does
            tracker.start()
        if self.name == "mlflow":
            self.run_id = tracker.tracker.info.run_id
        return tracker

    def write(self, summary: Mapping[str, Any]) -> None:
        """Send the numbers of an epoch that was not sent before."""
        step = summary["global_step"]
        if step > self.sent:
            self.tracker.log(numbers(summary), step=step)
            self._last = step
            self._remember()

    def picture(self, name: str, file: Path, step: int) -> None:
        """Send a picture that lies in the run folder."""
        if step <= self.sent:
            return
        if hasattr(self.tracker, "log_images"):
            self.tracker.log_images({name: [pixels(file)]}, step=step)
        else:
            self.tracker.log_artifact(str(file), artifact_path=f"{name}/{step:08d}")

    def close(self) -> None:
        """Wait until everything is sent."""
        self.tracker.finish()

    def _remember(self) -> None:
        write_json(self.file, {"run_id": self.run_id, "global_step": self._last})


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names; sequences as text, for services take plain values alone."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | int | float | None) else str(value)
    return flat
