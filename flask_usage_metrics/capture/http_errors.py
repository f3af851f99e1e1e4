"""Which exceptions are answers: those of Werkzeug and of Starlette that have a status."""

from __future__ import annotations

from werkzeug.exceptions import HTTPException


def status_of(error: BaseException) -> int | None:
    """Return the status that an exception stands for; None: it is no answer.

    Args:
        error: One of Werkzeug's; or of Starlette's, which Connexion makes of those.
    """
    if isinstance(error, HTTPException):
        return error.code if error.code is not None else error.get_response().status_code
    for known in type(error).__mro__:
        if known.__name__ == "HTTPException" and known.__module__ == "starlette.exceptions":
            status = getattr(error, "status_code", None)
            return status if isinstance(status, int) else None
    return None


def is_refusal(error: BaseException) -> bool:
    """Tell whether an exception is an answer below 500: nothing that went wrong in the app."""
    status = status_of(error)
    return status is not None and status < 500
