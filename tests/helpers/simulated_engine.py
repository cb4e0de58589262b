"""vLLM's real scheduler and both real sides of the KV connector; the model, the KV cache and the store are simulated.

A slot of the KV cache holds a position and its token, the store holds the same for each chunk, and the "model" samples
a token from all that it finds in a request's slots: an answer is right only if every slot was.
"""

from __future__ import annotations

import functools
import json
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from kv_sides import BLOCK, CHUNK, make_worker, scheduler_side
from vllm import SamplingParams
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager


def sampled(slots: list[Any]) -> int:
    """The model: one token from all that is in the slots of the positions so far."""
    return hash(tuple(slots)) % 1000


def expected_answer(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sampled(list(enumerate(tokens))))
    return tokens[len(prompt) :]


@functools.cache
def engine_config(folder: str) -> VllmConfig:
    """A configuration of vLLM for a model that is never loaded; ``folder``: an empty one."""
    with open(f"{folder}/config.json", "w") as file:
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        json.dump({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1024, **shape}, file)
    return EngineArgs(
        folder, dtype="float32", max_model_len=1024, max_num_batched_tokens=512, max_num_seqs=8, block_size=BLOCK,
        enable_prefix_caching=True, skip_tokenizer_init=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector="LMCacheDisaggConnectorV1",
            kv_connector_module_path="disagg_prefill_lmcache_v1.kv.connector",
            kv_role="kv_consumer",
            kv_load_failure_policy="recompute",
        ),
    ).create_engine_config()  # fmt: skip


class Store:
    """Chunks by the tokens that they end; as LMCache's lookup client it says how many tokens are there."""

    def __init__(self):
        self.chunks: set[tuple[int, ...]] = set()

    def put(self, tokens):
        self.chunks |= {tuple(tokens[:end]) for end in ends(len(tokens))}

    def lookup_cache(self, lookup_id):
        return -1

    def lookup(self, tokens, lookup_id, request_configs=None):
        found = 0
        for end in ends(len(tokens)):
            if tuple(tokens[:end]) not in self.chunks:
                break
            found = end
        return found

    def clear_lookup_status(self, lookup_id):
        pass

    def supports_producer_reuse(self):
        return True


def ends(tokens):
    return [*range(CHUNK, tokens + 1, CHUNK), *([tokens] if tokens % CHUNK else [])]


class SlowLoader:
    """Loads beside the steps that end some steps later, in any order."""

    def __init__(self, load, random_):
        self.load, self.random, self.pending, self.ended = load, random_, [], []

    def start(self, requests):
        self.pending += requests

    def take(self):
        for request in [r for r in self.pending if self.random.random() < 0.4]:
            self.pending.remove(request)
            self.ended.append(request.request_id)
            yield request, self.load(request)


class SimulatedEngine:
    """One engine.

    Args:
        overlapped: asynchronous scheduling: a step is scheduled before the last one's output is known.
        failing: ``failing(request_id, tokens)``: how many of a load's tokens arrive; None: all.
    """

    def __init__(self, folder, monkeypatch, overlapped, async_load, failing=None, blocks=200, seed=0, ranks=1):
        config = engine_config(str(folder))
        config.scheduler_config.async_scheduling = overlapped
        config.cache_config.num_gpu_blocks = blocks
        self.random = random.Random(seed)
        self.store, self.failing = Store(), failing or (lambda request_id, tokens: tokens)
        self.connector = scheduler_side(self.store, async_load=async_load)
        self.connector._kv_transfer_config = config.kv_transfer_config
        monkeypatch.setattr(KVConnectorFactory, "create_connector", lambda **kwargs: self.connector)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
        caches = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        self.connector._kv_cache_config = caches
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = (AsyncScheduler if overlapped else Scheduler)(
            vllm_config=config, kv_cache_config=caches, block_size=BLOCK, log_stats=True,
            structured_output_manager=StructuredOutputManager(config),
        )  # fmt: skip
        self.depth = 2 if overlapped else 1
        self.memory: dict[tuple[int, int], Any] = {}  # (rank, slot) -> (position, token)
        self.workers = [self._make_worker(rank) for rank in range(ranks)]
        self.aggregator = KVOutputAggregator(ranks)
        self.loader = self.workers[0]._loader
        self.states: dict[str, Any] = {}
        self.in_flight: deque[Any] = deque()
        self.answers: dict[str, list[int]] = {}
        self.preempted = self.computed = 0

    def _make_worker(self, rank):
        worker = make_worker(SimpleNamespace())
        worker._transfer = SimpleNamespace(retrieve=functools.partial(self._retrieve, rank))
        worker._loader = SlowLoader(worker._load_beside, self.random)
        return worker

    def add(self, name, prompt, count=6):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        self.scheduler.add_request(Request(name, list(prompt), params, None, block_hasher=self.hasher))
        self.answers[name] = []

    def _retrieve(self, rank, tokens, mask, slot_mapping, vllm_cached_tokens, req_id, **kwargs):
        """The store's chunks into the KV cache, as far as they arrive."""
        loaded = torch.zeros(len(tokens), dtype=torch.bool)
        arriving = self.failing(req_id, len(tokens))
        start = 0
        for end in ends(len(tokens)):
            if end > arriving or tuple(tokens[:end]) not in self.store.chunks:
                break
            loaded[start:end] = True
            for position in range(max(start, vllm_cached_tokens), min(end, len(slot_mapping))):
                self.memory[rank, int(slot_mapping[position])] = (position, tokens[position])
            start = end
        return loaded & mask

    def step(self):
        """Schedule a step, compute it, and take the output that is due."""
        output = self.scheduler.schedule()
        self.in_flight.append((output, self._execute(output)))
        if len(self.in_flight) >= self.depth:
            for outputs in self.scheduler.update_from_output(*self.in_flight.popleft()).values():
                for each in outputs.outputs:
                    self.answers[each.request_id] += each.new_token_ids

    def run(self, steps=3000):
        """Until every request has its answer."""
        for _ in range(steps):
            self.step()
            if not self.scheduler.has_unfinished_requests() and not any(
                o[0].num_scheduled_tokens for o in self.in_flight
            ):
                return
        raise AssertionError(f"not done: {self.scheduler.requests}")

    def _execute(self, output):
        meta = output.kv_connector_metadata
        for worker in self.workers:
            worker.step_begin(meta.step)
            worker.start_load(meta.requests)
        tokens = self._compute(output)
        names, outputs = list(tokens), []
        for worker in self.workers:
            if tokens:  # vLLM 0.26 calls wait_for_save only then
                worker.forward_end()
                worker.step_end([])
            said = KVConnectorOutput(
                finished_recving=worker.take_finished() or None, invalid_block_ids=worker.take_failed_blocks(),
                kv_connector_stats=worker.meter.take(),
            )  # fmt: skip
            outputs.append(
                ModelRunnerOutput(
                    req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)},
                    sampled_token_ids=[tokens[name] for name in names], kv_connector_output=said,
                )
            )  # fmt: skip
        return self.aggregator.aggregate(outputs)

    def _seen(self, slot):
        """What all ranks have there, or all that they have."""
        seen = {self.memory.get((rank, slot)) for rank in range(len(self.workers))}
        return seen.pop() if len(seen) == 1 else tuple(seen)

    def _compute(self, output):
        """As vLLM's runners keep their requests' state; the sampled tokens of the step."""
        for new in output.scheduled_new_reqs:
            (blocks,) = new.block_ids
            self.states[new.req_id] = SimpleNamespace(
                tokens=list(new.prompt_token_ids), prompt=len(new.prompt_token_ids), blocks=list(blocks),
                computed=new.num_computed_tokens,
            )  # fmt: skip
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            state = self.states[name]
            (blocks,) = cached.new_block_ids[i] or ([],)
            if name in cached.resumed_req_ids:
                self.preempted += 1
                state.blocks = []
            if name in cached.all_token_ids:
                state.tokens = list(cached.all_token_ids[name])
            del state.tokens[state.prompt + cached.num_output_tokens[i] :]  # of a step that was taken back
            state.blocks += blocks
            state.computed = cached.num_computed_tokens[i]
        tokens = {}
        for name, count in output.num_scheduled_tokens.items():
            state = self.states[name]
            last = state.computed + count
            self.computed += count
            slots = [state.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(last)]
            for position in range(state.computed, last):
                known = state.tokens[position] if position < len(state.tokens) else None
                for rank in range(len(self.workers)):
                    self.memory[rank, slots[position]] = (position, known)
            tokens[name] = []
            if last >= len(state.tokens):
                token = sampled([self._seen(slot) for slot in slots])
                state.tokens.append(token)
                tokens[name] = [token]
        return tokens
