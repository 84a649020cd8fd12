"""What `evaluate` measures on features: distances, precision and recall, copies of training volumes, LPIPS.

Features are named as on the command line: `builtin`, the published networks, `module:FILE[:FUNCTION]`, `lpips`. What
needs weights that are not here is not computed, and the reason with the next command stands in the report; nothing
else fails for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics import feature_records
from neuromf.metrics.features import EncoderFeatures, Extractor, FeatureSet, extract
from neuromf.metrics.memorization import audit, nearest_neighbours, pixel_codes
from neuromf.metrics.protocol import Record, audit_record
from neuromf.models.extractors import FOREIGN, LPIPS, USER_PREFIX, Lpips, check_name, load_extractor, load_lpips
from neuromf.pipeline.evaluation_run import Run
from neuromf.weights import find, found_path

BUILTIN = "builtin"
_PAIR = ("generated", "real")


def check_features(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once; the user's own functions are imported, so that a mistake in them costs nothing yet.

    Raises:
        UserError: a name of nothing, code that cannot be used, or two functions whose numbers would be called alike.
    """
    names = tuple(dict.fromkeys(names))
    for name in names:
        check_name(name)
    own = [feature_records.label(load_extractor(name)) for name in names if name.startswith(USER_PREFIX)]
    if twice := {name for name in own if own.count(name) > 1}:
        raise UserError(f"two functions of yours are in files called '{twice.pop()}'", "rename one of the files")
    return names


def measure_features(run: Run) -> None:
    """All distances of all features asked for, one extractor after the other; then the memorisation audit."""
    for name in run.features:
        if name != LPIPS and (extractor := _extractor(run, name)):
            run.results.reach(feature_records.frechet_name(extractor.name), partial(_measure_distances, run, extractor))
    for name in [name for name in FOREIGN if name not in run.features]:
        run.results.not_computed[feature_records.frechet_name(name)] = _not_asked(name, FOREIGN[name])
    _measure_copies(run)


def contribute_features(run: Run) -> None:
    """Compute this process's part of all features that `measure_features` needs, and no number."""
    for name in run.features:
        if name != LPIPS and (extractor := _extractor(run, name)):
            audited = name == BUILTIN and "train" in run.sets
            wanted = [*((of, False) for of in _PAIR), *([*((of, True) for of in _PAIR), ("train", False)] * audited)]
            for of, mirrored in wanted:
                compute = partial(_features, run, extractor, of, mirrored=mirrored)
                run.results.reach(feature_records.frechet_name(extractor.name), compute)


def lpips(run: Run) -> Lpips | None:
    """LPIPS where it was asked for and its weights are here."""
    if LPIPS not in run.features:
        run.results.not_computed["lpips_nearest"] = _not_asked(LPIPS, "lpips-alex")
        return None
    return run.results.reach("lpips_nearest", partial(load_lpips, run.device))


def _extractor(run: Run, name: str) -> Extractor | None:
    if name == BUILTIN:
        return EncoderFeatures(run.autoencoder, device=run.device)
    load = partial(load_extractor, name, run.device)
    return run.results.reach(feature_records.frechet_name(name), load) if name in FOREIGN else load()


def _not_asked(name: str, weights: str) -> str:
    here = found_path(find(weights)) is not None
    fetch = "" if here else f", after: neuromf weights fetch {weights}"
    return f"not asked for: --features {name}{fetch}"


def _measure_distances(run: Run, extractor: Extractor) -> None:
    generated, real = (_features(run, extractor, name) for name in _PAIR)
    measured = generated, real, extractor
    name, attempt = feature_records.frechet_name(extractor.name), run.results.attempt
    label = feature_records.label(extractor)
    measurements = {
        name: partial(feature_records.frechet_record, *measured),
        f"{name}_real_real": partial(feature_records.frechet_baseline, *measured, seed=run.seed),
        f"kid_{label}": partial(feature_records.kernel_records, *measured),
        f"precision_{label}": partial(feature_records.manifold_records, *measured, seed=run.seed),
    }
    for done, (metric, measure) in enumerate(measurements.items(), 1):
        attempt(metric, measure)
        run.tell(f"distances of {extractor.name} features", done, len(measurements))
    about = feature_records.about(extractor)
    dimension = generated.shape(generated.planes[0])[2]
    run.results.extractors[extractor.name] = about | {"dimension": dimension, "planes": list(generated.planes)}


def _features(run: Run, extractor: Extractor, name: str, *, mirrored: bool = False) -> FeatureSet:
    volumes = run.sets[name]
    return extract(
        _Mirrored(volumes.array) if mirrored else volumes.array,
        extractor,
        run.cache,
        keys=[f"{key}-mirrored" for key in volumes.keys] if mirrored else volumes.keys,
        batch_size=run.batch_size,
        share=run.part(f"{extractor.name} features"),
        progress=partial(run.tell, f"{extractor.name} features of {name}{', mirrored' if mirrored else ''}"),
    )


class _Mirrored(Sequence[np.ndarray]):
    """Volumes (1, I, J, K), left and right exchanged."""

    def __init__(self, volumes: Sequence[np.ndarray] | np.ndarray) -> None:
        self._volumes = volumes

    def __len__(self) -> int:
        return len(self._volumes)

    def __getitem__(self, i: Any) -> Any:
        return self._volumes[i][:, ::-1]


def _measure_copies(run: Run) -> None:
    """The memorisation audit by pixels and by the autoencoder's features, where there is a training set."""
    if "train" not in run.sets:
        run.results.not_computed["memorized_share"] = "no training volumes were given (--train FOLDER)"
        return
    codes = {name: pixel_codes(volumes.array) for name, volumes in run.sets.items()}
    _audit(run, "pixels", codes, codes["train"][0])
    if BUILTIN in run.features:
        extractor = EncoderFeatures(run.autoencoder, device=run.device)

        def vectors(name: str, *, mirrored: bool = False) -> Tensor:
            return _features(run, extractor, name, mirrored=mirrored).vectors()

        _audit(run, BUILTIN, {name: (vectors(name), vectors(name, mirrored=True)) for name in _PAIR}, vectors("train"))


def _audit(run: Run, kind: str, queries: dict[str, tuple[Tensor, Tensor]], references: Tensor) -> None:
    """Audit by one kind of vectors: `queries` are (as they are, mirrored) of the generated and real sets."""
    generated, real = (nearest_neighbours(*queries[name], references) for name in _PAIR)

    def measure() -> dict[str, Record]:
        result = audit(generated, real)
        run.results.details[f"flagged_{kind}"] = [str(run.sets["generated"].paths[i]) for i in result.flagged]
        run.results.details[f"closest_{kind}"] = [
            {
                "generated": str(run.sets["generated"].paths[i]),
                "train": str(run.sets["train"].paths[j]),
                "distance": distance,
                "mirrored": bool(generated.mirrored[i]),
                "index": [i, j],
            }
            for i, j, distance in result.closest
        ]
        return audit_record(result, name=kind)

    run.results.attempt(f"memorized_share_{kind}", measure)
