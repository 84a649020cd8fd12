"""`neuromf sample`: a run in, latents (or volumes) with a manifest out; resumable, the same for any batch split."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor

from neuromf import __version__
from neuromf.errors import UserError, did_you_mean
from neuromf.files import atomic_path, read_json, remove_leftovers, write_json
from neuromf.generator import Generator, Solver, load
from neuromf.sampling.solvers import evaluations

Progress = Callable[[str, int, int], None]
MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "neuromf-samples", 1


class SampleReport(NamedTuple):
    """What was sampled; `failed` maps a decoded volume's name to what the quality check found.

    `planned` is what a dry run found missing.
    """

    out: Path
    n: int
    made: int
    nfe: int
    seconds: float
    failed: dict[str, str]
    planned: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `seconds_per_sample` counts network and writing, not decoding."""
        per_sample = self.seconds / self.made if self.made else None
        return {**self._asdict(), "out": str(self.out), "seconds_per_sample": per_sample}


def sample_path(folder: Path, index: int) -> Path:
    """Where the latent of sample `index` lies."""
    return folder / "latents" / f"sample_{index:06d}.pt"


def sample(
    run: str | None,
    n: int,
    *,
    nfe: int = 1,
    seed: int = 0,
    out: Path | None = None,
    batch_size: int = 8,
    solver: Solver = "auto",
    ema: str | float | None = None,
    where: Mapping[str, str] = MappingProxyType({}),
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    decode: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    runs: Path = Path("runs"),
) -> SampleReport:
    """Sample n latents of a trained run.

    Args:
        run: run folder, `builtin`, hub id; None is the newest finished run in `runs`.
        n: samples 0 ... n - 1.
        nfe: steps of the solver.
        seed: of the noise; sample i depends on (seed, i) only.
        out: `<run>/generated` when None. A folder of the same settings is completed.
        batch_size: network batches are aligned to blocks of this many indices.
        solver, ema, where, guidance, interval: see `Generator`.
        decode: also write the volumes.
        dry_run: check everything and say what is missing; write nothing.
        device: auto, cpu, cuda or mps.
        progress: callback (description, done, total).

    Raises:
        UserError: no run, a bad argument, or an output folder of other samples.
    """
    if n < 1 or batch_size < 1:
        raise UserError(f"--n {n} and --batch-size {batch_size} must be at least 1")
    source = run or str(newest_run(runs))
    generator = load(source, ema=ema, device=device)
    name = generator.solver(solver)
    if out is None and source == "builtin":
        out = Path("generated")
    folder = out or Path(generator.source.path) / "generated"
    how: dict[str, Any] = {"nfe": nfe, "seed": seed, "solver": name}
    conditions = {"where": dict(where), "guidance": guidance, "interval": list(interval)}
    generator.condition(1, where, guidance, interval)  # what it cannot be asked for is refused before anything is made
    manifest = _manifest(generator, nfe, seed, name, batch_size) | {"condition": conditions}
    _claim(folder, manifest, dry_run)
    if dry_run:
        missing = sum(not sample_path(folder, i).is_file() for i in range(n))
        return SampleReport(folder, n, 0, nfe, 0.0, {}, planned=missing)
    started = perf_counter()
    how |= {"where": where, "guidance": guidance, "interval": interval}
    made = _sample_blocks(generator, folder, n, how, batch_size, progress)
    seconds = perf_counter() - started
    _write_manifest(folder, manifest, n)
    failed: dict[str, str] = {}
    if decode:
        from neuromf.pipeline.decode import decode as decode_folder

        failed = decode_folder(folder, device=device, progress=progress).failed
    return SampleReport(folder, n, made, nfe, seconds, failed)


def _sample_blocks(
    generator: Generator,
    folder: Path,
    n: int,
    how: Mapping[str, Any],
    batch_size: int,
    progress: Progress | None,
) -> int:
    """Write the missing samples, block by block, this process's share; returns how many."""
    state = PartialState()
    remove_leftovers(folder / "latents")
    blocks = range(0, n, batch_size)
    made = 0
    for number in range(state.process_index, len(blocks), state.num_processes):
        start = blocks[number]
        missing = [i for i in range(start, min(start + batch_size, n)) if not sample_path(folder, i).is_file()]
        if missing:
            # The whole block is evaluated even if n or a restart cuts it, so that a sample's bits do not depend on it.
            latents = generator.sample_latents(range(start, start + batch_size), **how)
            for i in missing:
                _save(sample_path(folder, i), latents[i - start], i)
            made += len(missing)
        if progress:
            progress("sampling", min(start + batch_size, n), n)
    state.wait_for_everyone()
    return made


def _save(path: Path, latent: Tensor, index: int) -> None:
    # torch names the archive after the file it writes to; a buffer keeps the bytes independent of the name.
    buffer = io.BytesIO()
    torch.save({"z": latent.clone(), "metadata": {"index": index}}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def newest_run(runs: Path) -> Path:
    """The finished run in a folder of runs whose result was written last.

    Raises:
        UserError: no finished run; unfinished ones are named.
    """
    folders = [path for path in runs.glob("*") if (path / "config.yaml").is_file()] if runs.is_dir() else []
    finished = [path for path in folders if (path / "result.json").is_file()]
    if finished:
        return max(finished, key=lambda path: (path / "result.json").stat().st_mtime)
    if folders:
        names = [str(path) for path in folders]
        raise UserError(f"no run in {runs} is finished: {', '.join(names)}", f"name one: neuromf sample {names[0]}")
    raise UserError(f"there is no run in {runs}", "train one with `neuromf train`, or give its folder")


def _manifest(generator: Generator, nfe: int, seed: int, solver: str, batch_size: int) -> dict[str, Any]:
    data = generator.data
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "neuromf": __version__,
        "model": generator.source._asdict(),
        "objective": generator.config.objective.name,
        "nfe": evaluations(solver, nfe),
        "steps": nfe,
        "solver": solver,
        "seed": seed,
        "batch_size": batch_size,
        "latent_shape": list(generator.latent_shape),
        "autoencoder": data["autoencoder"],
        "preprocessing": data["preprocessing"],
        "affine": data["affine"],
        "statistics": data["statistics"],
    }


def _claim(folder: Path, manifest: dict[str, Any], dry_run: bool) -> None:
    """Write the manifest of a new folder, or check that the folder holds samples of the same settings."""
    path = folder / MANIFEST
    if path.exists():
        before = read_json(path)
        keys = ("objective", "nfe", "solver", "seed", "latent_shape", "condition")
        changed = [
            f"{key} {before.get(key)} there, {manifest[key]} now" for key in keys if before.get(key) != manifest[key]
        ]
        if before.get("model", {}).get("weights_sha256") != manifest["model"]["weights_sha256"]:
            changed.insert(0, "other model weights")
        if changed:
            raise UserError(f"{folder} holds other samples: {'; '.join(changed)}", "give another --out, or remove it")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no samples", "give another --out")
    if not dry_run:
        _write_manifest(folder, manifest, 0)


def _write_manifest(folder: Path, manifest: dict[str, Any], n: int) -> None:
    before = read_json(folder / MANIFEST).get("n", 0) if (folder / MANIFEST).exists() else 0
    write_json(folder / MANIFEST, {**manifest, "n": max(n, before)})


def load_sample(path: Path) -> tuple[int, Tensor]:
    """(index, latent (C, I, J, K)) of a file that `sample` wrote.

    Raises:
        UserError: damaged.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        return int(content["metadata"]["index"]), content["z"]
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable sample", "remove it and run `neuromf sample` again") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of samples.

    Raises:
        UserError: not a folder of samples.
    """
    if not (folder / MANIFEST).is_file():
        found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"{folder} holds no samples ({MANIFEST} is missing)", did_you_mean(MANIFEST, found[:10]))
    return read_json(folder / MANIFEST)
