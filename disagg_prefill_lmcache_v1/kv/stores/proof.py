"""Two sides of a run prove to each other that they know its secret, without showing it. Standard library only."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets

from disagg_prefill_lmcache_v1.same_user import SECRET_VALUE, SECRET_VARIABLE, read_secret


def run_secret() -> bytes:
    """The secret that the environment names.

    Raises:
        ValueError: it names none, or a file that is not ours alone.
    """
    if value := os.environ.get(SECRET_VALUE, ""):
        return value.encode()
    path = os.environ.get(SECRET_VARIABLE, "")
    if not path:
        raise ValueError(f"{SECRET_VARIABLE} is not set: the file with a secret that both servers have (mode 0600)")
    try:
        return read_secret(path).encode()
    except OSError as error:
        raise ValueError(f"{SECRET_VARIABLE} {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{SECRET_VARIABLE} {error}") from None


def challenge() -> bytes:
    """What the other side's proof must be about."""
    return secrets.token_bytes(32)


def proof(secret: bytes, side: str, receivers: bytes, senders: bytes) -> bytes:
    """That ``side`` ("receiver" or "sender") knows the secret, about both sides' challenges."""
    return hmac.digest(secret, side.encode() + receivers + senders, hashlib.sha256)


def is_proof(given: object, secret: bytes, side: str, receivers: bytes, senders: bytes) -> bool:
    return isinstance(given, bytes) and hmac.compare_digest(given, proof(secret, side, receivers, senders))
