"""A decode server that stores its answers' KV (``save_decode_cache``): what, when, and that nobody waits for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kv_sides import CHUNK, Scheduler, make_worker

from disagg_prefill_lmcache_v1.kv import patches

PROMPT = 300


def decoder(loads: bool, found: int, save: bool = True) -> Scheduler:
    made = Scheduler(loads, found, PROMPT)
    made.impl.config.save_decode_cache = save
    made.connector._scheduler.saves_answers = patches.save_answers(made.impl)
    return made


def stored(meta) -> list[tuple[int, int]]:
    """(from, to) of what a step stores."""
    specs = [(request.save_spec, len(request.token_ids)) for request in meta.requests]
    return [(spec.skip_leading_tokens, end) for spec, end in specs if spec.can_save]


def answer(made: Scheduler, count: int, at_once: int = 1) -> list[tuple[int, int]]:
    """Decode so many tokens, some in each step; what is stored meanwhile."""
    found = []
    request = made.request
    for _ in range(count // at_once):
        request.num_computed_tokens = len(request.all_token_ids)
        request.all_token_ids = request.all_token_ids + [7] * at_once
        olds = SimpleNamespace(
            req_ids=["r"],
            resumed_req_ids=set(),
            new_block_ids=[None],
            num_computed_tokens=[request.num_computed_tokens],
        )
        output = SimpleNamespace(
            finished_req_ids=set(), scheduled_new_reqs=[], scheduled_cached_reqs=olds,
            num_scheduled_tokens={"r": at_once},
        )  # fmt: skip
        found += stored(made.connector.build_connector_meta(output))
    return found


@pytest.mark.parametrize("loads", [True, False])
def test_whole_chunks_of_an_answer_are_stored_and_the_prompt_that_the_store_has_is_not(loads):
    made = decoder(loads, PROMPT)
    meta, _ = made.schedule()
    assert stored(meta) == []
    first = answer(made, 60)
    assert first[0][0] <= PROMPT  # goes on where the prompt ended
    assert [(start // CHUNK, end // CHUNK) for start, end in first] == [(4, 5)]
    assert answer(made, 60) == [(320, 384)]
    said = made.connector._scheduler._announcer.said
    assert {what for what, *_ in said} <= {"reused"}  # nobody waits for it, nobody is told


def test_a_prompt_that_is_computed_here_is_stored_too():
    made = decoder(True, 0)
    meta, _ = made.schedule()
    assert stored(meta) == [(0, PROMPT)]
    assert [(start // CHUNK, end // CHUNK) for start, end in answer(made, 60)] == [(4, 5)]


def test_of_a_prompt_that_the_store_has_in_part_the_rest_is_stored():
    made = decoder(False, 2 * CHUNK)
    meta, _ = made.schedule()
    assert stored(meta) == [(2 * CHUNK, PROMPT)]


def test_by_default_a_decode_server_stores_nothing():
    made = decoder(True, 0, save=False)
    meta, _ = made.schedule()
    assert stored(meta) + answer(made, 100) == []
    assert made.impl.kv_role == "kv_consumer"


def test_what_is_known_of_a_request_ends_with_it():
    made = decoder(False, PROMPT)
    made.schedule()
    assert made.connector._scheduler._in_store == {"r": PROMPT}
    made.connector._scheduler.finished("r")
    assert made.connector._scheduler._in_store == {}


@pytest.mark.parametrize("saves", [True, False])
def test_the_worker_of_a_decode_server_stores_if_it_is_told_to(saves):
    made = decoder(True, 0)
    meta, _ = made.schedule()
    calls = []
    worker = make_worker(SimpleNamespace())
    worker.saves_answers = saves
    worker._transfer = SimpleNamespace(store=lambda tokens, mask, **more: calls.append((len(tokens), int(mask.sum()))))
    assert worker.save(meta.requests) == saves
    worker.step_end(meta.requests)
    assert calls == ([(PROMPT, PROMPT)] if saves else [])
    assert torch.is_tensor(meta.requests[0].slot_mapping)
