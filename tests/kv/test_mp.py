"""Backend mp on a real ``lmcache server``: what a server that stops answering costs, and who shares KV with whom."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
import types

import pytest
import torch

pytest.importorskip("lmcache", reason="LMCache is not installed: it is what is tested")
pytest.importorskip("vllm", reason="vLLM is not installed: LMCache's connector is built on it")

from kv_stores import Server
from launch_harness import wait_until
from mp_harness import BLOCK, TIMEOUT_S, Engine, MPServer, healthy_again
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from disagg_prefill_lmcache_v1.kv.identity import Identities
from disagg_prefill_lmcache_v1.kv.mp import LMCacheDisaggMPConnector, cache_salt_of, skips_save, take_deadline
from disagg_prefill_lmcache_v1.kv.mp_client import Both, Reply
from disagg_prefill_lmcache_v1.kv.mp_confirm import Confirmer, Stored
from disagg_prefill_lmcache_v1.kv.mp_server import server_words
from disagg_prefill_lmcache_v1.same_user import SECRET_VARIABLE, read_secret

PROMPTS = itertools.count(1)
SLACK_S = 25.0  # of a busy machine; what does not end by itself takes LMCache five minutes


def prompt(blocks: int = 4) -> list[int]:
    first = next(PROMPTS) * 1000
    return list(range(first, first + blocks * BLOCK))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MPServer(tmp_path_factory.mktemp("mp") / "kv_server.log")
    yield server
    server.thaw()
    server.kill()


@pytest.fixture
def engine(server):
    engine = Engine(server)
    yield engine
    engine.close()


def test_what_is_stored_is_loaded_as_it_was(engine):
    tokens = prompt()
    assert engine.store(tokens, [1, 2, 3, 4])
    name, found = engine.find(tokens)
    assert found == len(tokens)
    assert engine.load(tokens, [11, 12, 13, 14], name)
    for cache in engine.caches.values():
        assert torch.equal(cache[1:5], cache[11:15])


@pytest.fixture
def small_server(tmp_path, monkeypatch):
    """Room for about 30 prompts, and Redis behind it, which has a password."""
    redis = Server("redis")
    monkeypatch.setenv("LMCACHE_RESP_PASSWORD", read_secret(os.environ[SECRET_VARIABLE]))
    server = MPServer(tmp_path / "kv_server.log", "4mb", "--redis", f"127.0.0.1:{redis.port}")
    yield server
    server.kill()
    redis.stop()


@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed: it is the second tier")
def test_what_the_first_tier_evicts_is_loaded_from_redis(small_server):
    engine = Engine(small_server)
    prompts = [prompt() for _ in range(100)]
    for n, tokens in enumerate(prompts):
        blocks = [1 + 4 * (n % 10) + i for i in range(4)]
        # While the server makes room there is none: it is told as not stored then.
        stored = lambda tokens=tokens, blocks=blocks: engine.store(tokens, blocks) and engine.is_found(tokens)  # noqa: E731
        wait_until(stored, "it is stored", 60)
    for n in (0, 1, 50, 99):
        # What comes back from Redis needs room in the first tier, which the server may just be making.
        wait_until(lambda n=n: engine.is_found(prompts[n]), f"prompt {n} is found", 60)
        name, found = engine.find(prompts[n])
        assert found == len(prompts[n]), n
        assert engine.load(prompts[n], [51, 52, 53, 54], name)
        first = 1 + 4 * (n % 10)
        for cache in engine.caches.values():
            assert torch.equal(cache[first : first + 4], cache[51:55])
    engine.close()


def test_a_frozen_server_costs_a_store_and_a_load_their_deadline_and_nothing_more(server, engine):
    stored, tokens = prompt(), prompt()
    assert engine.store(stored, [1, 2, 3, 4])
    name, _ = engine.find(stored)
    server.freeze()
    try:
        begin = time.monotonic()
        assert not engine.store(tokens, [5, 6, 7, 8])
        assert not engine.load(stored, [11, 12, 13, 14], name)
        assert time.monotonic() - begin < TIMEOUT_S + SLACK_S
        begin = time.monotonic()
        assert not engine.store(prompt(), [1, 2, 3, 4])
        wait_until(lambda: not engine.scheduler.is_healthy, "the scheduler's heartbeat misses the server", 25)
        assert engine.find(stored)[1] == 0
        assert time.monotonic() - begin < TIMEOUT_S + SLACK_S
    finally:
        server.thaw()
    healthy_again(engine)
    new = prompt()
    assert engine.store(new, [1, 2, 3, 4])
    assert engine.find(new)[1] == len(new)
    # The store that got no answer left a reservation in the server: its KV was kept and is there by now.
    wait_until(lambda: engine.find(tokens)[1] == len(tokens), "the late store is complete", 60)
    name, _ = engine.find(tokens)
    assert engine.load(tokens, [21, 22, 23, 24], name)
    for cache in engine.caches.values():
        assert torch.equal(cache[5:9], cache[21:25])


def test_a_server_restarted_between_two_heartbeats_is_used_again(server, engine):
    lost = prompt()
    assert engine.store(lost, [1, 2, 3, 4])
    server.kill()
    server.start()
    begin = time.monotonic()
    while time.monotonic() - begin < 60:
        new = prompt()
        if engine.store(new, [1, 2, 3, 4]) and engine.find(new)[1] == len(new):
            break
    else:
        pytest.fail("no reuse within 60 s of a restart")
    assert engine.find(lost)[1] == 0


def test_memory_that_was_reserved_and_never_written_is_never_served(server):
    """LMCache's server takes what a worker has reserved for stored when the worker leaves."""
    leaver, reader, tokens = Engine(server), Engine(server), prompt()
    server.freeze()
    try:
        assert not leaver.store(tokens, [1, 2, 3, 4])
        assert leaver.guard.client.reservation_left
        leaver.close()
    finally:
        server.thaw()
    healthy_again(reader)
    assert reader.find(tokens)[1] == 0
    reader.close()


class Announcements:
    """Stands in for visibility.Announcer."""

    def __init__(self) -> None:
        self.ends: dict[str, tuple[str, str]] = {}

    def end(self, name, rank, ranks, state, reason="", transfer_ms=0.0):
        self.ends[name] = (state, reason)


def test_a_request_is_announced_when_its_chunks_can_be_found(engine):
    said = Announcements()
    confirmer = Confirmer(engine.worker, said, TIMEOUT_S)
    there, elsewhere = prompt(), prompt()
    assert engine.store(there, [1, 2, 3, 4])
    confirmer.confirm(Stored("there", there, len(there), ""))
    wait_until(lambda: "there" in said.ends, "an announcement", 30)
    assert said.ends["there"] == ("stored", "")
    confirmer.confirm(Stored("nowhere", elsewhere, len(elsewhere), ""))
    wait_until(lambda: "nowhere" in said.ends, "an announcement", 30)
    assert said.ends["nowhere"] == ("failed", "4 of 4 chunks are not in the KV server: is it full?")
    confirmer.confirm(Stored("other salt", there, len(there), "x"))
    wait_until(lambda: "other salt" in said.ends, "an announcement", 30)
    assert said.ends["other salt"][0] == "failed"
    confirmer.close()


def test_a_request_is_announced_though_the_server_is_frozen(server, engine):
    said = Announcements()
    confirmer = Confirmer(engine.worker, said, TIMEOUT_S)
    server.freeze()
    try:
        engine.store(prompt(), [1, 2, 3, 4])
        begin = time.monotonic()
        confirmer.confirm(Stored("frozen", prompt(), 4 * BLOCK, ""))
        wait_until(lambda: "frozen" in said.ends, "an announcement", TIMEOUT_S + SLACK_S)
        assert time.monotonic() - begin < TIMEOUT_S + SLACK_S
    finally:
        server.thaw()
    assert said.ends["frozen"] == ("failed", "the KV server does not answer")
    confirmer.close()
    healthy_again(engine)


def test_the_servers_memory_is_removed_however_it_ends(tmp_path):
    for end in ("kill", "terminate"):
        server = MPServer(tmp_path / f"{end}.log")
        wait_until(lambda server=server: server.memory(), "the server has its memory", 60)
        server.kill() if end == "kill" else server.terminate()
        wait_until(lambda server=server: not server.memory(), "its memory is gone", 30)


@pytest.mark.parametrize(
    "words", [["--size", "much"], ["--size", "0gb"], ["--config", "/nowhere.yaml"], ["--redis", "db"], ["--what"]]
)
def test_a_wrong_command_line_of_the_server_is_told_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        server_words(["127.0.0.1", "1", *words])
    told = capsys.readouterr().err.strip().splitlines()[-1:] or [str(ended.value)]
    assert words[-1] in told[0]


def test_the_settings_file_has_only_flags_that_lmcache_has(monkeypatch):
    from lmcache.v1.multiprocess import server

    adapter = {"type": "mock"}
    more = ["--redis", "db:1", "--l2-adapter", json.dumps(adapter)]
    name, words = server_words(["h", "1", "--size", "512mb", "--chunk-size", "32", *more])
    monkeypatch.setattr("sys.argv", ["x", *words])
    given = server.parse_args()  # ends the test at a flag that it does not know
    assert (given.host, given.port, given.l1_size_gb, given.chunk_size) == ("h", 1, 0.5, 32)
    assert given.shm_name == name
    assert given.worker_reap_timeout_seconds == 0
    assert [json.loads(text) for text in given.l2_adapter] == [adapter, {"type": "resp", "host": "db", "port": 1}]


class Never:
    """A future that is never done."""

    def wait(self, timeout):
        time.sleep(timeout)
        return False


def test_a_wait_ends_with_the_servers_health():
    told = []
    begin = time.monotonic()
    reply = Reply(Never(), lambda: time.monotonic() - begin < 0.3, lambda: told.append(1))
    with pytest.raises(TimeoutError, match="does not answer"):
        reply.result(timeout=30)
    assert 0.3 <= time.monotonic() - begin < 20
    assert told == [1]


class Done:
    def __init__(self, result, done=True):
        self.is_done, self._result = done, result

    def query(self):
        return self.is_done

    def wait(self, timeout):
        return self.is_done

    def result(self, timeout=None):
        return self._result


def test_an_answer_after_the_server_was_given_up_is_none():
    assert Reply(Done(True), lambda: True).result(timeout=1)
    with pytest.raises(TimeoutError, match="does not answer"):
        Reply(Done(True), lambda: False).result(timeout=1)


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_two_stores_of_a_request_are_done_when_both_are(first, second):
    one, two = Done(first, done=False), Done(second)
    both = Both(one, two)
    assert not both.query(), "the blocks of the first are still being read"
    one.is_done = True
    assert both.query()
    assert both.result(timeout=0) is (first and second)


def test_a_second_store_of_a_request_does_not_hide_the_first(engine):
    first, tokens = Done(True, done=False), prompt()
    engine.worker.store_futures["r"] = first
    engine.worker.submit_store_request("r", engine._op(tokens, [1, 2, 3, 4]), None)
    assert not engine.worker.store_futures["r"].query()
    first.is_done = True
    assert engine.worker.store_futures.pop("r").query()


@pytest.fixture(scope="module")
def vllm_config(server, tmp_path_factory):
    """vLLM's own, of the small model, for an engine that is not started."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    from disagg_prefill_lmcache_v1.measure import tiny_model

    model = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_model.build(model)
    extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server.port}
    transfer = KVTransferConfig(
        kv_connector="LMCacheDisaggMPConnector", kv_connector_module_path="disagg_prefill_lmcache_v1.kv.mp",
        kv_role="kv_producer", kv_load_failure_policy="recompute", kv_connector_extra_config=extra,
    )  # fmt: skip
    arguments = EngineArgs(
        str(model), dtype="float32", enforce_eager=True, max_model_len=1024, block_size=BLOCK,
        kv_transfer_config=transfer,
    )  # fmt: skip
    return arguments.create_engine_config()


@pytest.fixture
def scheduler_side(vllm_config):
    connector = LMCacheDisaggMPConnector(vllm_config, KVConnectorRole.SCHEDULER)
    yield connector
    connector.shutdown()


def engine_request(name, tokens, **parameters):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    extra = {"kv_transfer_params": parameters} if parameters else None
    return Request(name, tokens, SamplingParams(max_tokens=1, extra_args=extra), None, cache_salt="a/b")


def test_the_scheduler_side_finds_nothing_for_a_new_prompt_and_ends(scheduler_side):
    request = engine_request("new", prompt(), **{"lmcache.max_offload_tokens": "many", "cached_token_stats": 1})
    found = None
    while found is None:
        found, asynchronous = scheduler_side.get_num_new_matched_tokens(request, 0)
    assert (found, asynchronous) == (0, False)
    held, _ = scheduler_side.request_finished(request, [])
    assert held, "the workers report it, and vLLM frees it then"


def test_a_request_that_is_aborted_before_anything_was_asked_for_it_ends_like_the_others(scheduler_side):
    held, parameters = scheduler_side.request_finished(engine_request("early", prompt(), cached_token_stats=1), [])
    assert (held, parameters) == (True, None)


def test_the_worker_side_starts(vllm_config, monkeypatch):
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    monkeypatch.setattr(CPUModelRunner, "_bookkeeping_sync", lambda self: None)
    connector = LMCacheDisaggMPConnector(vllm_config, KVConnectorRole.WORKER)
    assert hasattr(CPUModelRunner._bookkeeping_sync, "seeded"), "a request with a seed would end vLLM's CPU engine"
    assert connector.get_finished(set()) == (set(), set())
    assert connector.get_kv_connector_stats() is None
    connector.shutdown()


def test_a_request_that_is_gone_is_not_reported_again():
    connector = object.__new__(LMCacheDisaggMPConnector)
    connector._held, connector.lazy_offload = {"aborted while loading", "stored"}, False
    output = types.SimpleNamespace(
        kv_connector_stats=None, kv_cache_events=None, finished_recving={"aborted while loading", "loaded"},
        finished_sending={"stored", "never held"},
    )  # fmt: skip
    connector.update_connector_output(output)
    assert (output.finished_sending, connector._held) == ({"stored"}, set())
    output.finished_recving, output.finished_sending = set(), {"aborted while loading"}
    connector.update_connector_output(output)
    assert output.finished_sending == set()


# identity


def request(salt=None, lora=None, parameters=None):
    extra = None if parameters is None else {"kv_transfer_params": parameters}
    adapter = None if lora is None else types.SimpleNamespace(lora_path=str(lora), lora_name="a", lora_int_id=1)
    sampling = types.SimpleNamespace(extra_args=extra)
    return types.SimpleNamespace(cache_salt=salt, lora_request=adapter, sampling_params=sampling)


def salt_of(request, fingerprint="model", identities=None):
    return cache_salt_of(request, fingerprint, identities or Identities())


def test_plain_requests_of_a_model_share_their_kv():
    assert salt_of(request()) == salt_of(request(salt=""))
    assert salt_of(request()) != salt_of(request(), "new weights")


@pytest.mark.parametrize("salt", ["a", "a/b", "x@y", "\\", "\x00", "s" * 1000, "ü" * 200])
def test_any_salt_is_one_that_lmcache_takes(engine, salt):
    made = salt_of(request(salt=salt))
    assert made != salt_of(request(salt=salt + "b"))
    engine.worker._create_key(prompt(), 0, 4 * BLOCK, request_id="r", cache_salt=made)


def test_adapters_are_told_apart_by_content_not_by_name(tmp_path):
    for name, weights in (("a", b"1"), ("b", b"2"), ("copy-of-a", b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(weights)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": 8}))
    identities = Identities()
    a, b, copy = (salt_of(request(lora=tmp_path / name), "m", identities) for name in ("a", "b", "copy-of-a"))
    assert a == copy
    assert len({a, b, salt_of(request(), "m"), salt_of(request(salt="a", lora=tmp_path / "a"), "m")}) == 4
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"3")
    os.utime(tmp_path / "a" / "adapter_model.safetensors", (1, 1))
    assert salt_of(request(lora=tmp_path / "a"), "m", identities) is None, "vLLM may still have the old weights"


def test_who_asks_not_to_be_stored():
    assert skips_save(request(parameters={"lmcache.skip_save": True}))
    for parameters in (None, {}, [], "x", {"lmcache.skip_save": False}, {"lmcache.max_offload_tokens": "many"}):
        assert not skips_save(request(parameters=parameters))


# the deadline


def config(**extra):
    transfer = types.SimpleNamespace(kv_connector_extra_config={f"lmcache.mp.{k}": v for k, v in extra.items()})
    return types.SimpleNamespace(kv_transfer_config=transfer)


def test_the_deadline_is_ten_seconds_or_what_is_given():
    for given, timeout, heartbeat in (({}, 10, 10 / 3), ({"mq_timeout": 6}, 6, 2), ({"heartbeat_interval": 1}, 10, 1)):
        made = config(**given)
        assert take_deadline(made) == timeout
        extra = made.kv_transfer_config.kv_connector_extra_config
        assert extra["lmcache.mp.mq_timeout"] == timeout
        assert extra["lmcache.mp.heartbeat_interval"] == pytest.approx(heartbeat)


def test_engines_copy_themselves_unless_another_way_is_asked_for(monkeypatch):
    def mode(**extra):
        made = config(**extra)
        take_deadline(made)
        return made.kv_transfer_config.kv_connector_extra_config.get("lmcache.mp.mp_transfer_mode")

    assert mode() == "engine_driven"
    assert mode(mp_transfer_mode="auto") == "auto"
    monkeypatch.setenv("LMCACHE_MP_TRANSFER_MODE", "lmcache_driven")
    assert mode() is None


@pytest.mark.parametrize("value", [0, -1, "soon", None, 1e9, float("nan")])
def test_a_deadline_that_cannot_be_is_refused(value):
    with pytest.raises(ValueError, match=r"lmcache\.mp\.mq_timeout=.*above 0 and below 3600"):
        take_deadline(config(mq_timeout=value))
