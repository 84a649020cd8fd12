"""Bringing weights into the weights folder: from the hub, from a URL, or from a file that was carried here."""

from __future__ import annotations

import errno
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from neuromf.errors import UserError
from neuromf.files import atomic_path, sha256_file
from neuromf.weights.catalogue import Entry, find
from neuromf.weights.integrity import damage, trust
from neuromf.weights.lookup import WeightsFile, by_hand, locate
from neuromf.weights.places import VARIABLE, expected_path, folder, found_path

HUB_MISSING = "pip install huggingface-hub"
_SCRATCH = ".download-"
_TIMEOUT_S = 60


class Fetched(NamedTuple):
    """Weights that are here now; `new` where they were not before."""

    weights: WeightsFile
    new: bool


def fetch(name: str, *, source: str | Path | None = None, offline: bool = False, quiet: bool = False) -> Fetched:
    """Bring the file of some weights into the weights folder, checked before it gets its name there.

    Args:
        name: of `neuromf weights list`.
        source: a file to take instead of a download.
        offline: do not touch the network; so does `HF_HUB_OFFLINE=1`.
        quiet: no progress of the download.

    Raises:
        UserError: no such name, no way to get it from here, no space, or not the right file.
    """
    entry = find(name)
    if source is not None:
        return Fetched(*_take(entry, Path(source).expanduser()))
    if found_path(entry) is not None:
        return Fetched(locate(entry.name), False)
    if not (entry.repo or entry.url):
        raise UserError(f"the weights '{entry.name}' can only be got by hand", by_hand(entry))
    if offline or _hub_is_offline():
        raise UserError(f"the weights '{entry.name}' are not here, and this machine is offline", by_hand(entry))
    _check_space(entry.size_mib)
    _download(entry, quiet)
    return Fetched(locate(entry.name), True)


def _take(entry: Entry, source: Path) -> tuple[WeightsFile, bool]:
    """Copy a local file to its place."""
    if not source.is_file():
        raise UserError(f"{source} does not exist", by_hand(entry))
    here = found_path(entry)
    if here is not None and not damage(here) and sha256_file(here) == sha256_file(source):
        return locate(entry.name), False
    _check_space(source.stat().st_size / (1 << 20))
    with _placed(entry, source) as temporary:
        shutil.copyfile(source, temporary)
    return locate(entry.name), True


@contextmanager
def _placed(entry: Entry, source: Path | str) -> Iterator[Path]:
    """Yield a temporary path; what is written there gets its place if it is whole and the right file."""
    target = expected_path(entry)
    with atomic_path(target) as temporary:
        yield temporary
        if problem := damage(temporary):
            raise UserError(f"{source} {problem}", f"get {entry.basename} anew from {entry.source}")
        _compare(entry, temporary, target, source)


def _compare(entry: Entry, temporary: Path, target: Path, source: Path | str) -> None:
    try:
        trust(entry, Path(source), sha256_file(temporary), place=target)
    except UserError as error:
        raise UserError(f"{error.message}; nothing was changed", error.hint) from error


def _download(entry: Entry, quiet: bool) -> None:
    if entry.repo is None:
        with _placed(entry, entry.source) as temporary, _readable_failures(entry):
            _from_url(str(entry.url), temporary)
        return
    scratch = folder() / f"{_SCRATCH}{entry.name}"
    try:
        with _readable_failures(entry):
            downloaded = _from_hub(entry, scratch, quiet)
    except BaseException:
        # A download that stopped half-way stays: the hub continues it at the next fetch.
        if not any(scratch.rglob("*.incomplete")):
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    try:
        with _placed(entry, entry.source) as temporary:
            downloaded.replace(temporary)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _from_hub(entry: Entry, scratch: Path, quiet: bool) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise UserError("downloading needs the library huggingface_hub, which is not installed", HUB_MISSING) from error
    if quiet:
        disable_progress_bars()
    assert entry.repo is not None
    name = entry.repo_file or entry.basename
    return Path(hf_hub_download(entry.repo, name, revision=entry.revision, local_dir=scratch))


def _from_url(url: str, target: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply, target.open("wb") as file:
        shutil.copyfileobj(reply, file, 1 << 20)
        promised = reply.headers.get("Content-Length")
    if promised is not None and target.stat().st_size != int(promised):
        raise ConnectionError(f"{target.stat().st_size:,} of {int(promised):,} bytes came")


@contextmanager
def _readable_failures(entry: Entry) -> Iterator[None]:
    """Turn whatever a download raises into what to do about it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's network library has exceptions of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"free some space, or name another folder; then: neuromf weights fetch {entry.name}"
            raise UserError(f"no space left in {folder()}", hint) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            hint = f"check that it is a folder of yours, or name another one by {VARIABLE}"
            raise UserError(f"could not write {folder()}: {error.strerror}", hint) from error
        if type(error).__name__ == "GatedRepoError":
            hint = f"accept the terms at https://huggingface.co/{entry.repo}, then `hf auth login`; or {by_hand(entry)}"
            raise UserError(f"{entry.repo} asks to accept its terms first", hint) from error
        raise UserError(f"could not download the weights '{entry.name}': {reason}", by_hand(entry)) from error


def _hub_is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _check_space(size_mib: float | None) -> None:
    """Refuse a file that the disk cannot hold, before it is downloaded."""
    there = folder()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / (1 << 20)
    if size_mib is not None and free < size_mib:
        raise UserError(
            f"{folder()} has {free:.0f} MiB free, the file needs {size_mib:.0f} MiB",
            f"free some space, or name another folder by {VARIABLE}",
        )
