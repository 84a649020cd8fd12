"""The autoencoder of latents is known by its hash, whatever it is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuromf.errors import UserError
from neuromf.files import sha256_file
from neuromf.generator import matching_autoencoder
from neuromf.models.autoencoder import BUILTIN_WEIGHTS
from neuromf.models.kl_network import MAISI, build_kl_network


@pytest.fixture
def two_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """Both MAISI autoencoders in a weights folder (random weights), as latents made with them record them."""
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path))
    recorded = {}
    for seed, (name, file) in enumerate({"maisi": "autoencoder_v1.pt", "maisi-v2": "autoencoder_v2.pt"}.items()):
        torch.manual_seed(seed)
        torch.save(build_kl_network(MAISI).state_dict(), tmp_path / file)
        recorded[name] = {"name": name, "sha256": sha256_file(tmp_path / file)}
    return recorded


def test_latents_find_the_autoencoder_they_were_made_with(two_versions: dict[str, dict[str, str]]) -> None:
    for name, recorded in two_versions.items():
        found = matching_autoencoder(recorded, device="cpu")
        assert (found.name, found.sha256) == (name, recorded["sha256"])


def test_another_version_is_refused_by_its_hash_under_any_name(
    two_versions: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    recorded = two_versions["maisi"]
    with pytest.raises(UserError, match="these latents were made by the autoencoder") as error:
        matching_autoencoder(recorded, weights=tmp_path / "autoencoder_v2.pt", device="cpu")
    assert "another decoder gives meaningless volumes" in error.value.hint
    with pytest.raises(UserError, match=two_versions["maisi-v2"]["sha256"][:12]):
        matching_autoencoder({**recorded, "name": "maisi-v2"}, device="cpu")


def test_the_builtin_one_is_refused_where_the_hash_is_another() -> None:
    assert matching_autoencoder({"name": "builtin", "sha256": sha256_file(BUILTIN_WEIGHTS)}, device="cpu")
    with pytest.raises(UserError, match=r"the one at hand has [0-9a-f]{12}"):
        matching_autoencoder({"name": "builtin", "sha256": "0" * 64}, device="cpu")
