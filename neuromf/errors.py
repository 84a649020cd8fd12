"""The exceptions that end a command tidily; anything else is a bug and keeps its traceback.

Exit codes: 0 done, 2 the user's mistake, 3 ended by a guard, 4 finished but something was refused or a
check failed, 75 stopped by a signal where running the same command again resumes, 1 a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_USER = 2
EXIT_GUARD = 3
EXIT_PARTIAL = 4
EXIT_RESUME = 75


class UserError(Exception):
    """A mistake the user can correct: what was found (`message`) and what to do next (`hint`)."""

    exit_code = EXIT_USER

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ScanError(UserError):
    """One input volume cannot be used; the rest can. Collected in the report of `encode`."""


class GuardError(UserError):
    """A guard ended a run (divergence, non-finite steps); the last good checkpoint is kept."""

    exit_code = EXIT_GUARD


class PartialError(UserError):
    """The work finished, but some inputs were refused or a check failed."""

    exit_code = EXIT_PARTIAL


class Interrupted(UserError):  # noqa: N818 (not a mistake)
    """A signal stopped the work at a clean point; the same command resumes."""

    exit_code = EXIT_RESUME


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """One sentence that suggests the nearest known names, and lists what there is.

    Example:
        >>> did_you_mean("imf-xperd", ["imf-xpred", "rectflow"])
        "did you mean 'imf-xpred'? available: imf-xpred, rectflow"
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    suggestion = f"did you mean '{close[0]}'? " if close else ""
    return f"{suggestion}available: {', '.join(names) or 'none'}"
