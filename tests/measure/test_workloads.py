"""Workloads: published quantiles, arrivals, shared beginnings, scaling, trace files."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from disagg_prefill_lmcache_v1.measure.types import UsageError
from disagg_prefill_lmcache_v1.measure.workloads import (
    MADE,
    SHAPES,
    Workload,
    arrival_times,
    make_workload,
    read_trace,
    shared_part,
    warm_up_like,
    write_trace,
)

ENDLESS = 10**7


def make(name: str, **changed: Any) -> Workload:
    arguments = {"count": 3000, "input_len": 512, "output_len": 16, "burstiness": None, "max_model_len": ENDLESS}
    return make_workload(name, **{**arguments, "seed": 7, **changed})


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_quantiles_mean_and_sharing(name: str) -> None:
    shape, made = SHAPES[name], make(name)
    for lengths, found in (
        (shape.input, sorted(request.input_tokens for request in made.requests)),
        (shape.output, sorted(request.output_tokens for request in made.requests)),
    ):
        for part, wanted in ((0.5, lengths.p50), (0.9, lengths.p90), (0.99, lengths.p99)):
            assert found[int(part * len(found))] == pytest.approx(wanted, rel=0.03, abs=1)
        assert statistics.mean(found) == pytest.approx(lengths.mean, rel=0.05)
    assert shared_part(made.requests) == pytest.approx(shape.shared, abs=0.02)
    assert "CC-BY" in made.source or "Apache" in made.source


def test_a_small_sample_has_the_quantiles_too() -> None:
    lengths = sorted(request.input_tokens for request in make("azure-conversation", count=20).requests)
    assert lengths[9] <= 1020 <= lengths[10]
    assert lengths[17] <= 2735 <= lengths[18]


@pytest.mark.parametrize(("burstiness", "low", "high"), [(100.0, 0.08, 0.12), (1.0, 0.9, 1.1), (0.11, 2.6, 3.4)])
def test_gaps_are_as_uneven_as_asked_and_one_a_second_in_the_mean(burstiness: float, low: float, high: float) -> None:
    starts = arrival_times(5000, burstiness, random.Random(3))
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert starts[0] == 0
    assert starts[-1] == pytest.approx(5000, rel=0.02)
    assert low < statistics.pstdev(gaps) / statistics.mean(gaps) < high


@pytest.mark.parametrize("name", MADE)
def test_a_seed_gives_the_same_requests_and_another_one_others(name: str) -> None:
    first, again, other = (make(name, count=40, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert [request.start for request in first.requests] != [request.start for request in other.requests]


@pytest.mark.parametrize("name", [*SHAPES, "multi-turn"])
@pytest.mark.parametrize("limit", [8192, 600])
def test_lengths_are_scaled_to_the_model_with_what_they_share(name: str, limit: int) -> None:
    full, made = make(name, count=60), make(name, count=60, max_model_len=limit)
    assert all(request.input_tokens + request.output_tokens <= limit for request in made.requests)
    assert all(len(request.blocks) == -(-request.input_tokens // made.block) for request in made.requests)
    if made.scale < 1:
        assert max(request.input_tokens for request in made.requests) > limit / 3  # no more than needed
        assert made.describe()["scale"] == round(made.scale, 4)
    assert shared_part(made.requests) == pytest.approx(shared_part(full.requests), abs=0.05)


def test_fixed_lengths_are_never_scaled() -> None:
    with pytest.raises(UsageError, match="--max-model-len 500"):
        make("fixed", max_model_len=500)


def test_what_cannot_be_scaled_so_far_is_refused() -> None:
    with pytest.raises(UsageError, match="--workload mooncake-synthetic does not fit --max-model-len 64"):
        make("mooncake-synthetic", max_model_len=64)


def test_turns_continue_their_conversation() -> None:
    made = make("multi-turn", count=32, input_len=100, output_len=20)
    prompts = [request.input_tokens for request in made.requests]
    assert prompts[:16] == prompts[16:] == [100] * 4 + [220] * 4 + [340] * 4 + [460] * 4
    for before, after in zip(made.requests[:12], made.requests[4:16], strict=True):
        whole = before.input_tokens // made.block
        assert after.blocks[:whole] == before.blocks[:whole]
    begins = {request.blocks[0] for request in made.requests}
    assert len(begins) == 8  # conversations have nothing in common


def test_a_trace_file_is_read_and_written_alike(tmp_path: Path) -> None:
    made = make("mooncake-conversation", count=50)
    path = tmp_path / "trace.jsonl"
    following = write_trace(path, made, 2.5, offset=1000)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert following == 1 + max(number for entry in entries for number in entry["hash_ids"])
    assert min(number for entry in entries for number in entry["hash_ids"]) == 1000
    assert entries[-1]["timestamp"] == pytest.approx(made.requests[-1].start / 2.5 * 1000, abs=0.001)
    again = make(str(path), count=50)
    assert (again.source, again.burstiness) == ("trace file", None)
    for one, other in zip(made.requests, again.requests, strict=True):
        assert (one.input_tokens, one.output_tokens) == (other.input_tokens, other.output_tokens)
        assert [block + 1000 for block in one.blocks] == list(other.blocks)
    # Its times are stretched to one request a second.
    assert again.requests[-1].start == pytest.approx(49)
    assert len(read_trace(path, 7)) == 7


def test_a_full_batch_begins_at_once(tmp_path: Path) -> None:
    write_trace(tmp_path / "all", make("fixed", count=3), 0, 0)
    assert [json.loads(line)["timestamp"] for line in (tmp_path / "all").read_text().splitlines()] == [0, 0, 0]


def test_warm_up_shares_nothing() -> None:
    warm = warm_up_like(make("azure-code", count=30), 4)
    assert len(warm.requests) == 4
    assert shared_part(warm.requests) == 0
    assert {request.input_tokens for request in warm.requests} < {
        request.input_tokens for request in make("azure-code", count=30).requests
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("", "the file is empty"),
        ("[]\n", "line 1"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\nx\n', "line 2"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1]}\n', "one hash id for each 512"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 5, "hash_ids": []}\n', "from 1 on"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 5, "hash_ids": [1]}\n', "from 1 on"),
        (b"\xff\xfe", "it is no text"),
    ],
)
def test_a_bad_trace_is_told_in_one_line(tmp_path: Path, text: str | bytes | None, told: str) -> None:
    path = tmp_path / "trace.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        make(str(path))
    message = str(caught.value)
    assert message.startswith("--workload")
    assert str(path) in message
    assert told in message
    assert "\n" not in message
