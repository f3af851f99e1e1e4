"""The exceptions of this package.

UsageMetricsError
├── ConfigError (ValueError)      a setting or argument is wrong; raised at set-up only
│   └── UnknownName (NotImplementedError)  there is no mode or sum of this name
└── StorageError
    ├── StorageUnavailable        nothing was written, the same batch may succeed later
    └── RecordsRejected           some records can never be written, the others were
"""

from __future__ import annotations

from collections.abc import Sequence


class UsageMetricsError(Exception):
    """Base of all exceptions of this package."""


class ConfigError(UsageMetricsError, ValueError):
    """A setting or argument is wrong: what was given, where, and what is expected."""


class UnknownName(ConfigError, NotImplementedError):
    """There is no mode or sum of this name: NotImplementedError, as flask-track-usage raises it."""


class StorageError(UsageMetricsError):
    """A storage could not do what it was asked for.

    Args:
        *args: As of any exception; never logged.
        reason: Why, in words that hold no path, address, value or secret: these are logged.

    Attributes:
        reason: The same; None: not told.
    """

    reason: str | None = None

    def __init__(self, *args: object, reason: str | None = None) -> None:
        super().__init__(*args if args or reason is None else (reason,))
        self.reason = reason


class StorageUnavailable(StorageError):
    """The storage cannot be reached or opened now: nothing was written, try again later."""


class RecordsRejected(StorageError):
    """Some records of a batch can never be written; all others of the batch were.

    Args:
        positions: Positions in the batch of the records that were refused.
        reason: The name of the first refusal's exception class.
    """

    def __init__(self, positions: Sequence[int], reason: str) -> None:
        super().__init__(f"{len(positions)} record(s) rejected: {reason}", reason=reason)
        self.positions = positions
