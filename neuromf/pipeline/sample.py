"""`neuromf sample`: a run in, latents or volumes out; resumable, and the same for any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import Tensor

from neuromf import __version__
from neuromf.errors import UserError
from neuromf.files import remove_leftovers
from neuromf.generator import Generator, Solver, load
from neuromf.models.mask_codec import PAIR
from neuromf.pipeline.decode import Decoder, Decoding
from neuromf.pipeline.latent_sources import Samples
from neuromf.pipeline.sample_folder import (
    FORMAT,
    FORMAT_VERSION,
    IDENTITY,
    MANIFEST,
    sample_path,
    save_sample,
    sound_sample,
    write_manifest,
)
from neuromf.pipeline.sharing import Arrivals, Share, claim, take_own_gpu
from neuromf.sampling.solvers import evaluations

Progress = Callable[[str, int, int], None]


class SampleReport(NamedTuple):
    """What was sampled; `failed` maps a decoded volume's name to what the quality check found.

    `made` and `seconds` are those of this process; `planned` is what a dry run found missing.
    """

    out: Path
    n: int
    made: int
    nfe: int
    seconds: float
    failed: dict[str, str]
    planned: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `seconds_per_sample` counts all there was to do with a sample, decoding too."""
        per_sample = self.seconds / self.made if self.made else None
        return {**self._asdict(), "out": str(self.out), "seconds_per_sample": per_sample}


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
    checkpoint: Literal["newest", "best"] = "newest",
    where: Mapping[str, str] = MappingProxyType({}),
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    decoding: Decoding | None = None,
    keep_latents: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    runs: Path = Path("runs"),
) -> SampleReport:
    """Sample n latents of a trained run, or volumes.

    Every process of a launcher takes its share of the batches; the main one waits for the others and finishes.

    Args:
        run: run folder, `builtin`, hub id; None is the newest finished run in `runs`.
        n: samples 0 ... n - 1.
        nfe: steps of the solver.
        seed: of the noise; sample i depends on (seed, i) only.
        out: `<run>/generated` when None. A folder of the same settings is completed; damaged files are redone.
        batch_size: network batches are aligned to blocks of this many indices.
        solver, ema, checkpoint, where, guidance, interval: see `Generator` and `load`.
        decoding: write volumes into `<out>/volumes`, the same as `decode` would.
        keep_latents: also write the latents then.
        dry_run: check everything and say what is missing; write nothing.
        device: auto, cpu, cuda or mps.
        progress: callback (description, done, total).

    Raises:
        UserError: no run, a bad argument, or an output folder of other samples.
    """
    if n < 1 or batch_size < 1:
        raise UserError(f"--n {n} and --batch-size {batch_size} must be at least 1")
    take_own_gpu(device)
    source = run or str(newest_run(runs))
    generator = load(source, ema=ema, checkpoint=checkpoint, device=device)
    name = generator.solver(solver)
    if out is None and source == "builtin":
        out = Path("generated")
    folder = out or Path(generator.source.path) / "generated"
    condition: dict[str, Any] = {"where": where, "guidance": guidance, "interval": interval}
    generator.condition(1, **condition)  # what it cannot be asked for is refused before anything is made
    manifest = _manifest(generator, nfe, seed, name, batch_size) | {
        "condition": {"where": dict(where), "guidance": guidance, "interval": list(interval)}
    }
    claim(folder, MANIFEST, manifest, IDENTITY, "samples", dry_run=True)
    samples = Samples(folder, manifest, range(n))
    decoder = Decoder(samples, folder / "volumes", decoding, device) if decoding else None
    how = {"nfe": nfe, "seed": seed, "solver": name, **condition}
    work = _Work(generator, samples, how, decoder, keep=keep_latents or decoder is None)
    if dry_run:
        return SampleReport(folder, n, 0, nfe, 0.0, {}, planned=sum(any(work.missing(i)) for i in range(n)))
    claim(folder, MANIFEST, {**manifest, "n": 0}, IDENTITY, "samples")
    started_s, share = time.perf_counter(), Share.own()
    with decoder or nullcontext():
        made = work.do(n, batch_size, share, progress)
    failed = work.finish(n) if share.main else {}
    return SampleReport(folder, n, made, nfe, time.perf_counter() - started_s, failed)


class _Missing(NamedTuple):
    """What of a sample has to be written."""

    latent: bool
    volume: bool


class _Work:
    """What is done to every sample: latent, volume, or both; whatever is there already stays.

    Args:
        generator: makes the latents.
        samples: folder and manifest.
        how: arguments of `Generator.sample_latents`.
        decoder: None where no volumes are asked for.
        keep: whether latents are written.
    """

    def __init__(
        self, generator: Generator, samples: Samples, how: Mapping[str, Any], decoder: Decoder | None, keep: bool
    ) -> None:
        self.generator, self.samples, self.how = generator, samples, how
        self.decoder, self.keep = decoder, keep
        self._arrivals = Arrivals(
            lambda index: sample_path(samples.folder, index), lambda index: self._on_disk(index) is not None
        )

    def missing(self, index: int) -> _Missing:
        """What of a sample is not there, or damaged."""
        latent = self.keep and self._on_disk(index) is None
        return _Missing(latent, self.decoder is not None and not self.decoder.has(index))

    def do(self, n: int, batch_size: int, share: Share, progress: Progress | None) -> int:
        """Write what is missing in this process's share of the blocks; returns of how many samples."""
        made = 0
        for start in range(0, n, batch_size):
            end = min(start + batch_size, n)
            if share.has(start // batch_size):
                missing = {index: self.missing(index) for index in range(start, end)}
                missing = {index: parts for index, parts in missing.items() if any(parts)}
                if missing:
                    with self._arrivals.block():
                        self._make(range(start, start + batch_size), missing)
                made += len(missing)
            if progress:
                progress("sampling", end, n)
        return made

    def _make(self, block: range, missing: Mapping[int, _Missing]) -> None:
        latents = self._latents(block, missing)
        for index, parts in missing.items():
            if parts.latent:
                save_sample(sample_path(self.samples.folder, index), latents[index], index)
        if self.decoder:
            wanted = [index for index, parts in missing.items() if parts.volume]
            self.decoder.add({index: self.samples.of(index, latents[index]) for index in wanted})

    def _latents(self, block: range, missing: Mapping[int, _Missing]) -> Mapping[int, Tensor]:
        """Those of an earlier call where all are there, else computed."""
        found = {index: self._on_disk(index) for index, parts in missing.items() if not parts.latent}
        there = {index: latent for index, latent in found.items() if latent is not None}
        if len(there) == len(missing):
            return there
        # The whole block is evaluated even if n or a restart cuts it, so that a sample's bits do not depend on it.
        return dict(zip(block, self.generator.sample_latents(block, **self.how), strict=True))

    def _on_disk(self, index: int) -> Tensor | None:
        return sound_sample(self.samples.folder, index, self.samples.latent_shape)

    def finish(self, n: int) -> dict[str, str]:
        """Wait for other processes, and write what there is one of; returns what the check found."""
        if self.keep:
            self._arrivals.wait(range(n), "samples")
            remove_leftovers(self.samples.folder / "latents")
        failed = self.decoder.finish(range(n), self._arrivals.slowest_s) if self.decoder else {}
        write_manifest(self.samples.folder, self.samples.manifest, n)
        return failed


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
        **({PAIR: data[PAIR]} if generator.pair else {}),
    }
