"""Request fields that steer the transfer of KV caches: they are the operator's, not the clients'.

vLLM hands ``kv_transfer_params`` and ``ec_transfer_params`` to its connectors as they are: addresses to send caches to,
cache tags of other clients. A value of another shape than expected ends the engine. They also come in through
``vllm_xargs`` and ``sampling_params.extra_args``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FIELDS = ("kv_transfer_params", "ec_transfer_params")
_EXTRA = ("vllm_xargs", "extra_args", "sampling_params")  # objects that vLLM looks for them in
_MARK = b"transfer_params"


def steering_field(fields: Mapping[str, Any]) -> str:
    """The field of a generating request that steers the transfer, "" if there is none. Values are raw JSON texts."""
    for name in FIELDS:
        if name in fields and bytes(fields[name]).strip() != b"null":
            return name
    for outer in _EXTRA:
        if outer in fields:
            found = _inside(_loads(bytes(fields[outer])))
            if found:
                return f"{outer}.{found}"
    return ""


def steering_field_of(body: bytes) -> str:
    """The same for the body of any other route, JSON or form."""
    if _MARK not in body and b"\\u" not in body:
        return ""
    value = _loads(body)
    if value is None:  # a form
        return next((name for name in FIELDS if name.encode() in body), "")
    return _inside(value)


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _inside(value: Any) -> str:
    """Dotted path of the first such field at any depth; "" if there is none."""
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, list):
            todo += [(path, item) for item in value if isinstance(item, (dict, list))]
        if not isinstance(value, dict):
            continue
        for key, item in value.items():
            name = f"{path}.{key}" if path else key
            if key in FIELDS and item is not None:
                return name
            if isinstance(item, (dict, list)):
                todo.append((name, item))
    return ""
