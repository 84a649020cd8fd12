"""What a person sees: results on stdout; progress, messages and errors on stderr; exit codes.

rich is imported when something is shown, so that `--help` and completion stay fast.
"""

from __future__ import annotations

import errno
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from neuromf.errors import EXIT_PARTIAL, EXIT_RESUME, UserError
from neuromf.launch import process_rank

if TYPE_CHECKING:
    from rich.console import Console

EXIT_BUG = 1
ERROR_LOG = "neuromf-error.log"
STOPPED = "stopped; run the same command again to continue"
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def stderr() -> Console:
    """A console on the present stderr that neither folds nor colours what it was not told to."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


# --- how a command ends ------------------------------------------------------------------------------------


@contextmanager
def tidy_exit(folder: Callable[[], Path | None] = lambda: None, *, as_process: bool = False) -> Iterator[None]:
    """Turn every exception into a message and an exit code; a bug also leaves its traceback in a file.

    Args:
        folder: where the traceback of a bug goes; the working directory when it returns None.
        as_process: leave by SystemExit, outside of Typer.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        show_error(STOPPED, label="")
        code = EXIT_RESUME
    except Exception as error:
        known = _as_user_error(error)
        if known is None:
            show_bug(error, folder())
            code = EXIT_BUG
        else:
            _show_known(known)
            code = known.exit_code
    else:
        return
    raise SystemExit(code) if as_process else typer.Exit(code)


def _show_known(error: UserError) -> None:
    """Say what the user has to know; of several processes the main one says it in full, the others in a line."""
    resumable, rank = error.exit_code == EXIT_RESUME, process_rank()
    if rank == 0:
        show_error(error.message, error.hint, label="" if resumable else "error: ")
    elif not resumable:
        show_error(error.message.splitlines()[0], label=f"error in process {rank}: ")


def _as_user_error(error: Exception) -> UserError | None:
    """The user's view of an exception; None for a bug."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _NOT_OURS:
        where = f": {error.filename}" if error.filename else ""
        return UserError(f"{error.strerror}{where}", "finished work is kept; mend it and run the same command again")
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return UserError(
            f"not enough memory ({text.splitlines()[0] if text else 'MemoryError'})",
            "use a smaller batch (--batch-size, or training.batch_size=...) or a smaller volume",
        )
    return None


def show_error(message: str, hint: str = "", *, label: str = "error: ") -> None:
    """Print a message, and below it, dim, what to do next."""
    from rich.text import Text

    console = stderr()
    console.print(Text.assemble((label, "bold red"), message))
    if hint:
        console.print(Text(hint, style="dim"))


def show_bug(error: Exception, folder: Path | None) -> None:
    """Print what broke in one line, and where its traceback lies."""
    from neuromf import __version__
    from neuromf.files import write_text

    path = (folder or Path.cwd()) / ERROR_LOG
    report = f"neuromf {__version__}: {' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}"
    hint = f"this is a bug in neuromf; the traceback is in {path}"
    try:
        write_text(path, report)
    except UserError:
        hint = report
    show_error(f"{type(error).__name__}: {error}", hint)


# --- results -----------------------------------------------------------------------------------------------


def result(
    report: Any,
    as_json: bool,
    refused: Sequence[str] = (),
    *,
    rows: Sequence[Mapping[str, Any]] = (),
    complaint: str = "of the inputs could not be used, the rest is done",
) -> None:
    """Print what a command did, and leave with 4 if inputs were refused.

    Args:
        report: a mapping, a named tuple, or an object with `to_dict()`; its `lines()` say it better, if it has them.
        as_json: print the whole report as one JSON object.
        refused: one line per input that could not be used.
        rows: a table to print instead of the report.
        complaint: what is said above `refused`, after their number.
    """
    if as_json:
        typer.echo(json.dumps(_values(report), indent=2, allow_nan=False))
    elif rows:
        table(rows)
    else:
        typer.echo("\n".join(report.lines() if hasattr(report, "lines") else _lines(_values(report))))
    if refused:
        show_error(f"{len(refused)} {complaint}", "\n".join(refused))
        raise typer.Exit(EXIT_PARTIAL)


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print records in columns, headed by the first one's keys."""
    lines = [list(rows[0]), *([_short(plain(value)) for value in row.values()] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _values(report: Any) -> dict[str, Any]:
    if hasattr(report, "_asdict"):
        report = report._asdict()
    return plain(report if isinstance(report, Mapping) else report.to_dict())


def plain(value: Any) -> Any:
    """The same as JSON can hold it: paths as text, NaN and Inf as null, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def _lines(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key:<{width}}  {_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} entries (--json lists them)"
    if isinstance(value, list):
        shown = ", ".join(_short(item) for item in value[:6])
        return f"{shown}, ... ({len(value)})" if len(value) > 6 else shown
    return "-" if value is None else str(value)
