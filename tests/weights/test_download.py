"""Bringing weights here: from a hub that is played by a function, from a URL, from a file; and every way that fails."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError

from neuromf.errors import UserError
from neuromf.files import sha256_file
from neuromf.weights import download, expected_path, fetch, find

Call = dict[str, Any]


@pytest.fixture
def hub(weights_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The hub has one file, `hub.pt`; what was asked of it is listed."""
    asked: list[Call] = []
    content = weights_file("hub.pt", 7)

    def hf_hub_download(repo_id: str, filename: str, *, revision: str | None, local_dir: Path) -> str:
        asked.append({"repo": repo_id, "file": filename, "revision": revision, "local_dir": local_dir})
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(content, path)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    return asked


def hub_raises(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def hf_hub_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)


def http_error(kind: type[Any], code: int) -> Exception:
    # Not by its constructor: that wants the response of whichever network library the hub's version uses.
    error: Exception = kind.__new__(kind)
    error.args = (f"{code} Client Error.\nmore lines",)
    return error


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- from the hub ----------------------------------------------------------------------------------------------


def test_a_download_asks_for_the_listed_file_at_the_listed_revision(folder: Path, hub: list[Call], known) -> None:
    known("maisi", revision="0123abc")
    done = fetch("maisi")
    asked = hub[0]
    assert asked["repo"] == "nvidia/NV-Generate-CT"
    assert (asked["file"], asked["revision"]) == ("models/autoencoder_v1.pt", "0123abc")
    assert done.new
    assert done.weights.path == folder / "autoencoder_v1.pt"
    assert names(folder) == ["autoencoder_v1.pt", "autoencoder_v1.pt.sha256"]
    assert done.weights.trust == "recorded"


def test_what_is_here_is_not_downloaded_again(folder: Path, hub: list[Call]) -> None:
    fetch("maisi")
    assert not fetch("maisi").new
    assert len(hub) == 1


def test_the_licence_is_said_at_the_first_fetch_only(
    folder: Path, hub: list[Call], capsys: pytest.CaptureFixture[str]
) -> None:
    fetch("maisi")
    assert "NVIDIA Open Model License" in capsys.readouterr().err
    fetch("maisi")
    assert capsys.readouterr().err == ""


def test_a_download_with_a_wrong_hash_leaves_nothing(folder: Path, hub: list[Call], known) -> None:
    known("maisi", sha256="a" * 64)
    with pytest.raises(UserError, match=f"it should be {'a' * 64}; nothing was changed"):
        fetch("maisi")
    assert names(folder) == []


def test_a_publisher_who_changes_a_file_is_noticed(folder: Path, hub: list[Call], weights_file) -> None:
    fetch("maisi")
    (folder / "autoencoder_v1.pt").unlink()
    weights_file("hub.pt", 8)
    with pytest.raises(UserError, match="not what the weights 'maisi' were at their first use"):
        fetch("maisi")
    assert names(folder) == ["autoencoder_v1.pt.sha256"]


def test_a_page_instead_of_weights_is_refused(folder: Path, hub: list[Call], tmp_path: Path) -> None:
    (tmp_path / "hub.pt").write_text("<html>sign in</html>")
    with pytest.raises(UserError, match="is a web page"):
        fetch("maisi")
    assert names(folder) == []


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_the_hub_s_own_offline_switch_is_honoured(
    value: str, folder: Path, hub: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(UserError, match="this machine is offline"):
        fetch("maisi")
    assert hub == []


def test_offline_says_which_file_to_put_where(folder: Path, hub: list[Call]) -> None:
    with pytest.raises(UserError) as error:
        fetch("maisi", offline=True)
    assert "get autoencoder_v1.pt from https://huggingface.co/nvidia/NV-Generate-CT" in error.value.hint
    assert f"put it at {folder / 'autoencoder_v1.pt'}" in error.value.hint
    assert hub == []


def test_offline_finds_what_was_put_there_by_hand(folder: Path, hub: list[Call], weights_file) -> None:
    path = weights_file("weights/autoencoder_v1.pt")
    assert fetch("maisi", offline=True).weights.path == path


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(RemoteEntryNotFoundError, 404), "could not download the weights 'maisi': 404 Client Error."),
        (http_error(GatedRepoError, 403), "nvidia/NV-Generate-CT asks to accept its terms first"),
        (ConnectionError("no route to host"), "could not download the weights 'maisi': no route to host"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left in"),
        (PermissionError(errno.EACCES, "Permission denied"), "could not write"),
        (RuntimeError(), "could not download the weights 'maisi': RuntimeError"),
    ],
)
def test_every_failure_of_the_hub_is_one_line_and_a_way_out(
    error: Exception, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_raises(error, monkeypatch)
    with pytest.raises(UserError) as caught:
        fetch("maisi")
    assert caught.value.message.startswith(words)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert names(folder) == []


def test_without_the_hub_s_library_the_message_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub, which is not installed") as error:
        fetch("maisi")
    assert error.value.hint == "pip install huggingface-hub"


def test_a_stopped_download_continues_in_the_same_place(
    folder: Path, hub: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    working = sys.modules["huggingface_hub"].hf_hub_download
    places: list[Path] = []

    def stopped(*_: Any, local_dir: Path, **__: Any) -> str:
        local_dir.mkdir(parents=True)
        (local_dir / "half.incomplete").write_text("half")
        places.append(local_dir)
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.hf_hub_download", stopped)
    with pytest.raises(KeyboardInterrupt):
        fetch("maisi")
    assert (places[0] / "half.incomplete").is_file()
    assert not (folder / "autoencoder_v1.pt").exists()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", working)
    assert fetch("maisi").new
    assert hub[0]["local_dir"] == places[0]
    assert not places[0].exists()


def test_a_disk_that_cannot_hold_the_file_is_refused_first(
    folder: Path, hub: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10 << 20}))
    with pytest.raises(UserError, match="has 10 MiB free, the file needs 80 MiB"):
        fetch("maisi")
    assert hub == []


def test_a_folder_that_cannot_be_made_is_the_user_s_to_mend(
    tmp_path: Path, hub: list[Call], monkeypatch: pytest.MonkeyPatch, weights_file
) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path / "a-file" / "weights"))
    with pytest.raises(UserError, match=r"could not write .*Not a directory"):
        fetch("maisi")
    with pytest.raises(UserError, match=r"could not write .*(File exists|Not a directory)"):
        fetch("maisi", source=weights_file("mine.pt"))


def test_an_unknown_name_suggests_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        fetch("maissi")
    assert "did you mean 'maisi'?" in error.value.hint


# --- from a URL ------------------------------------------------------------------------------------------------


def test_a_url_is_downloaded_and_compared_with_the_digits_of_its_name(folder: Path, weights_file, known) -> None:
    path = weights_file("published.pth")
    known("lpips-alex", url=path.as_uri(), sha256=sha256_file(path)[:8], size_mib=None)
    done = fetch("lpips-alex")
    assert (done.weights.sha256, done.weights.trust) == (sha256_file(path), "recorded")
    assert done.weights.path == folder / "alexnet-owt-7be5be79.pth"


def test_a_url_with_another_content_leaves_nothing(folder: Path, weights_file, known) -> None:
    known("lpips-alex", url=weights_file("published.pth").as_uri(), size_mib=None)
    with pytest.raises(UserError, match="it should begin with 7be5be79"):
        fetch("lpips-alex")
    assert names(folder) == []


def test_a_url_that_breaks_off_leaves_nothing(
    folder: Path, weights_file, known, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights_file("published.pth")
    known("lpips-alex", url=path.as_uri(), sha256=sha256_file(path)[:8], size_mib=None)
    whole = download.urllib.request.urlopen

    def broken(url: str, timeout: float) -> Any:
        reply = whole(url, timeout=timeout)
        reply.headers.replace_header("Content-Length", "999999")
        return reply

    monkeypatch.setattr(download.urllib.request, "urlopen", broken)
    with pytest.raises(UserError, match="of 999,999 bytes came"):
        fetch("lpips-alex")
    assert names(folder) == []


def test_a_url_that_is_gone_says_so(folder: Path, tmp_path: Path, known) -> None:
    known("lpips-alex", url=(tmp_path / "gone.pth").as_uri(), size_mib=None)
    with pytest.raises(UserError, match="could not download the weights 'lpips-alex'"):
        fetch("lpips-alex")


def test_what_has_no_download_says_how_to_get_it(folder: Path) -> None:
    with pytest.raises(UserError, match="'radimagenet' can only be got by hand") as error:
        fetch("radimagenet")
    assert "https://github.com/Warvito/radimagenet-models" in error.value.hint
    assert "--from RadImageNet-ResNet50_notop.pth" in error.value.hint


# --- from a file -----------------------------------------------------------------------------------------------


def test_a_carried_file_gets_its_place_and_its_name(folder: Path, weights_file, hub: list[Call]) -> None:
    path = weights_file("stick/whatever.bin")
    done = fetch("maisi", source=path)
    assert done.new
    assert done.weights.path == folder / "autoencoder_v1.pt"
    assert done.weights.sha256 == sha256_file(path)
    assert hub == []
    assert not fetch("maisi", source=path).new


def test_a_carried_file_of_other_weights_is_refused_and_what_is_here_stays(folder: Path, shared_data: Path) -> None:
    real = shared_data / "weights"
    fetch("mindgrab", source=real / find("mindgrab").file)
    before = sha256_file(expected_path(find("mindgrab")))
    with pytest.raises(UserError, match=r"tissue_gw_5ch/model.pth is not the file of the weights 'mindgrab'"):
        fetch("mindgrab", source=real / find("meshnet-tissue").file)
    assert sha256_file(expected_path(find("mindgrab"))) == before
    assert names(folder) == ["mindgrab_skullstrip/model.pth"]


def test_a_carried_file_that_is_cut_short_is_refused(folder: Path, weights_file) -> None:
    path = weights_file("cut.pt")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"cut.pt is cut short"):
        fetch("maisi", source=path)
    assert names(folder) == []


def test_a_carried_file_replaces_a_damaged_one(folder: Path, weights_file) -> None:
    (folder / "autoencoder_v1.pt").write_bytes(b"PK half")
    path = weights_file("good.pt")
    assert fetch("maisi", source=path).weights.sha256 == sha256_file(path)


def test_a_file_that_does_not_exist_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.pt does not exist"):
        fetch("maisi", source=tmp_path / "absent.pt")


def test_a_disk_that_fills_up_leaves_nothing(folder: Path, weights_file, own_cache: Path) -> None:
    # Stands in for a full disk: no file of the process may grow beyond 500 bytes.
    script = (
        "import resource, sys; from neuromf.weights import fetch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        f"fetch('maisi', source={str(weights_file('good.pt'))!r})"
    )
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True, check=False)
    assert "the disk is full or a size limit was reached" in done.stderr
    assert names(folder) == []
