"""Weights, by construction, of a small Llama that recalls: the next token is the one that followed the last two before.

A random model (tiny_model.py) has near ties, so in bfloat16 some of its answers differ by rounding alone. This one has
none where the last two tokens stand in the prompt: each token of an answer is looked up in the KV cache with a margin
of 8 logits, which rounding does not reach, and a lookup needs every layer and the KV heads of the token's class, so a
wrong, missing or misplaced entry that is asked for shows as another token.

- Layer 0, two query heads for each KV head: they look one and two places back (by rotary position alone) and write the
  codes of the tokens there into the residual stream. In decoding only its entries of the last two places matter.
- Layers 1 to 7: the query is the code of the current and the previous token, the key that of the two tokens before; the
  value is one digit of the token. KV head h serves the tokens of class h.
- The output layer puts the digits together: a token is its class and one digit for each of the layers 1 to 7.

Codes are words of the extended Golay code (24 bits, at least 8 apart). Two tokens that stand in the prompt several
times are looked up at one of the places: keys differ a little by what follows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ROPE_THETA = 1e20  # pairs 0 to 6 of a head turn with the position, the others hardly do within 16,384 tokens
LAYERS, HIDDEN, HEAD, KV_HEADS, HEADS = 8, 512, 64, 4, 8
CODE = 24  # bits
DIGITS = (3, 3, 2, 2, 2, 2, 2)  # values of each layer's digit: 288 tokens a class, 256 are needed
FAST = 7  # rotary pairs that tell positions apart
POSITION_SCORE = 40.0  # of one fast pair, at the place that is looked for
CODE_SCORE = 4.0  # of one equal bit; two tokens that fit: 192, the next best at most 128
SALT_SCORE = 10.0  # most that a key's salt changes a score
DIGIT_LOGIT = 12.0
ROOT = math.sqrt(math.sqrt(HEAD))  # scores are divided by the root of the head size
TIE_LOGIT = 4.0  # tokens differ by up to this much, so that two places that fit alike are no tie
DIGIT_VALUE = 2.0  # what a lookup adds to the residual stream

# The residual stream, in order.
CURRENT = 0  # code of the token itself, for each KV head
BACK_1 = CURRENT + KV_HEADS * CODE
BACK_2 = BACK_1 + KV_HEADS * CODE
OWN = BACK_2 + KV_HEADS * CODE  # digits of the token itself: one of 3 for each class and layer, then the class
OWN_SIZE = KV_HEADS * 3 * len(DIGITS) + KV_HEADS
FOUND = OWN + OWN_SIZE  # the same of the token that was looked up
ONE = FOUND + OWN_SIZE
SALT = ONE + 1  # two places, so that every token has the same norm


def golay_words() -> np.ndarray:
    """All 4,096 words of the extended Golay code as +1 and -1, shape (4096, 24)."""
    import numpy as np

    generator = 0b101011100011
    rows = [generator << shift for shift in range(12)]
    words = []
    for index in range(4096):
        word = 0
        for shift in range(12):
            word ^= rows[shift] if index >> shift & 1 else 0
        words.append(word << 1 | word.bit_count() & 1)
    bits = np.array([[word >> place & 1 for place in range(CODE)] for word in words])
    return (1 - 2 * bits).astype(np.float32)


def digits_of(token: int) -> tuple[int, list[int]]:
    """Class and digits of a token."""
    number, digits = token // KV_HEADS, []
    for size in DIGITS:
        digits.append(number % size)
        number //= size
    return token % KV_HEADS, digits


def own_places(token: int) -> list[int]:
    """Where a token's digits and its class stand in a block of OWN_SIZE."""
    group, digits = digits_of(token)
    places = [(group * len(DIGITS) + layer) * 3 + digit for layer, digit in enumerate(digits)]
    return [*places, KV_HEADS * 3 * len(DIGITS) + group]


def embeddings(vocab: int, rng: Any) -> np.ndarray:
    """Shape (vocab, 512)."""
    import numpy as np

    table = np.zeros((vocab, HIDDEN), dtype=np.float32)
    words = golay_words()
    for head in range(KV_HEADS):
        table[:, CURRENT + head * CODE : CURRENT + (head + 1) * CODE] = words[rng.permutation(4096)[:vocab]]
    angle = np.linspace(0, math.pi, vocab)[rng.permutation(vocab)]
    table[:, SALT], table[:, SALT + 1], table[:, ONE] = np.cos(angle), np.sin(angle), 1
    for token in range(vocab):
        table[token, [OWN + place for place in own_places(token)]] = 1
    return table


def stream_rms(layer: int) -> float:
    """Root mean square of the residual stream before a layer (8: before the output), at a place where all is found."""
    squares = KV_HEADS * CODE + len(DIGITS) + 1 + 1 + 1  # code, digits, class, ONE, salt
    if layer > 0:
        squares += 2 * KV_HEADS * CODE
        done = layer - 1
        squares += DIGIT_VALUE**2 * (done + (done / len(DIGITS)) ** 2)
    return math.sqrt(squares / HIDDEN)


def _look_back(q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, head: int) -> None:
    """Layer 0: the two query heads of a KV head look one and two places back and copy the code of the token there."""
    import numpy as np

    frequencies = ROPE_THETA ** (-np.arange(FAST) / (HEAD // 2))
    strength = math.sqrt(POSITION_SCORE) * ROOT * stream_rms(0)
    code = [CURRENT + head * CODE + bit for bit in range(CODE)]
    k[head * HEAD : head * HEAD + FAST, ONE] = strength
    v[range(head * HEAD, head * HEAD + CODE), code] = stream_rms(0)
    for back, target in ((1, BACK_1), (2, BACK_2)):
        row = (2 * head + back - 1) * HEAD
        turn = -back * frequencies  # as if the query stood `back` places earlier
        q[row : row + FAST, ONE] = strength * np.cos(turn)
        q[row + HEAD // 2 : row + HEAD // 2 + FAST, ONE] = strength * np.sin(turn)
        o[[target - CURRENT + place for place in code], range(row, row + CODE)] = 1


def _look_up(q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, head: int, layer: int) -> None:
    """Layers 1 to 7: both query heads of a KV head find the place after the last two tokens and copy its digit."""
    rms = stream_rms(layer)
    strength, salt = (math.sqrt(score) * ROOT * rms for score in (CODE_SCORE, SALT_SCORE))
    code = [CURRENT + head * CODE + bit for bit in range(CODE)]
    first, second = ([place - CURRENT + back for place in code] for back in (BACK_1, BACK_2))
    digit = [OWN + (head * len(DIGITS) + layer - 1) * 3 + value for value in range(3)]
    group = [OWN + KV_HEADS * 3 * len(DIGITS) + value for value in range(KV_HEADS)]
    slow = [*range(FAST, HEAD // 2), *range(HEAD // 2 + FAST, HEAD)]
    low, high = slow[:CODE], slow[CODE : 2 * CODE]
    row = head * HEAD
    k[[row + place for place in low], first] = strength
    k[[row + place for place in high], second] = strength
    k[row + slow[-1], SALT] = salt
    v[range(row, row + 3), digit] = rms
    v[range(row + 3, row + 3 + KV_HEADS), group] = rms
    for row in (2 * head * HEAD, (2 * head + 1) * HEAD):
        q[[row + place for place in low], code] = strength
        q[[row + place for place in high], first] = strength
        q[row + slow[-1], ONE] = salt
        o[[place + FOUND - OWN for place in digit], range(row, row + 3)] = DIGIT_VALUE / 2
        share = DIGIT_VALUE / 2 / KV_HEADS / len(DIGITS)
        o[[place + FOUND - OWN for place in group], range(row + 3, row + 3 + KV_HEADS)] = share


def attention(layer: int) -> dict[str, np.ndarray]:
    """Weights q, k, v, o of one layer; rows are outputs."""
    import numpy as np

    q, k = (np.zeros((count * HEAD, HIDDEN), dtype=np.float32) for count in (HEADS, KV_HEADS))
    v, o = np.zeros_like(k), np.zeros((HIDDEN, HEADS * HEAD), dtype=np.float32)
    for head in range(KV_HEADS):
        if layer == 0:
            _look_back(q, k, v, o, head)
        else:
            _look_up(q, k, v, o, head, layer)
    return {"q": q, "k": k, "v": v, "o": o}


def output(vocab: int, rng: Any) -> np.ndarray:
    """Shape (vocab, 512): the logit of a token counts its digits and its class among what was found."""
    import numpy as np

    rows = np.zeros((vocab, HIDDEN), dtype=np.float32)
    scale = DIGIT_LOGIT * stream_rms(LAYERS) / DIGIT_VALUE
    rows[:, ONE] = np.linspace(0, TIE_LOGIT, vocab)[rng.permutation(vocab)] * stream_rms(LAYERS)
    for token in range(vocab):
        *digits, group = own_places(token)
        rows[token, [FOUND + place for place in digits]] = scale
        rows[token, FOUND + group] = 3 * scale
    return rows


def tensors(vocab: int, intermediate: int, rng: Any) -> dict[str, np.ndarray]:
    """All weights by their names in the checkpoint, float32."""
    import numpy as np

    out = {"model.embed_tokens.weight": embeddings(vocab, rng), "lm_head.weight": output(vocab, rng)}
    ones = np.ones(HIDDEN, dtype=np.float32)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        out |= {f"{prefix}.self_attn.{name}_proj.weight": value for name, value in attention(layer).items()}
        wide = np.zeros((intermediate, HIDDEN), dtype=np.float32)  # the MLP has nothing to do
        out |= {f"{prefix}.mlp.{name}_proj.weight": wide for name in ("gate", "up")}
        out[f"{prefix}.mlp.down_proj.weight"] = wide.T.copy()
        out |= {f"{prefix}.input_layernorm.weight": ones, f"{prefix}.post_attention_layernorm.weight": ones}
    out["model.norm.weight"] = ones
    return out
