"""What a client may send as ``kv_transfer_params``, to harm."""

import os
from typing import Any

HOSTILE: list[Any] = [
    {"disagg_spec": {}},
    {"disagg_spec": {"receiver_host": 1, "receiver_init_port": 2}},
    {"ret_first_tok": True},
    {"lmcache.tag.r": "a@b"},
    {"lmcache.tag.r": "x" * 5000},
    {"lmcache.tag.id": "0" * 32},
    {"lmcache.tag.": ["a", {"b": None}]},
    {"lmcache.mm": 7, "lmcache.skip_save": "yes"},
    {"do_remote_prefill": True, "remote_engine_id": os.sep},
    "disagg_spec",
    "ret_first_tok",
    ["disagg_spec", "ret_first_tok"],
    5,
]
