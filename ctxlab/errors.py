"""The few exception types of ctxlab. Each message is one line for the user: what, where, the nearest valid value."""

from __future__ import annotations


class CtxlabError(Exception):
    """Anything ctxlab says to its user instead of a traceback. `exit_code` is what the process ends with."""

    exit_code = 1


class ConfigError(CtxlabError):
    """A refused command line or config: nothing has run. Form: `position.theta: expected a number > 0, got 'abc'`."""

    exit_code = 2


class IncompatibleError(ConfigError):
    """Two parts, each valid, that do not go together. One run is refused; a cell of a sweep is `skipped` with the reason."""


class DataError(CtxlabError):
    """A corpus, file or tokenizer that cannot be used, found out before training starts."""

    exit_code = 2


class RecordError(CtxlabError):
    """A run that is not there, is ambiguous, or whose files cannot be read or written."""

    exit_code = 2


class RunError(CtxlabError):
    """A run that died while it ran (NaN loss, a full disk)."""

    exit_code = 1


class UndefinedBeyondTraining(CtxlabError):
    """A position that the scheme has no meaning for (a learned table past its last row). A cell of a table, not an end."""
