"""An observation as the bytes that a journal keeps of it."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.runtime.texts import encodable

encode = msgspec.msgpack.Encoder().encode
"""Return an observation as the payload of a frame; for any thread.

Raises:
    UnicodeEncodeError: There is a lone surrogate in it, see `escape_surrogates`.
"""

decode = msgspec.msgpack.Decoder(Observation).decode
"""Return the observation of a payload; for any thread.

Raises:
    msgspec.DecodeError: It holds none.
    UnicodeDecodeError: Likewise.
"""

_S = TypeVar("_S", bound=msgspec.Struct)


def escape_surrogates(observation: Observation) -> Observation:
    r"""Return an observation whose texts have lone surrogates as escapes, such as ``\ud800``."""
    changes: dict[str, Any] = {"environ": tuple(map(encodable, observation.environ))}
    if observation.extras is not None:
        changes["extras"] = _escape_texts(observation.extras)
    return msgspec.structs.replace(_escape_texts(observation), **changes)


def _escape_texts(value: _S) -> _S:
    texts = {
        name: encodable(text)
        for name, text in msgspec.structs.asdict(value).items()
        if isinstance(text, str)
    }
    return msgspec.structs.replace(value, **texts)
