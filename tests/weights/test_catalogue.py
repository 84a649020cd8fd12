"""The catalogue says what is known, and nothing more."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest

from neuromf.errors import UserError
from neuromf.models.autoencoder import FOREIGN
from neuromf.weights import NOT_PINNED, Entry, entries, find, recognise
from neuromf.weights.catalogue import Licence

PROMISED = (
    *("maisi", "maisi-v2", "rflow-mr", "inception", "radimagenet", "medicalnet-10", "medicalnet-50", "lpips-alex"),
    *("mindgrab", "meshnet-tissue", "meshnet-18"),
)


def test_every_promised_file_is_listed() -> None:
    assert set(PROMISED) <= entries().keys()
    assert set(FOREIGN) <= entries().keys()


@pytest.mark.parametrize("entry", entries().values(), ids=list(entries()))
def test_an_entry_is_complete_and_stays_inside_the_folder(entry: Entry) -> None:
    assert entry.purpose
    assert entry.used_by
    assert entry.stated_in
    assert entry.licence.url.startswith("https://")
    assert entry.repo or entry.url or entry.page
    assert (entry.repo is None) == (entry.repo_file is None)
    for file in (entry.file, *entry.also):
        assert not PurePosixPath(file).is_absolute()
        assert ".." not in PurePosixPath(file).parts


@pytest.mark.parametrize("entry", entries().values(), ids=list(entries()))
def test_hashes_are_whole_or_the_digits_that_torch_puts_into_the_name(entry: Entry) -> None:
    if entry.sha256 is None:
        assert entry.pin == NOT_PINNED
        assert entry.to_dict()["sha256"] is None
    elif len(entry.sha256) < 64:
        assert re.fullmatch(r"[0-9a-f]{8}", entry.sha256)
        assert f"-{entry.sha256}.pth" in entry.file
    else:
        assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)


def test_no_two_entries_share_a_place_or_a_name() -> None:
    places = [file for entry in entries().values() for file in (entry.file, *entry.also)]
    names = [name for entry in entries().values() for name in (entry.name, *entry.aliases)]
    assert len(set(places)) == len(places)
    assert len(set(names)) == len(names)


def test_the_small_networks_are_pinned_to_their_real_files(shared_data) -> None:
    sums = (shared_data / "SHA256SUMS").read_text().splitlines()
    published = {name: digest for digest, name in (line.split() for line in sums)}
    pinned = [entry for entry in entries().values() if entry.sha256 and len(entry.sha256) == 64]
    assert len(pinned) == 4
    for entry in pinned:
        assert entry.sha256 == published[f"weights/{entry.file}"]


def test_a_licence_that_forbids_commerce_says_so_in_short_and_in_full() -> None:
    licence = Licence("X", "https://x.org", non_commercial=True)
    assert licence.short == "X, non-commercial use only"
    assert str(licence) == "X, non-commercial use only (https://x.org)"
    assert find("maisi-v2").licence.non_commercial
    assert not find("maisi").licence.non_commercial


def test_names_and_aliases_are_found_and_the_nearest_is_suggested() -> None:
    assert find("maisi-v1") is find("maisi")
    with pytest.raises(UserError, match="no weights 'medicalnet-55'") as error:
        find("medicalnet-55")
    assert "did you mean 'medicalnet-50'?" in error.value.hint


def test_a_file_is_recognised_by_its_hash_first_and_by_a_name_that_is_one_file_s() -> None:
    mindgrab = str(find("mindgrab").sha256)
    assert recognise("anything.pth", mindgrab) is find("mindgrab")
    assert recognise("autoencoder_v2.pt", "0" * 64) is find("maisi-v2")
    assert recognise("model.pth", "0" * 64) is None
    assert recognise("alexnet-owt-7be5be79.pth", "0" * 64) is None
    assert recognise("other.pt", "7be5be79" + "0" * 56) is find("lpips-alex")
