"""Workloads: which requests, of how many tokens, with which shared beginnings and at which times.

A workload becomes a list of requests once, and then a trace file of Mooncake's format for each request rate: the same
requests, at times that are stretched. Named shapes are rebuilt offline from published quantiles (SHAPES).
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.measure.types import UsageError

BLOCK = 512  # tokens that one of a trace's hash ids stands for, before scaling
TURN_BLOCK = 16
TURNS = 4
GROUP = 4  # conversations that take turns


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts or answers: quantiles and mean."""

    p50: float
    p90: float
    p99: float
    mean: float

    def points(self) -> list[tuple[float, float]]:
        """(share, tokens) between which a quantile is interpolated; the lowest is where the mean comes out right."""
        highest = self.p99 * (self.p99 / self.p90) ** 0.25
        upper = [(0.5, self.p50), (0.9, self.p90), (0.99, self.p99), (1.0, highest)]
        rest = self.mean - sum((b - a) * _log_mean(low, high) for (a, low), (b, high) in itertools.pairwise(upper))
        low, high = 1.0, self.p50
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if 0.5 * _log_mean(middle, self.p50) < rest else (low, middle)
        return [(0.0, low), *upper]

    def sample(self, count: int, rng: random.Random) -> list[int]:
        """So many lengths, one from each of as many equal shares: a small sample has the quantiles too."""
        points = self.points()
        lengths = []
        for index in range(count):
            share = (index + rng.random()) / count
            (a, low), (b, high) = next(pair for pair in itertools.pairwise(points) if share <= pair[1][0])
            lengths.append(max(round(low * (high / low) ** ((share - a) / (b - a))), 1))
        rng.shuffle(lengths)
        return lengths


def _log_mean(low: float, high: float) -> float:
    """Mean of what lies between two lengths when their logarithms are spread evenly."""
    return low if high == low else (high - low) / math.log(high / low)


@dataclass(frozen=True)
class Shape:
    """A published trace in numbers. ``gap_cv``: coefficient of variation of the gaps between its requests."""

    source: str
    input: Lengths
    output: Lengths
    request_rate: float
    gap_cv: float
    shared: float = 0.0  # part of the prompts' blocks of 512 tokens that an earlier request has at its beginning


_MOONCAKE = "kvcache-ai/Mooncake, Apache-2.0"
_AZURE = "Azure/AzurePublicDataset, CC-BY"
SHAPES = {
    "mooncake-conversation": Shape(
        _MOONCAKE, Lengths(6909, 27367, 85401, 12035), Lengths(350, 597, 1120, 343), 3.4, 3.0, 0.37
    ),
    "mooncake-synthetic": Shape(
        _MOONCAKE, Lengths(11587, 38615, 66458, 15326), Lengths(69, 389, 769, 149), 3.9, 1.0, 0.64
    ),
    "azure-conversation": Shape(_AZURE, Lengths(1020, 2735, 4142, 1155), Lengths(129, 424, 601, 211), 5.5, 1.1),
    "azure-code": Shape(_AZURE, Lengths(1469, 5194, 7436, 2048), Lengths(13, 55, 252, 28), 2.6, 13.0),
}
MADE = ("fixed", "multi-turn", *SHAPES)


@dataclass(frozen=True)
class Request:
    """One request: seconds after the first one at one request a second, tokens, and what its prompt is made of."""

    start: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]  # equal numbers are equal tokens


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their times; the mean rate of ``start`` is one a second."""

    name: str
    source: str
    requests: tuple[Request, ...]
    block: int  # tokens of each of a request's blocks
    burstiness: float | None  # None: the times are those of a trace
    scale: float = 1.0  # of all lengths, to fit the model

    def describe(self) -> dict[str, Any]:
        """For compare.json."""
        prompts = [request.input_tokens for request in self.requests]
        return {
            "name": self.name, "source": self.source, "requests": len(self.requests),
            "burstiness": self.burstiness and round(self.burstiness, 4),
            "input_tokens": sum(prompts), "longest_input": max(prompts),
            "output_tokens": sum(request.output_tokens for request in self.requests),
            "shared_blocks": round(shared_part(self.requests), 4), "block_tokens": self.block,
            "scale": round(self.scale, 4),
        }  # fmt: skip


def shared_part(requests: Iterable[Request]) -> float:
    """Part of all whole and broken blocks that an earlier request has."""
    seen: set[int] = set()
    known = total = 0
    for request in requests:
        known += sum(block in seen for block in request.blocks)
        total += len(request.blocks)
        seen.update(request.blocks)
    return known / total if total else 0.0


def arrival_times(count: int, burstiness: float, rng: random.Random) -> list[float]:
    """Starts at one request a second: gaps of a gamma distribution, as vLLM's benchmark makes them.

    burstiness 1 is Poisson, more is steadier, less is burstier; the gaps' coefficient of variation is its inverse
    square root. The gaps are stretched so that all together take ``count`` seconds.
    """
    gaps = [rng.gammavariate(burstiness, 1 / burstiness) for _ in range(count)]
    stretch = count / (sum(gaps) or 1.0)
    return list(itertools.accumulate((gap * stretch for gap in gaps[:-1]), initial=0.0))


def make_workload(
    name: str, *, count: int, input_len: int, output_len: int, burstiness: float | None, max_model_len: int, seed: int
) -> Workload:
    """The workload of a name in MADE, or of a trace file.

    Raises:
        UsageError: no such workload, a file that is none, or lengths that do not fit the model.
    """
    rng = random.Random(f"{name} {seed}")
    block, source = BLOCK, "made here"
    if name == "fixed":
        burstiness = burstiness or 1.0
        plain = [(input_len, output_len)] * count
        made = _timed(plain, _unshared(plain), burstiness, rng)
    elif name == "multi-turn":
        burstiness, block = burstiness or 1.0, TURN_BLOCK
        made = _multi_turn(count, input_len, output_len, burstiness, rng)
    elif name in SHAPES:
        shape = SHAPES[name]
        source = f"quantiles of {shape.source}"
        burstiness = burstiness or shape.gap_cv**-2
        lengths = list(zip(shape.input.sample(count, rng), shape.output.sample(count, rng), strict=True))
        made = _timed(lengths, _shared(lengths, shape.shared, rng), burstiness, rng)
    else:
        made, burstiness, source = read_trace(Path(name), count), None, "trace file"
    return _fitted(Workload(name, source, tuple(made), block, burstiness), max_model_len)


def _timed(
    lengths: Sequence[tuple[int, int]], blocks: Sequence[tuple[int, ...]], burstiness: float, rng: random.Random
) -> list[Request]:
    starts = arrival_times(len(lengths), burstiness, rng)
    return [Request(start, *pair, ids) for start, pair, ids in zip(starts, lengths, blocks, strict=True)]


def _unshared(lengths: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    numbers = itertools.count()
    return [tuple(itertools.islice(numbers, -(-tokens // BLOCK))) for tokens, _ in lengths]


def _shared(lengths: Sequence[tuple[int, int]], part: float, rng: random.Random) -> list[tuple[int, ...]]:
    """Blocks of which this part stands at the beginning of an earlier request: whole ones only."""
    numbers = itertools.count()
    made: list[tuple[int, ...]] = []
    known = total = 0
    for tokens, _ in lengths:
        needed = -(-tokens // BLOCK)
        total += needed
        begin: tuple[int, ...] = ()
        if made and (wanted := int(part * total) - known) > 0:
            wanted = min(wanted, tokens // BLOCK)
            # Any earlier one that is long enough; else the longest.
            fitting = [ids for ids in made if len(ids) > wanted] or [max(made, key=len)]
            begin = rng.choice(fitting)[:wanted]
        known += len(begin)
        made.append(begin + tuple(itertools.islice(numbers, needed - len(begin))))
    return made


def _multi_turn(count: int, input_len: int, output_len: int, burstiness: float, rng: random.Random) -> list[Request]:
    """Conversations of TURNS turns: a prompt is the one before, as many tokens as an answer has, and a new question.

    GROUP conversations take turns, so that some requests of others lie between two of one. The earlier answer in a
    prompt is made up: what a server keeps of its own answers is not reused.
    """
    numbers = itertools.count()
    lengths, blocks = [], []
    said: list[tuple[int, ...]] = []
    for index in range(count):
        place, turn = index % GROUP, index // GROUP % TURNS
        if turn == 0 and place == 0:
            said = [()] * GROUP
        wanted = (turn + 1) * input_len + turn * output_len
        needed = -(-wanted // TURN_BLOCK)
        prompt = said[place] + tuple(itertools.islice(numbers, needed - len(said[place])))
        lengths.append((wanted, output_len))
        blocks.append(prompt)
        # The next turn continues whole blocks only: a broken last one has other tokens when it is full.
        said[place] = prompt[: wanted // TURN_BLOCK]
    return _timed(lengths, blocks, burstiness, rng)


def read_trace(path: Path, count: int) -> list[Request]:
    """The first requests of a file of Mooncake's format (a JSON object a line; timestamps are milliseconds).

    Raises:
        UsageError: no such file, or a line that is not of this form.
    """
    made = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(itertools.islice(lines, count), start=1):
                made.append(_request_of(line, f"--workload {path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "it is no text"
        names = ", ".join(MADE)
        raise UsageError(f"--workload {path}: {cause}; allowed: {names} or a trace file of Mooncake's format") from None
    if not made:
        raise UsageError(f"--workload {path}: the file is empty")
    made.sort(key=lambda request: request.start)
    begin = made[0].start
    # The last gap counts as a mean one, as with arrivals that are made here.
    stretch = (len(made) - 1) / ((made[-1].start - begin) or 1.0)
    return [replace(request, start=(request.start - begin) * stretch) for request in made]


def _request_of(line: str, where: str) -> Request:
    wanted = 'allowed: {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [numbers]}'
    try:
        entry = json.loads(line)
        start, tokens, answer = float(entry["timestamp"]), int(entry["input_length"]), int(entry["output_length"])
        blocks = tuple(int(number) for number in entry["hash_ids"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{where}: {wanted}") from None
    if tokens < 1 or answer < 1 or not math.isfinite(start) or len(blocks) != -(-tokens // BLOCK):
        raise UsageError(f"{where}: lengths from 1 on and one hash id for each {BLOCK} tokens; {wanted}")
    return Request(start, tokens, answer, blocks)


def _fitted(workload: Workload, max_model_len: int) -> Workload:
    """The same with all lengths scaled so that the longest request fits the model."""
    longest = max(request.input_tokens + request.output_tokens for request in workload.requests)
    if longest <= max_model_len:
        return workload
    if workload.name == "fixed":
        raise UsageError(f"--input-len and --output-len do not fit --max-model-len {max_model_len}")
    block = max(int(workload.block * max_model_len / longest), 1)
    scale = block / workload.block
    requests = []
    for request in workload.requests:
        whole, rest = divmod(request.input_tokens, workload.block)
        tokens = max(whole * block + int(rest * scale), 1)
        answer = min(max(round(request.output_tokens * scale), 1), max_model_len - tokens)
        if answer < 1:
            raise UsageError(f"--workload {workload.name} does not fit --max-model-len {max_model_len}")
        requests.append(replace(request, input_tokens=tokens, output_tokens=answer, blocks=request.blocks))
    return replace(workload, requests=tuple(_with_blocks(requests, block)), block=block, scale=scale)


def _with_blocks(requests: Sequence[Request], block: int) -> list[Request]:
    """Each with as many blocks as it has tokens for: scaling may round a broken last one away."""
    return [replace(each, blocks=each.blocks[: -(-each.input_tokens // block)]) for each in requests]


def warm_up_like(workload: Workload, count: int) -> Workload:
    """So many requests of the workload's median lengths, at once, that share nothing."""
    ordered = sorted(workload.requests, key=lambda request: request.input_tokens)
    one = ordered[len(ordered) // 2]
    size = len(one.blocks)
    requests = [
        replace(one, start=0.0, blocks=tuple(range(index * size, (index + 1) * size))) for index in range(count)
    ]
    return replace(workload, requests=tuple(requests))


def write_trace(path: Path, workload: Workload, rate: float, offset: int) -> int:
    """Writes the requests at this many a second (0: all at once) as a file of Mooncake's format.

    ``offset`` is added to all hash ids, as prompts of two files shall have nothing in common. Returns the next one.
    """
    lines = []
    highest = offset
    for request in workload.requests:
        blocks = [offset + block for block in request.blocks]
        highest = max(highest, *blocks)
        start = request.start / rate * 1000 if rate else 0
        entry = {"timestamp": round(start, 3), "input_length": request.input_tokens}
        lines.append(json.dumps({**entry, "output_length": request.output_tokens, "hash_ids": blocks}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return highest + 1
