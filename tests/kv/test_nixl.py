"""kv/nixl.py without an engine: whose KV is fetched, what is held, and the settings file."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import yaml
from launch_harness import PACKAGE

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("nixl_cu12", reason="NIXL is not installed")

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnectorMetadata, NixlPullConnectorWorker

from disagg_prefill_lmcache_v1.kv import nixl
from disagg_prefill_lmcache_v1.kv.identity import Identities
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadScheduler
from disagg_prefill_lmcache_v1.kv.policy import LoadPolicy
from disagg_prefill_lmcache_v1.kv.reuse import ReuseAccount
from disagg_prefill_lmcache_v1.kv.visibility import Announcer

ASK = {"do_remote_decode": True, "do_remote_prefill": False}


class Scheduler:
    """A stand-in for vLLM's scheduler side: it holds what asks for it."""

    def on_new_request(self, request):
        pass

    def request_finished(self, request, block_ids):
        held = bool((request.kv_transfer_params or {}).get("do_remote_decode"))
        return held, {"do_remote_prefill": True, "remote_block_ids": block_ids} if held else None


def side(fingerprint="model", holds=True):
    made = nixl.NixlConnector.__new__(nixl.NixlConnector)
    made._holds, made._announcer, made._lease_s = holds, Announcer(""), 60
    made._fingerprint, made._identities = fingerprint, Identities()
    made._reuse = ReuseAccount(made._announcer, 1, beside=True)
    made._loads = LoadScheduler(LoadPolicy("always", beside=True), 1)
    made._most, made._external = {}, {}
    made.connector_scheduler = Scheduler()
    return made


def request(params, tokens=(1, 2, 3), salt=None, max_tokens=1, images=()):
    return SimpleNamespace(
        request_id="r", kv_transfer_params=params, prompt_token_ids=list(tokens), cache_salt=salt, lora_request=None,
        max_tokens=max_tokens, num_prompt_tokens=len(tokens),
        mm_features=[SimpleNamespace(identifier=each, mm_position=SimpleNamespace(offset=0)) for each in images],
    )  # fmt: skip


def told(**more):
    """What a prefill server's answer says of a request."""
    prefiller, asked = side(), request(ASK, **more)
    prefiller.on_new_request(asked)
    held, params = prefiller.request_finished(asked, [7])
    assert held
    return params


@pytest.mark.parametrize(
    ("here", "there", "fetched"),
    [
        ({}, {}, True),
        ({"salt": "a", "images": ("x",)}, {"salt": "a", "images": ("x",)}, True),
        ({}, {"tokens": (1, 2, 4)}, False),
        ({}, {"tokens": (1, 2, 3, 4)}, False),
        ({"salt": "a"}, {"salt": "b"}, False),
        ({"salt": "a"}, {}, False),
        ({"images": ("x",)}, {"images": ("y",)}, False),
    ],
)
def test_only_the_requests_own_kv_is_fetched(here, there, fetched):
    params = told(**here)
    asked = request(params, **there, max_tokens=20)
    side(holds=False).on_new_request(asked)
    assert asked.kv_transfer_params == (params if fetched else None)


def test_kv_of_another_model_is_not_fetched():
    asked = request(told())
    side("another", holds=False).on_new_request(asked)
    assert asked.kv_transfer_params is None


def test_kv_that_is_not_known_to_be_held_for_a_time_is_not_fetched():
    asked = request(told() | {nixl.UNTIL: None})
    side(holds=False).on_new_request(asked)
    assert asked.kv_transfer_params is None


@pytest.mark.parametrize("params", [{}, "text", [1], {"do_remote_prefill": True, "remote_block_ids": [1]}])
def test_what_has_no_digest_is_not_looked_at(params):
    asked = request(params)
    side(holds=False).on_new_request(asked)
    assert asked.kv_transfer_params is None


def test_a_decode_server_holds_nothing_and_a_prefill_server_nothing_but_prompts():
    for made, more in ((side(holds=False), {}), (side(), {"max_tokens": 2})):
        asked = request(ASK, **more)
        made.on_new_request(asked)
        assert made.request_finished(asked, [7]) == (False, None)


@pytest.mark.parametrize(("rests", "tokens", "slept"), [(True, 0, [nixl.REST_S]), (True, 5, []), (False, 0, [])])
def test_a_step_that_only_holds_kv_rests_where_cores_are_shared(rests, tokens, slept, monkeypatch):
    made, seen = side(), []
    made._rests = rests
    made.connector_scheduler.build_connector_meta = lambda output: SimpleNamespace()
    monkeypatch.setattr(nixl, "time", SimpleNamespace(sleep=seen.append))
    made.build_connector_meta(
        SimpleNamespace(total_num_scheduled_tokens=tokens, scheduled_new_reqs=[], num_scheduled_tokens={})
    )
    assert seen == slept


class Worker(NixlPullConnectorWorker):
    """A stand-in for vLLM's worker side, whose one fetch ends at once; its clock is 1,000 s behind the other side's."""

    def __init__(self, error):
        self.error, self.pcp_rank = error, 0
        self._engine_clock_offset = {"there": 1000.0}

    def __del__(self):
        pass  # there is nothing to be given back

    def start_load_kv(self, metadata):
        self.names = set(metadata.reqs_to_recv)

    def get_transfer_results(self):
        failed = self.names if self.error else ()
        return SimpleNamespace(finished_sending=set(), finished_recving=set(self.names), failed_recving=set(failed))

    def get_finished(self):
        return set(), set(self.names)

    def get_block_ids_with_load_errors(self):
        return {7, 8} if self.error else set()


@pytest.mark.parametrize(
    ("held_for_s", "engine", "error", "loaded"),
    [(60, "there", False, 300), (60, "there", True, 0), (2, "there", False, 0), (60, "gone", False, 0)],
)
@pytest.mark.parametrize("by_request", [True, False], ids=["failures by request", "failures by block"])
def test_what_came_after_it_was_held_is_computed(held_for_s, engine, error, loaded, by_request):
    made = nixl.NixlConnector.__new__(nixl.NixlConnector)
    made.connector_worker, made._meter = Worker(error), nixl.Meter("cpu")
    made.kv_transfer_config = SimpleNamespace(kv_role="kv_consumer")
    made._fetches, made._fetched, made._invalid = {}, None, set()
    made._connector_metadata = NixlConnectorMetadata()
    made._connector_metadata.step = SimpleNamespace(number=4)
    made._connector_metadata.external = {"r": (300, time.perf_counter() + 1000 + held_for_s)}
    made._connector_metadata.reqs_to_recv["r"] = SimpleNamespace(
        local_block_ids=([7, 8],), remote=SimpleNamespace(engine_id=engine)
    )
    made.start_load_kv(None)
    if by_request:
        failed = made.get_transfer_results(set()).failed_recving
        assert failed == (set() if loaded else {"r"})
    else:
        assert made.get_finished(set()) == (set(), {"r"})
        assert made.get_block_ids_with_load_errors() == (set() if loaded else {7, 8})
    measured = made.get_kv_connector_stats().data
    assert measured["used_tokens"] == {"r": [0.0, 1, loaded]}
    assert measured["load_times"]["4:r"][1:] == [1, loaded]


def test_several_kinds_of_attention_need_a_vllm_that_knows_failed_requests(monkeypatch):
    groups = SimpleNamespace(kv_cache_groups=[1, 2])
    nixl.refuse_groups(groups)
    monkeypatch.setattr(nixl, "NixlPullConnector", object)
    nixl.refuse_groups(SimpleNamespace(kv_cache_groups=[1]))
    with pytest.raises(ValueError, match="--disable-hybrid-kv-cache-manager"):
        nixl.refuse_groups(groups)


def config():
    return SimpleNamespace(kv_buffer_device="cuda", kv_buffer_size=1e9, kv_connector_extra_config={"num_threads": 2})


@pytest.mark.parametrize("role", ["prefiller", "decoder"])
def test_the_settings_files(role):
    path, taken = PACKAGE / "configs" / f"lmcache-{role}-config.yaml", config()
    nixl.take_settings(taken, str(path))
    content = yaml.safe_load(path.read_text())
    assert taken.kv_connector_extra_config == {**content, "num_threads": 2}


def test_settings_of_both_places(tmp_path):
    (tmp_path / "own.yaml").write_text("kv_buffer_device: cpu\nbackends: [UCX]\nnum_threads: 8\n")
    taken = config()
    nixl.take_settings(taken, str(tmp_path / "own.yaml"))
    assert taken.kv_buffer_device == "cpu"
    assert taken.kv_connector_extra_config == {"num_threads": 2, "backends": ["UCX"]}, "the command line wins"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chunk_size: 256\n", "unknown key 'chunk_size': allowed: kv_buffer_device, "),
        ("kv_lease_duration: soon\n", "kv_lease_duration: 'soon' is not of the kind that is allowed"),
        ("kv_lease_duration: 5\n", "kv_lease_duration: 5: allowed: 6 seconds or more"),
        ("- a\n", "allowed: keys and values"),
        ("a: [\n", "own.yaml: while parsing"),
        (None, "No such file or directory"),
    ],
)
def test_bad_settings_are_told(tmp_path, text, said):
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="DISAGG_NIXL_CONFIG_FILE") as error:
        nixl.take_settings(config(), str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_every_setting_is_read_by_vllm():
    from pathlib import Path

    import vllm.distributed.kv_transfer.kv_connector.v1.nixl as package

    source = "".join(path.read_text() for path in Path(package.__file__).parent.glob("*.py"))
    for name in nixl.EXTRA:
        assert f'"{name}"' in source, name
