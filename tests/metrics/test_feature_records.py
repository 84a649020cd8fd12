from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics.distances import frechet_distance, kid
from neuromf.metrics.feature_records import (
    frechet_baseline,
    frechet_name,
    frechet_record,
    kernel_records,
    manifold_records,
)

EXTRACTOR = SimpleNamespace(name="x", sha256="ab", preprocessing="none", planes=("volume",))


class _Set:
    """Features in memory: (N, D), or planes of (N, S, D)."""

    def __init__(self, features: Tensor | dict[str, Tensor]) -> None:
        self.values = features if isinstance(features, dict) else {"volume": features[:, None]}
        self.planes = tuple(self.values)

    def __len__(self) -> int:
        return len(self.values[self.planes[0]])

    def shape(self, plane: str) -> tuple[int, int, int]:
        return tuple(self.values[plane].shape)

    def plane(self, name: str, slices: Sequence[int] | None = None) -> Tensor:
        return self.values[name] if slices is None else self.values[name][:, list(slices)]

    def parts(self, name: str, volumes: Sequence[int]) -> Iterator[Tensor]:
        for i in volumes:
            yield self.values[name][i]

    def vectors(self) -> Tensor:
        return torch.cat([x.mean(1) for x in self.values.values()], dim=1)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_samples_of_the_real_distribution_are_as_good_as_real_ones() -> None:
    a, b = _Set(_normal(60, 4, seed=0)), _Set(_normal(120, 4, seed=1))
    records = frechet_baseline(a, b, EXTRACTOR)
    assert records["frechet_x_ratio"]["value"] == pytest.approx(1, abs=0.4)
    assert records["frechet_x_real_real"]["n"] == 60
    shifted = frechet_baseline(_Set(_normal(60, 4, seed=0) + 1), b, EXTRACTOR)
    assert shifted["frechet_x_ratio"]["value"] > 10


def test_a_covariance_of_too_few_items_is_shrunk_and_says_so() -> None:
    def covariance(n: int) -> str:
        return frechet_record(_Set(_normal(n, 8, seed=0)), _Set(_normal(9, 8, seed=1)), EXTRACTOR)["frechet_x"][
            "covariance"
        ]

    assert covariance(9) == "sample"
    assert covariance(8) == "shrunk"


def test_three_real_volumes_give_no_baseline() -> None:
    with pytest.raises(UserError, match="4 real"):
        frechet_baseline(_Set(_normal(9, 2, seed=0)), _Set(_normal(3, 2, seed=1)), EXTRACTOR)


def test_numbers_of_planes_are_their_mean_and_are_listed() -> None:
    a, b = ({p: _normal(12, 3, 2, seed=s + i) for i, p in enumerate(("axial", "coronal"))} for s in (0, 10))
    entry = frechet_record(_Set(a), _Set(b), EXTRACTOR)["frechet_x"]
    for plane in a:
        assert entry["planes"][plane] == pytest.approx(frechet_distance(a[plane], b[plane]))
    assert entry["value"] == pytest.approx(sum(entry["planes"].values()) / 2)
    assert entry["n"] == {"generated": 12, "real": 12}
    kernels = kernel_records(_Set(a), _Set(b), EXTRACTOR)
    expected = [kid(a[plane], b[plane]) for plane in a]
    assert kernels["kid_x"]["value"] == pytest.approx(sum(e.value for e in expected) / 2)
    without = sum(e.without_b for e in expected) / 2
    torch.testing.assert_close(kernels["kid_x"]["values"]["real"], without)
    assert kernels["mmd_x"]["bandwidth"] > 0


def test_kernel_distances_see_four_slices_of_many() -> None:
    a, b = _normal(6, 12, 2, seed=0), _normal(7, 12, 2, seed=1)
    thinned = kid(a[:, [1, 4, 7, 10]], b[:, [1, 4, 7, 10]])
    assert kernel_records(_Set({"axial": a}), _Set({"axial": b}), EXTRACTOR)["kid_x"]["value"] == thinned.value


def test_every_record_says_its_extractor_hash_preprocessing_and_n() -> None:
    a, b = _Set(_normal(12, 3, seed=0)), _Set(_normal(14, 3, seed=1))
    records = {
        **frechet_record(a, b, EXTRACTOR),
        **frechet_baseline(a, b, EXTRACTOR),
        **kernel_records(a, b, EXTRACTOR),
        **manifold_records(a, b, EXTRACTOR),
    }
    assert len(records) == 10
    for entry in records.values():
        assert (entry["extractor"], entry["weights_sha256"], entry["features_preprocessing"]) == ("x", "ab", "none")
        assert entry["n"]


def test_only_distances_of_published_networks_are_called_fid() -> None:
    assert frechet_name("inception") == "fid_inception"
    assert frechet_name("medicalnet-50") == "fid_medicalnet_50"
    assert frechet_name("builtin") == "frechet_builtin"
    assert frechet_name("own") == "frechet_own"


def test_features_that_do_not_fit_in_memory_give_the_same_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [_Set({"axial": _normal(n, 6, 3, seed=n)}) for n in (11, 14)]
    whole = frechet_record(*sets, EXTRACTOR) | frechet_baseline(*sets, EXTRACTOR)
    monkeypatch.setattr("neuromf.metrics.feature_records._IN_MEMORY_BYTES", 0)
    streamed = frechet_record(*sets, EXTRACTOR) | frechet_baseline(*sets, EXTRACTOR)
    for name, entry in whole.items():
        assert entry["covariance"] == "sample"
        assert streamed[name]["value"] == pytest.approx(entry["value"], rel=1e-9), name
    few = _Set({"axial": _normal(2, 1, 3, seed=0)}), _Set({"axial": _normal(5, 1, 3, seed=1)})
    assert frechet_record(*few, EXTRACTOR)["frechet_x"]["covariance"] == "shrunk"


def test_the_bandwidth_does_not_depend_on_the_generated_set() -> None:
    real = _Set(_normal(12, 3, seed=1))
    bandwidths = {
        kernel_records(_Set(_normal(9, 3, seed=0) * scale), real, EXTRACTOR)["mmd_x"]["bandwidth"] for scale in (1, 9)
    }
    assert len(bandwidths) == 1
