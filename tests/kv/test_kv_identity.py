"""identity and fingerprint: what goes into a chunk's key, and what a client can do about it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lmcache", reason="LMCache is not installed: its keys are what is tested")
pytest.importorskip("vllm", reason="vLLM is not installed: its requests are what is tested")

from hostile_params import HOSTILE
from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorV1Impl, extract_request_configs
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.protocol import MAX_KEY_LENGTH
from lmcache.v1.token_database import ChunkedTokenDatabase
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from disagg_prefill_lmcache_v1.kv.connector import LMCacheDisaggConnectorV1
from disagg_prefill_lmcache_v1.kv.fingerprint import WHOLE, model_fingerprint
from disagg_prefill_lmcache_v1.kv.identity import IdentifiedTokens, Identities, model_key
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadScheduler
from disagg_prefill_lmcache_v1.kv.policy import LoadPolicy
from disagg_prefill_lmcache_v1.kv.scheduler import DisaggScheduler

CHUNK = 64
TOKENS = list(range(150))


# models


@pytest.fixture
def weights(tmp_path):
    """weights(name, **changes): a folder with a model of two tensors."""

    def write(name, seed=0, rows=100, files=1, config=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        values = torch.Generator().manual_seed(seed)
        tensors = {
            "large": torch.randn(rows, WHOLE // 100, generator=values),
            "small": torch.randn(8, generator=values),
        }
        shares = [tensors] if files == 1 else [{n: t} for n, t in tensors.items()]
        for i, share in enumerate(shares):
            save_file(share, folder / f"model-{i + 1}-of-{files}.safetensors")
        if config is not None:
            (folder / "modeling.py").write_text(config)
        return folder

    return write


def vllm_config(path, **changes):
    model = {
        "model": str(path), "revision": None, "code_revision": None, "dtype": torch.float32, "quantization": None,
        "hf_config": SimpleNamespace(rope_theta=1e4, layers=2, _name_or_path=str(path)), "seed": 0,
    }  # fmt: skip
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    rest = {"cache_dtype": "auto", "load_format": "auto", "speculative": None}
    for name, value in changes.items():
        next(part for part in (model, parallel, rest) if name in part)[name] = value
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(cache_dtype=rest["cache_dtype"]),
        load_config=SimpleNamespace(load_format=rest["load_format"], download_dir=None),
        speculative_config=rest["speculative"],
    )


def test_a_model_counts_by_content_not_by_place(weights):
    here, there = weights("here"), weights("there")
    sharded = weights("sharded", files=2)
    same = {model_fingerprint(vllm_config(folder)) for folder in (here, there, sharded)}
    assert len(same) == 1


def test_new_weights_at_the_same_path_are_another_model(weights):
    before = model_fingerprint(vllm_config(weights("model")))
    assert model_fingerprint(vllm_config(weights("model", seed=1))) != before
    assert model_fingerprint(vllm_config(weights("model", rows=101))) != before
    assert model_fingerprint(vllm_config(weights("model"))) == before


def test_everything_that_kv_depends_on_counts(weights):
    folder = weights("model")
    changes = [
        {}, {"dtype": torch.bfloat16}, {"quantization": "fp8"}, {"revision": "main"}, {"cache_dtype": "fp8"},
        {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"hf_config": SimpleNamespace(rope_theta=2e4)},
        {"load_format": "dummy"}, {"load_format": "dummy", "seed": 1},
    ]  # fmt: skip
    seen = [model_fingerprint(vllm_config(folder, **change)) for change in changes]
    seen.append(model_fingerprint(vllm_config(weights("model", config="another layer norm"))))
    assert len(set(seen)) == len(seen)


def test_draft_models_count_and_n_grams_do_not(weights):
    folder, draft = weights("model"), weights("draft", seed=5)
    drafts = {"draft_model": True, "ngram": False}
    speculative = {
        method: SimpleNamespace(
            method=method, draft_model_config=vllm_config(draft).model_config, uses_draft_kv_cache=lambda own=own: own
        )
        for method, own in drafts.items()
    }
    plain, with_draft, ngram = (
        model_fingerprint(vllm_config(folder, speculative=s))
        for s in (None, speculative["draft_model"], speculative["ngram"])
    )
    assert plain == ngram != with_draft


def test_a_model_without_files_counts_by_name(tmp_path):
    names = [model_fingerprint(vllm_config(tmp_path / name)) for name in ("a", "b", "a")]
    assert names[0] == names[2] != names[1]


def test_names_fit_into_keys():
    for name in ("meta-llama/Llama-3.1-8B-Instruct", "/a" * 200 + "/model/", "/x/a@b%c", "tiny-llama", "/m/模型"):
        short = model_key(name, "f" * 24)
        key = CacheEngineKey(short, 1024, 1023, 2**64 - 1, torch.bfloat16, {"lmcache.tag.id": "f" * 32})
        assert len(key.to_string().encode()) <= MAX_KEY_LENGTH
        assert not set("@%") & set(short)


# requests


def request_of(params=None, salt=None, lora=None, items=(), extra=None):
    args = {**(extra or {}), **({"kv_transfer_params": params} if params is not None else {})}
    features = [SimpleNamespace(identifier=i, mm_position=SimpleNamespace(offset=o, length=1)) for o, i in items]
    return SimpleNamespace(
        request_id="r", sampling_params=SamplingParams(max_tokens=1, extra_args=args or None), cache_salt=salt,
        lora_request=lora, mm_features=features, kv_transfer_params=params, status="running",
    )  # fmt: skip


def tokens_database():
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=CHUNK, save_unfull_chunk=True, pre_caching_hash_algorithm="sha256_cbor"
    )
    metadata = LMCacheMetadata("model", 1, 1, 0, 0, torch.float32, (2, 2, CHUNK, 2, 16), chunk_size=CHUNK)
    return IdentifiedTokens(ChunkedTokenDatabase(config, metadata))


def keys_of(request, identities=None):
    """Keys as text, by the way that the identity takes: request, LMCache's reading of it, workers."""
    (identities or Identities()).give(request)
    configs = extract_request_configs(request.sampling_params)
    configs = json.loads(json.dumps(configs))  # as LMCache's lookup sends it to the workers
    return [key.to_string() for _, _, key in tokens_database().process_tokens(TOKENS, request_configs=configs)]


@pytest.fixture
def adapter(tmp_path):
    def write(name, content=b"weights", number=1, **fields):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text('{"r": 8}')
        (folder / "adapter_model.safetensors").write_bytes(content)
        return LoRARequest(name, number, str(folder), **fields)

    return write


def test_salts_and_adapters_have_keys_of_their_own(adapter):
    requests = [
        request_of(), request_of(salt="A"), request_of(salt="B"), request_of(lora=adapter("a")),
        request_of(lora=adapter("b", b"others")), request_of(lora=adapter("a"), salt="A"),
        request_of({"lmcache.tag.r": "x"}), request_of({"lmcache.tag.r": "y"}), request_of({"lmcache.tag.s": "x"}),
    ]  # fmt: skip
    keys = [set(keys_of(request)) for request in requests]
    assert all(len(each) == 3 for each in keys)
    assert len(set.union(*keys)) == 3 * len(requests)


def test_the_same_content_has_the_same_keys(adapter):
    assert keys_of(request_of(salt="A")) == keys_of(request_of(salt="A"))
    assert keys_of(request_of(lora=adapter("a"))) == keys_of(request_of(lora=adapter("twin", number=7)))


def test_lookup_by_hashes_finds_the_keys_that_are_stored():
    request = request_of(salt="A", items=[(70, "image")])
    stored = keys_of(request)
    database = tokens_database()
    chunks = list(database.process_tokens(TOKENS, make_key=False))  # as LMCache's scheduler side does, without configs
    hashes, offsets = [h for _, _, h in chunks], [end - start for start, end, _ in chunks]
    configs = extract_request_configs(request.sampling_params)
    found = database.process_tokens(hashes=hashes, offsets=offsets, request_configs=configs)
    assert [key.to_string() for _, _, key in found] == stored


def test_images_count_in_full_width_from_where_they_begin():
    one, other = (keys_of(request_of(items=[(70, "a" * 63 + end)])) for end in "01")
    plain = keys_of(request_of())
    assert one[0] == other[0] == plain[0], "the text before an image is shared"
    assert not set(one[1:]) & set(other[1:])
    assert keys_of(request_of(items=[(70, "x"), (130, "y")]))[1] == keys_of(request_of(items=[(70, "x")]))[1]


def test_an_adapter_whose_files_change_is_neither_stored_nor_loaded(adapter):
    identities = Identities()
    lora = adapter("a")
    assert keys_of(request_of(lora=lora), identities)
    adapter("a", b"other weights")
    assert keys_of(request_of(lora=lora), identities) == []
    assert keys_of(request_of(lora=adapter("a")), identities) == [], "who computed which block cannot be told any more"
    assert keys_of(request_of(lora=adapter("b")), identities)


def test_adapters_that_cannot_be_told_apart_are_neither_stored_nor_loaded(adapter, tmp_path):
    for lora in (adapter("a", load_inplace=True), LoRARequest("gone", 1, str(tmp_path / "gone"))):
        request = request_of(lora=lora)
        assert keys_of(request) == []
        assert extract_request_configs(request.sampling_params)["lmcache.skip_save"] is True


def test_a_request_without_identity_has_no_keys():
    database = tokens_database()
    assert list(database.process_tokens(TOKENS)) == []
    assert list(database.process_tokens(TOKENS, request_configs={"lmcache.tag.r": "x"})) == []


def test_long_lived_parameters_of_others_are_not_changed():
    request = request_of({"lmcache.tag.r": "x"}, extra={"mine": 1})
    before = request.sampling_params
    Identities().give(request)
    assert before.extra_args == {"mine": 1, "kv_transfer_params": {"lmcache.tag.r": "x"}}
    assert request.sampling_params.extra_args["mine"] == 1


def test_a_second_look_changes_nothing():
    identities, request = Identities(), request_of({"lmcache.tag.r": "x"}, salt="A")
    identities.give(request)
    params = request.sampling_params
    identities.give(request)
    assert request.sampling_params is params


# what clients send


@pytest.mark.parametrize("params", HOSTILE, ids=str)
def test_what_a_client_sends_reaches_neither_keys_nor_lmcache(params):
    request = request_of(params)
    keys = keys_of(request)
    assert all(len(key.encode()) <= MAX_KEY_LENGTH and key.count("@") == 5 for key in keys)
    assert len(keys) == 3
    assert request.kv_transfer_params is None
    said = extract_request_configs(request.sampling_params)
    assert said.keys() <= {"lmcache.tag.id", "lmcache.skip_save"}
    assert said["lmcache.tag.id"] != "0" * 32


@pytest.mark.parametrize("params", HOSTILE, ids=str)
def test_a_request_that_ends_before_its_first_token_harms_nobody(params):
    impl = object.__new__(LMCacheConnectorV1Impl)
    vars(impl).update(
        config=SimpleNamespace(get_extra_config_value=lambda name, default: default), async_loading=False,
        _manager=SimpleNamespace(lookup_client=None, lmcache_engine=None), _request_trackers={}, load_specs={},
    )  # fmt: skip
    connector = object.__new__(LMCacheDisaggConnectorV1)
    connector._lmcache_engine = impl
    connector._scheduler = DisaggScheduler(impl, "kv_producer", LoadScheduler(LoadPolicy("always")), None)
    request = request_of(params)
    request._output_token_ids = []
    assert connector.request_finished(request, []) == (False, None)
