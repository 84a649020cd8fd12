"""`neuromf evaluate`: compare a folder of generated volumes with a folder of real ones, offline.

Every number carries its N, its interval where it has one, and the extractor by name and hash; what cannot be
computed here is listed with the reason. A further family of metrics is one more `measure` function that
fills `Results`; what is measured on features is in `evaluation_features`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuromf.data.latents import LatentStatistics
from neuromf.data.moments import ChannelMoments
from neuromf.data.preprocessing import Preprocessing
from neuromf.data.volume_sets import Grid, VolumeSet, evenly, find_volumes, first_grid, read_volume_set
from neuromf.errors import UserError
from neuromf.metrics import protocol
from neuromf.metrics.features import batches
from neuromf.metrics.protocol import Record
from neuromf.metrics.similarity import ms_ssim_scales, nearest_similarity, pairwise_diversity
from neuromf.metrics.spectrum import AXES, spectra, spectrum_distance
from neuromf.models.extractors import Lpips
from neuromf.pipeline.baselines import Model, model_of
from neuromf.pipeline.evaluate_pairs import measure_pairs
from neuromf.pipeline.evaluation_cleaning import AsEncoded
from neuromf.pipeline.evaluation_features import BUILTIN, check_features, contribute_features, lpips, measure_features
from neuromf.pipeline.evaluation_morphology import (
    Morphology,
    check_morphology,
    contribute_morphology,
    measure_morphology,
)
from neuromf.pipeline.evaluation_report import (
    METRICS_FILE,
    TABLE_FILE,
    EvaluateReport,
    Plots,
    Results,
    Settings,
    write_report,
)
from neuromf.pipeline.evaluation_run import Autoencoder, Progress, Run
from neuromf.pipeline.sharing import Share
from neuromf.pipeline.workers import ahead

__all__ = ["Autoencoder", "EvaluateReport", "GeneratedLatents", "Morphology", "evaluate"]

Source = str | Path | Sequence[str | Path]

FEATURES = (BUILTIN,)
CACHE = ".features"
_DIVERSITY_PAIRS = 64


class GeneratedLatents(NamedTuple):
    """A folder of generated latents (`*.pt`, unwhitened) and the training split's statistics."""

    folder: Path
    training: LatentStatistics


def evaluate(
    generated: Source,
    real: Source,
    *,
    autoencoder: Autoencoder,
    train: Source | None = None,
    out: Path | None = None,
    latents: GeneratedLatents | None = None,
    preprocessing: Preprocessing | None = None,
    clean: AsEncoded | None = None,
    features: Sequence[str] = FEATURES,
    morphology: Morphology | None = None,
    pairs: Path | None = None,
    cache: Path | None = None,
    batch_size: int = 4,
    workers: int = 1,
    seed: int = 0,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> EvaluateReport:
    """Compare generated volumes with held-back real ones; write metrics.json, metrics.md, tables and pictures.

    Every process of a launcher computes its part of the features and segmentations; the main one waits for them and
    measures. What another one returns is an empty report.

    Args:
        generated: a folder of NIfTI volumes (ours, or a peer's), searched below too; or a list of files.
        real: volumes that training did not see; brought to the generated grid where they lie on another.
        autoencoder: its encoder gives the "builtin" features.
        train: the training volumes, for the memorisation audit.
        out: where to write; `<generated>/evaluation` when None.
        latents: generated latents and training statistics, to compare the two.
        preprocessing: how `real` and `train` are brought to the grid (the run's own settings).
        clean: what is done to them before it (the latents' own skull stripping and N4).
        features: names of `evaluation_features`: "builtin", published networks, "module:FILE.py", "lpips".
        morphology: by what anatomy is measured; None does not.
        pairs: a folder of encoded pairs: the masks beside the generated volumes are compared with theirs.
        cache: where features and segmentations of volumes are kept, which any evaluation may share; `<out>/.features`
            when None.
        batch_size: volumes a network sees at once.
        workers: processes that read volumes.
        seed: keys the bootstrap, the random halves and pairs.
        limit: use at most this many volumes of each set, evenly spread.
        device: where networks run.
        progress: called with (description, done, total).

    Raises:
        UserError: a folder is empty or holds nothing usable, generated volumes of different grids, a size
            the autoencoder cannot take, or features or a segmentation of an unknown name.
    """
    names = check_features(features)
    check_morphology(morphology)
    model = model_of(Path(generated)) if isinstance(generated, str | Path) else Model("listed files")
    paths = _find(generated, real, train, limit)
    out = _out_folder(generated, out)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=out) as scratch:
        tell = progress or (lambda *_: None)
        grid = first_grid(paths["generated"])
        if BUILTIN in names:
            autoencoder.check_size(grid.size)
        reading = partial(_read, paths, grid, Path(scratch), preprocessing, clean, workers, tell)
        share = Share.own()
        run = Run(reading(), Results(), autoencoder, names, cache or out / CACHE, batch_size, seed, device, tell, share)
        if not share.main:
            contribute_features(run)
            contribute_morphology(run, morphology)
            return EvaluateReport({}, out / METRICS_FILE, out / TABLE_FILE, [], [])
        measure_features(run)
        measure_morphology(run, morphology)
        if pairs is not None:
            measure_pairs(run, pairs)
        _measure_similarity(run)
        frequency, power = _measure_spectrum(run)
        densities = _measure_intensity(run)
        _measure_latents(run, latents)
        _note_treatment(run, preprocessing, latents)
        cleaning = clean.cleaning.identity if clean is not None else None
        settings = Settings(autoencoder.name, autoencoder.sha256, seed, limit, preprocessing, cleaning, model)
        return write_report(out, run.sets, run.results, Plots(frequency, power, densities), settings)


def _find(generated: Source, real: Source, train: Source | None, limit: int | None) -> dict[str, list[Path]]:
    """Files of each set. No limit on the training set: it would miss the neighbours the audit looks for."""
    paths = {"generated": evenly(find_volumes(generated), limit), "real": evenly(find_volumes(real), limit)}
    return paths if train is None else paths | {"train": find_volumes(train)}


def _out_folder(generated: Source, out: Path | None) -> Path:
    if out is None:
        if not isinstance(generated, str | Path):
            raise UserError("no output folder for a list of files", "name one with `out`")
        folder = Path(generated)
        out = (folder if folder.is_dir() else folder.parent) / "evaluation"
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}", "choose another with --out") from error
    return Path(out)


def _read(
    paths: dict[str, list[Path]],
    grid: Grid,
    scratch: Path,
    preprocessing: Preprocessing | None,
    clean: AsEncoded | None,
    workers: int,
    tell: Progress,
) -> dict[str, VolumeSet]:
    """The sets by name, all on the generated set's grid."""
    return {
        name: read_volume_set(
            files,
            grid,
            scratch=scratch,
            preprocessing=preprocessing,
            clean=clean if name != "generated" else None,
            strict_grid=name == "generated",
            mapping=partial(ahead, workers=workers),
            progress=partial(tell, f"reading {name}"),
        )
        for name, files in paths.items()
    }


def _measure_similarity(run: Run) -> None:
    """SSIM, PSNR and LPIPS to the nearest real volume; MS-SSIM within each set as (lack of) diversity."""
    generated, real = run.sets["generated"].array, run.sets["real"].array
    size = run.sets["generated"].grid.size
    perceived = lpips(run)

    of_generated: dict[str, Any] = {"seed": run.seed, "of": "generated", "n": run.counts()}

    def nearest() -> dict[str, Record]:
        tell = partial(run.tell, "nearest real volume")
        found = nearest_similarity(generated, real, lpips=perceived, progress=tell)
        psnr_db = found.psnr_db.clamp(max=100.0)  # a copy would have an infinite one
        records = {} if found.lpips is None or perceived is None else _lpips_record(run, perceived, found.lpips)
        return records | {
            "ssim_nearest": protocol.mean_record(found.ssim, "higher", **of_generated),
            "psnr_nearest_db": protocol.mean_record(psnr_db, "higher", **of_generated),
        }

    def diversity(name: str) -> dict[str, Record]:
        values = pairwise_diversity(run.sets[name].array, pairs=_DIVERSITY_PAIRS, seed=run.seed)
        counts = {"volumes": len(run.sets[name]), "pairs": len(values)}
        entry = protocol.mean_record(values, "equal", seed=run.seed, n=counts, scales=ms_ssim_scales(size))
        return {f"ms_ssim_pairs_{name}": entry}

    run.results.attempt("ssim_nearest", nearest)
    run.results.attempt("ms_ssim_pairs_generated", lambda: diversity("generated"))
    run.results.attempt("ms_ssim_pairs_real", lambda: diversity("real"))


def _lpips_record(run: Run, perceived: Lpips, values: Tensor) -> dict[str, Record]:
    entry = protocol.mean_record(values, "lower", seed=run.seed, of="generated", n=run.counts())
    about = {"extractor": perceived.name, "weights_sha256": perceived.sha256}
    return {"lpips_nearest": entry | about | {"features_preprocessing": perceived.preprocessing}}


def _measure_spectrum(run: Run) -> tuple[Tensor, dict[str, Tensor]]:
    """Distance of the mean spectra, radial and along the axes, and the share of energy above half the Nyquist."""
    spacing = run.sets["generated"].grid.spacing_mm
    frequency = torch.empty(0)
    power: dict[str, Tensor] = {}
    along: dict[str, list[Tensor]] = {}
    for name in ("generated", "real"):
        parts = []
        for batch in batches(run.sets[name].array, run.batch_size):
            parts.append(spectra(batch, spacing, window="hann"))
            run.tell(f"spectra of {name}", min(len(parts) * run.batch_size, len(run.sets[name])), len(run.sets[name]))
        frequency, power[name] = parts[0].radial.frequency, torch.cat([part.radial.power for part in parts])
        along[name] = [torch.cat([part.axes[axis].power for part in parts]) for axis in range(3)]
        share = protocol.mean_record(
            torch.cat([part.high_share for part in parts]),
            "equal",
            seed=run.seed,
            of=name,
            cutoff_cycles_per_mm=0.25 / max(spacing),
        )
        run.results.add({f"high_frequency_energy_{name}": share})
    distance = spectrum_distance(power["generated"], power["real"], seed=run.seed)
    axes = {
        axis: spectrum_distance(along["generated"][i], along["real"][i], seed=run.seed).value
        for i, axis in enumerate(AXES)
    }
    entry = protocol.record(distance, "lower", n=run.counts(), unit="log10 power", axes=axes)
    run.results.add({"spectrum_distance": entry})
    return frequency, power


def _measure_intensity(run: Run) -> dict[str, list[float]]:
    """Intensity statistics, and the densities for the plot; says where scaling hides brightness."""
    arrays = run.sets["generated"].array, run.sets["real"].array
    records, densities = protocol.intensity_records(*arrays, seed=run.seed)
    run.results.add(records)
    for name, volumes in run.sets.items():
        if volumes.scales.get("percentiles"):
            run.results.notes.append(
                f"{volumes.scales['percentiles']} of {len(volumes)} {name} volumes were scaled by their own"
                " percentiles: differences of overall brightness are not visible"
            )
        if len(volumes.scales) > 1:
            ways = ", ".join(f"{count} {way}" for way, count in volumes.scales.items())
            run.results.notes.append(
                f"the {name} volumes reached the intensity scale in different ways ({ways}), so that every number"
                " mixes scales: give the set one scale, or sidecars with IntensityRange"
            )
    return densities


def _note_treatment(run: Run, preprocessing: Preprocessing | None, latents: GeneratedLatents | None) -> None:
    """Say so where volumes of ours are compared with scans of which it is not known how training treated them."""
    real = run.sets["real"]
    if latents is not None and preprocessing is None and (real.resampled or "percentiles" in real.scales):
        run.results.notes.append(
            "the real scans were brought to the grid by default settings, without the skull stripping, N4 and"
            " preprocessing that the training scans may have had: give the latents' folder (--latents)"
        )


def _measure_latents(run: Run, latents: GeneratedLatents | None) -> None:
    """Per-channel moments of the generated latents, whitened with the training statistics."""
    if latents is None:
        run.results.not_computed["latents"] = "no generated latents and training statistics were given"
        return

    def measure() -> dict[str, Record]:
        moments, n = _whitened_moments(latents)
        kept = {name: getattr(moments, name) for name in ("mean", "std", "skewness", "kurtosis")}
        run.results.details["latents_whitened"] = {
            "n": n,
            **{name: [v if math.isfinite(v) else None for v in x.tolist()] for name, x in kept.items()},
            "training_skewness": list(latents.training.skewness),
            "training_kurtosis": list(latents.training.kurtosis),
        }
        common = {"low": None, "high": None, "n": n, "better": "equal"}
        return {
            "latent_abs_mean_max": {"value": float(moments.mean.abs().max()), "training": 0.0, **common},
            "latent_std_min": {"value": float(moments.std.min()), "training": 1.0, **common},
            "latent_std_max": {"value": float(moments.std.max()), "training": 1.0, **common},
        }

    run.results.attempt("latents", measure)


def _whitened_moments(latents: GeneratedLatents) -> tuple[ChannelMoments, int]:
    """Moments per channel over all generated latents, read one at a time, and how many there are."""
    paths = sorted(Path(latents.folder).glob("*.pt"))
    if not paths:
        raise UserError(f"{latents.folder} holds no latents (.pt)")
    moments = ChannelMoments(len(latents.training.mean))
    for path in paths:
        z = _latent(path)
        if len(z) != len(latents.training.mean):
            raise UserError(f"{path} has {len(z)} channels, the training statistics {len(latents.training.mean)}")
        z = latents.training.whiten(z)
        moments.update(z, torch.zeros_like(z))
    return moments, len(paths)


def _latent(path: Path) -> Tensor:
    """z (C, i, j, k) float32 of a latent file: a dictionary with "z", or the tensor itself."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not a readable latent file ({str(error).splitlines()[0]})") from error
    z = content.get("z") if isinstance(content, dict) else content
    if not isinstance(z, Tensor) or z.ndim != 4:
        raise UserError(f"{path} holds no latent (C, I, J, K) under 'z'")
    return z.float()
