"""Called in the place of `neuromf`: writes what a stage would leave behind; fails or lingers when it is told to."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

verb, *words = sys.argv[1:]
settings = dict(word.split("=", 1) for word in words if "=" in word)
out = Path(words[words.index("--out") + 1])


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def stop(*_: object) -> None:
    print("saved")
    sys.exit(75)


for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
with Path(os.environ["STAND_IN_CALLS"]).open("a") as calls:
    calls.write(f"{verb} {' '.join(f'{key}={value}' for key, value in settings.items())}".strip() + "\n")
if verb == "train" and os.environ.get("STAND_IN_FAILS", "never") in words:
    print("before the last lines")
    print("error: the loss is not finite")
    sys.exit(3)
if verb == "train" and os.environ.get("STAND_IN_STOPS", "never") in words and not (out / "saved").exists():
    write(out / "saved", "half of it")
    stop()
if verb == "train":
    time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
    write(out / "settings.json", settings)
    write(out / "result.json", {"updates": 900, "seconds": 90.0})
elif verb == "sample":
    n, nfe = (int(words[words.index(option) + 1]) for option in ("--n", "--nfe"))
    write(out / "manifest.json", {"n": n, "nfe": nfe})
elif verb == "evaluate":
    samples = Path(words[0]).parent
    run = json.loads((samples.parent / "settings.json").read_text())
    nfe = json.loads((samples / "manifest.json").read_text())["nfe"]
    value = 5 * (run.get("objective.prediction") == '"u"') + float(run.get("objective.lp", 2)) + 1 / nfe
    value += 0.1 * int(run["training.seed"])
    record = {"value": value, "low": value - 0.2, "high": value + 0.2, "n": {"generated": 4, "real": 3}}
    write(out / "metrics.json", {"metrics": {"frechet_builtin": {**record, "better": "lower"}}, "not_computed": {}})
elif verb == "render":
    write(out / "renderings.csv", "file\n")
elif verb == "encode":
    write(out / "dataset.json", {"complete": True})
