"""The methods of HTTP; strangers may send any other, so what is counted by method folds them.

But for those that the rules of an app name, such as WebDAV's: see `extension.methods`.
"""

from __future__ import annotations

METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
)
"""RFC 9110, section 9, and PATCH of RFC 5789."""

OTHER_METHOD = "_OTHER"
"""Stands for all others, as in OpenTelemetry's conventions."""
