"""kv_layout: every packing of vLLM's own CPU cache update is learned and moved exactly."""

from __future__ import annotations

import pytest
import torch

from disagg_prefill_lmcache_v1.kv import host_copy as kv_host_copy
from disagg_prefill_lmcache_v1.kv.layout import BlockLayout, UnsupportedKVLayout
from disagg_prefill_lmcache_v1.kv.mover import KVMover

ops = pytest.importorskip("vllm._custom_ops", reason="vLLM is not installed: its cache update is what is tested")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's CPU build: another device has no packed KV cache")
    current_platform.import_kernels()


def writer(isa):
    def write(key, value, cache, slots):
        blocks, heads, size, _ = cache.shape
        key_cache, value_cache = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)

    return write


def learn(isa, block_size, heads, head_size, dtype):
    return BlockLayout.learn(writer(isa), (heads, block_size, 2 * head_size), heads, block_size, head_size, dtype)


def filled_cache(isa, block_size, heads, head_size, dtype, layers=2, blocks=9):
    caches = [torch.zeros(blocks, heads, block_size, 2 * head_size, dtype=dtype) for _ in range(layers)]
    keys = [torch.randn(blocks * block_size, heads, head_size).to(dtype) for _ in caches]
    values = [torch.randn(blocks * block_size, heads, head_size).to(dtype) for _ in caches]
    for cache, key, value in zip(caches, keys, values, strict=True):
        writer(isa)(key, value, cache, torch.arange(blocks * block_size))
    return caches, keys, values


def slots_of(blocks, block_size, first, count):
    table = torch.tensor(blocks)[:, None] * block_size + torch.arange(block_size)
    return table.flatten()[first : first + count]


SHAPES = [(16, 2, 80), (32, 4, 64), (128, 4, 64), (128, 1, 128), (64, 8, 128)]


@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("block_size", "heads", "head_size"), SHAPES)
def test_moves_exactly(isa, dtype, block_size, heads, head_size):
    layout = learn(isa, block_size, heads, head_size, dtype)
    caches, keys, values = filled_cache(isa, block_size, heads, head_size, dtype)
    source = KVMover(caches, layout)
    empty = [torch.zeros_like(cache) for cache in caches]
    target = KVMover(empty, layout)
    order = [7, 2, 8, 3, 0, 5]
    size = block_size
    for first, count in ((0, 1), (0, 5), (3, 2), (0, size), (0, size + 3), (0, 3 * size), (5, 2 * size + 7)):
        slots = slots_of(order, size, first, count)
        chunk = torch.empty(source.shape(count), dtype=dtype)
        source.gather(chunk, slots)
        plain = [torch.stack([x[slots].reshape(count, -1) for x in side]) for side in (keys, values)]
        assert torch.equal(chunk, torch.stack(plain))
        for cache in empty:
            cache.zero_()
        target.scatter(chunk, slots)
        wanted = [torch.zeros_like(cache) for cache in caches]
        for cache, key, value in zip(wanted, keys, values, strict=True):
            writer(isa)(key[slots].contiguous(), value[slots].contiguous(), cache, slots)
        assert all(torch.equal(a, b) for a, b in zip(empty, wanted, strict=True)), "differs from vLLM's own write"


def any_bits(shape, dtype):
    """Every bit pattern: NaNs with payload, denormals, both zeros."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return torch.randint(torch.iinfo(bits).min, torch.iinfo(bits).max, shape, dtype=bits).view(dtype)


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plainly", [False, True], ids=["simd", "plainly"])
def test_moves_the_given_tokens_and_nothing_else(monkeypatch, isa, dtype, plainly):
    """Any bits, any slots; every other slot keeps its bits; small scratch buffers, so that batches end everywhere."""
    if plainly:
        monkeypatch.setattr(kv_host_copy, "_probe_shuffle", lambda: False)
    size, heads, head_size, layers = 64, 2, 32, 3
    layout = learn(isa, size, heads, head_size, dtype)
    caches = [any_bits((8, heads, size, 2 * head_size), dtype) for _ in range(layers)]
    mover = KVMover([cache.clone() for cache in caches], layout)
    in_order, apart = slots_of([1, 2, 3, 4], size, 0, 4 * size), slots_of([6, 1, 7, 2], size, 0, 4 * size)
    ragged = torch.cat((apart[9:50], apart[70:71], apart[77:], in_order[200:203]))
    cases = [in_order, apart, apart[:1], apart[1:2], apart[37:39], apart[13:100], apart[63:65], apart[5:250], ragged]
    cases += [torch.randperm(8 * size)[:90], torch.arange(0, 8 * size, 2), torch.arange(5, 150).flip(0)]
    for number, slots in enumerate(cases):
        monkeypatch.setattr(kv_host_copy, "_SCRATCH_BYTES", (1 << 10, 20 << 10, 1 << 20)[number % 3])
        chunk = any_bits((*mover.shape(slots.numel() + 3)[:2], slots.numel() + 3, heads * head_size), dtype)
        for layer, cache in enumerate(caches):
            key, value = (side.contiguous().view(-1, heads, head_size) for side in chunk[:, layer, 3:])
            writer(isa)(key, value, cache, slots)
        mover.scatter(chunk[:, :, 3:], slots)
        assert all(same_bits(a, b) for a, b in zip(mover.caches, caches, strict=True)), f"case {number} differs"
        back = chunk.clone()
        back[:, :, 3:] = 0
        mover.gather(back[:, :, 3:], slots)
        assert same_bits(back, chunk), f"case {number} differs"
    wrong = torch.tensor([3, 8 * size])
    for slots in (wrong, wrong - 4):
        with pytest.raises(IndexError, match=f"of {8 * size} slots"):
            mover.gather(torch.empty(mover.shape(2), dtype=dtype), slots)


def test_packed_sides_take_the_fast_way():
    """Slow ways are exact too: only this notices that a packing has fallen back to its elements one by one."""
    ways = {}
    for isa, dtype in (("vec", torch.float32), ("vec", torch.bfloat16), ("amx", torch.bfloat16)):
        layout = learn(isa, 64, 2, 64, dtype)
        sides = KVMover([torch.zeros(2, 2, 64, 128, dtype=dtype)], layout)._host.copies._sides
        ways[isa, dtype] = [type(side).__name__ for side in sides]
    assert ways == {
        ("vec", torch.float32): ["_Packed", "_Rows"],
        ("vec", torch.bfloat16): ["_Packed", "_Rows"],
        ("amx", torch.bfloat16): ["_Packed", "_Packed"],
    }


def test_packed_keys_are_not_plain():
    """Were K plain, the exactness test above would prove nothing about packing."""
    layout = learn("vec", 32, 2, 64, torch.float32)
    assert not torch.equal(layout.position[0], layout.position[1] - layout.position[1].min())


def test_layout_without_strided_view_moves_by_index():
    torch.manual_seed(1)
    shuffle = torch.randperm(2 * 2 * 16 * 8)

    def write(key, value, cache, slots):
        both = torch.stack((key, value)).reshape(-1)
        flat = cache.view(cache.shape[0], -1)
        per_token = key[0].numel()
        for i, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, 16)
            for side in range(2):
                at = shuffle[(side * 16 + offset) * per_token : (side * 16 + offset + 1) * per_token]
                flat[block, at] = both.view(2, -1, per_token)[side, i]

    layout = BlockLayout.learn(write, (2, 16, 16), 2, 16, 8, torch.float32)
    assert layout.views == (None, None)
    caches = [torch.zeros(4, 2, 16, 16)]
    key, value = torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    slots = torch.arange(40)
    write(key, value, caches[0], slots)
    mover = KVMover(caches, layout)
    chunk = torch.empty(mover.shape(40))
    mover.gather(chunk, slots)
    assert torch.equal(chunk[0, 0], key.view(40, -1))
    assert torch.equal(chunk[1, 0], value.view(40, -1))


@pytest.mark.parametrize("head_size", [64, 80])
def test_plain_layouts_move_by_whole_vectors(head_size):
    """Layouts of CUDA backends: K and V side by side in each head, or one after the other."""

    def fused(key, value, cache, slots):
        cache.view(-1, 2, 2 * head_size)[slots] = torch.cat((key, value), dim=2)

    def apart(key, value, cache, slots):
        for side, what in enumerate((key, value)):
            cache[slots // 16, side, slots % 16] = what

    for write, shape in ((fused, (16, 2, 2 * head_size)), (apart, (2, 16, 2, head_size))):
        layout = BlockLayout.learn(write, shape, 2, 16, head_size, torch.bfloat16)
        assert layout.run == {64: 64, 80: 80}[head_size]
        caches = [torch.zeros(5, *shape, dtype=torch.bfloat16) for _ in range(3)]
        key, value = torch.randn(2, 70, 2, head_size).to(torch.bfloat16)
        slots = torch.randperm(80)[:70]
        for cache in caches:
            write(key, value, cache, slots)
        mover = KVMover(caches, layout)
        chunk = torch.empty(mover.shape(70), dtype=torch.bfloat16)
        mover._move_on_device(chunk, slots, to_cache=False)
        assert all(torch.equal(chunk[0, i], key.view(70, -1)) for i in range(3))
        assert all(torch.equal(chunk[1, i], value.view(70, -1)) for i in range(3))
        others = [torch.zeros_like(cache) for cache in caches]
        KVMover(others, layout)._move_tokens(chunk, slots, to_cache=True)
        assert all(torch.equal(a, b) for a, b in zip(caches, others, strict=True))


def test_blocks_whose_axes_are_permuted_in_memory():
    """vLLM shows [blocks, heads, tokens, 2 * head_size] and holds tokens before heads."""
    shape, strides = (2, 16, 16), (16, 32, 1)

    def write(key, value, cache, slots):
        cache.transpose(1, 2)[slots // 16, slots % 16] = torch.cat((key, value), dim=2)

    layout = BlockLayout.learn(write, shape, 2, 16, 8, torch.float32, block_strides=strides)
    cache = torch.zeros(4, 16, 2, 16).transpose(1, 2)
    key, value = torch.randn(2, 40, 2, 8)
    slots = torch.randperm(64)[:40]
    write(key, value, cache, slots)
    chunk = torch.empty(2, 1, 40, 16)
    KVMover([cache], layout).gather(chunk, slots)
    assert torch.equal(chunk[:, 0], torch.stack((key, value)).view(2, 40, 16))
    with pytest.raises(UnsupportedKVLayout, match="gaps"):
        BlockLayout.learn(write, shape, 2, 16, 8, torch.float32, block_strides=(16, 33, 1))


def test_packed_keys_move_by_element():
    assert learn("vec", 32, 2, 64, torch.float32).run == 1


def test_refuses_padded_blocks():
    with pytest.raises(UnsupportedKVLayout, match="elements"):
        BlockLayout.learn(writer("vec"), (2, 32, 2 * 64 + 2), 2, 32, 64, torch.float32)


def test_refuses_an_update_that_loses_elements():
    def write(key, value, cache, slots):
        cache.view(-1)[: key.numel()] = key.reshape(-1)

    with pytest.raises(UnsupportedKVLayout, match="as they are"):
        BlockLayout.learn(write, (2, 32, 128), 2, 32, 64, torch.float32)


def test_refuses_an_update_that_quantises():
    def write(key, value, cache, slots):
        scaled = [(x / 3).transpose(0, 1).reshape(2, -1) for x in (key, value)]
        cache.view(2, -1).copy_(torch.cat(scaled, dim=1))

    with pytest.raises(UnsupportedKVLayout, match="as they are"):
        BlockLayout.learn(write, (2, 32, 128), 2, 32, 64, torch.float32)


def test_refuses_different_layers_and_foreign_chunks():
    layout = learn("vec", 32, 2, 64, torch.float32)
    with pytest.raises(UnsupportedKVLayout, match="hybrid"):
        KVMover([torch.zeros(3, 2, 32, 128), torch.zeros(3, 4, 32, 128)], layout)
    with pytest.raises(UnsupportedKVLayout, match="contiguous"):
        KVMover([torch.zeros(3, 2, 32, 256)[..., ::2]], layout)
    mover = KVMover([torch.zeros(3, 2, 32, 128)], layout)
    with pytest.raises(ValueError, match="needs"):
        mover.gather(torch.empty(2, 1, 5, 64), torch.arange(5))
    with pytest.raises(ValueError, match="needs"):
        mover.scatter(torch.empty(2, 1, 5, 128, dtype=torch.bfloat16), torch.arange(5))
