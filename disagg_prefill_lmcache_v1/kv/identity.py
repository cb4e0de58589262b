"""Whose KV a chunk is: what goes into its key beside the tokens.

A key of LMCache is ``model@ranks@rank@hash of the tokens so far@dtype@tags``. Here

- ``model`` is ``<end of the model's name>-<fingerprint>`` (fingerprint.py): configuration and weights by content, types
  and parallel layout;
- one tag, ``id%<32 hexadecimal digits>``, stands for all that a request adds: the LoRA adapter by content,
  ``cache_salt``, tags that a trusted client has set, and, in chunks that reach past the beginning of an image or the
  like, its content hash in full width (LMCache itself keeps 31 bits for each placeholder token).

The tag is LMCache's own way (``lmcache.tag.id`` in a request's ``kv_transfer_params``): the format of keys and chunks
is LMCache's. A request without the tag has no keys: it is computed, nothing of it is stored or loaded. That is also
what becomes of requests whose identity cannot be told.

What a client has sent as ``kv_transfer_params`` ends here: LMCache and vLLM read only what :class:`Configs` has.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from disagg_prefill_lmcache_v1.kv.fingerprint import Adapters, digest

TAG = "lmcache.tag.id"
ITEMS = "lmcache.mm"  # [[first token, content hash], ...] of images and the like, in their order
SKIP_SAVE = "lmcache.skip_save"
_FIELD = "kv_transfer_params"


class Configs(dict[str, Any]):
    """``kv_transfer_params`` as made here; a client's, from JSON, can only be a plain dict."""


def not_to_be_stored(configs: Mapping[str, Any] | None) -> bool:
    """Whether a request with these ``request_configs`` asked not to be stored."""
    return bool((configs or {}).get(SKIP_SAVE))


def model_key(name: str, fingerprint: str) -> str:
    """The model's part of a key: short, and without characters that mean something in a key."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", name.rstrip("/").rpartition("/")[2])[:20]
    return f"{readable}-{fingerprint}"


def request_digest(adapter: str | None, cache_salt: str | None, tags: Iterable[tuple[str, Any]] = ()) -> str:
    """What a request adds to its keys: 32 hexadecimal digits.

    Args:
        adapter: digest of the LoRA adapter's content, None for the base model.
        cache_salt: vLLM's; requests with different salts share nothing.
        tags: of a trusted client.
    """
    return digest("request", adapter, cache_salt, sorted((name, str(value)) for name, value in tags))


class Identities:
    """Tells requests apart by all that their KV depends on beside tokens and model; the scheduler's side."""

    def __init__(self) -> None:
        self._adapters = Adapters()

    def digest(self, request: Any, tags: Iterable[tuple[str, Any]] = ()) -> str | None:
        """Of what the request adds (see :func:`request_digest`); None if that cannot be told.

        Args:
            request: vLLM's, of the scheduler.
        """
        adapter = getattr(request, "lora_request", None)
        content = self._adapters.digest(adapter) if adapter is not None else None
        if adapter is not None and content is None:
            return None
        return request_digest(content, getattr(request, "cache_salt", None) or None, tags)

    def give(self, request: Any) -> None:
        """Replace what the client sent for LMCache and vLLM's transfer by what the keys need; may meet it again.

        Args:
            request: vLLM's, of the scheduler. Its sampling parameters are replaced, not changed: others may hold them.
        """
        params = getattr(request, "sampling_params", None)
        extra = getattr(params, "extra_args", None) or {}
        if isinstance(extra.get(_FIELD), Configs):
            return
        request.kv_transfer_params = None
        if params is None:  # of a pooling request: it has no place for an identity
            return
        request.sampling_params = copy.copy(params)
        request.sampling_params.extra_args = {**extra, _FIELD: self._configs(request, extra.get(_FIELD))}

    def _configs(self, request: Any, given: Any) -> Configs:
        given = given if isinstance(given, Mapping) else {}
        tags = [(name, value) for name, value in given.items() if str(name).startswith("lmcache.tag.")]
        identity = self.digest(request, tags)
        configs = Configs() if identity is None else Configs({TAG: identity})
        if identity is None or given.get(SKIP_SAVE):
            configs[SKIP_SAVE] = True
        items = [
            [feature.mm_position.offset, str(feature.identifier)]
            for feature in getattr(request, "mm_features", None) or ()
        ]
        if items:
            configs[ITEMS] = sorted(items)
        return configs


class IdentifiedTokens:
    """LMCache's token database, in the workers, whose keys have the request's identity, or are none at all."""

    def __init__(self, database: Any) -> None:
        self._database = database

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def process_tokens(
        self,
        tokens: Any = None,
        hashes: Any = None,
        offsets: Any = None,
        mask: Any = None,
        make_key: bool = True,
        request_configs: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[int, int, Any]]:
        """First and last token and key of each chunk; arguments are LMCache's."""
        chunks = self._database.process_tokens(tokens, hashes, offsets, mask, False, request_configs)
        if not make_key:
            yield from chunks
            return
        tag = (request_configs or {}).get(TAG)
        if not tag:
            return
        items = (request_configs or {}).get(ITEMS) or ()
        for start, end, chunk_hash in chunks:
            before = [identifier for first, identifier in items if first < end]
            identity = digest(tag, before) if before else tag
            yield start, end, self._database._make_key_by_hash(chunk_hash, {TAG: identity})
