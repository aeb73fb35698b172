import torch

from qzoom.engine.cache import GROWTH, KVCache


def piece(length: int, seed: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, length, 4, generator=generator), torch.randn(batch, 2, length, 4, generator=generator)


def filled(*lengths: int, layers: int = 2, seed: int = 0) -> tuple[KVCache, list[tuple[torch.Tensor, torch.Tensor]]]:
    cache, expected = KVCache(), []
    for layer in range(layers):
        parts = [piece(n, seed + 10 * layer + i) for i, n in enumerate(lengths)]
        for key, value in parts:
            cache.update(key, value, layer)
        expected.append((torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)))
    return cache, expected


def test_updates_append_and_merged_holds_both_stacks():
    cache, expected = filled(3, 1, 5)
    assert len(cache) == 9
    for layer, (keys, values) in enumerate(expected):
        assert layer in cache
        assert torch.equal(cache.layer(layer)[0], keys)
        assert torch.equal(cache.layer(layer)[1], values)
    assert 2 not in cache
    assert len(KVCache()) == 0
    lower, low = filled(3)
    upper = KVCache()
    upper.update(*piece(3, 77), 5)
    both = lower.merged(upper)
    assert torch.equal(both.layer(1)[0], low[1][0])
    assert torch.equal(both.layer(5)[0], piece(3, 77)[0])
    assert 5 not in lower


def test_forks_and_truncations_leave_each_other_alone():
    cache, expected = filled(6)
    one, two, short = cache.fork(), cache.fork(), cache.truncated(4)
    for other, seed in ((one, 100), (two, 200), (short, 300)):
        for layer in range(2):
            other.update(*piece(2, seed + layer), layer)
    assert [len(c) for c in (cache, one, two, short)] == [6, 8, 8, 6]
    for layer, (keys, _) in enumerate(expected):
        assert torch.equal(cache.layer(layer)[0], keys)
        for other, seed in ((one, 100), (two, 200)):
            assert torch.equal(other.layer(layer)[0], torch.cat([keys, piece(2, seed + layer)[0]], 2))
        assert torch.equal(short.layer(layer)[0], torch.cat([keys[:, :, :4], piece(2, 300 + layer)[0]], 2))


def test_reserved_room_is_used_in_place_and_grows():
    cache, expected = filled(5)
    own = cache.reserve(3)
    start = own.layer(0)[0].data_ptr()
    parts = [piece(1, 500 + i) for i in range(GROWTH + 20)]
    for i, (key, value) in enumerate(parts):
        keys, _ = own.update(key, value, 0)
        assert keys.shape[2] == 6 + i
        assert (keys.data_ptr() == start) == (i < 3)
    assert torch.equal(own.layer(0)[0], torch.cat([expected[0][0], *(k for k, _ in parts)], 2))
    assert torch.equal(own.layer(0)[1], torch.cat([expected[0][1], *(v for _, v in parts)], 2))
    assert torch.equal(cache.layer(0)[0], expected[0][0])


def test_a_batch_pads_on_the_left_and_gives_rows_back():
    made = [filled(n, seed=50 * n) for n in (4, 7, 2)]
    lengths = [4, 7, 2]
    batch = KVCache.stack([cache for cache, _ in made], lengths, extra=2)
    for layer in range(2):
        keys, _ = batch.layer(layer)
        assert keys.shape == (3, 2, 7, 4)
        for row, (n, (_, expected)) in enumerate(zip(lengths, made, strict=True)):
            assert torch.equal(keys[row, :, 7 - n :], expected[layer][0][0])
            assert not keys[row, :, : 7 - n].any()
    new = [piece(1, 900 + layer, batch=3) for layer in range(2)]
    for layer, (key, value) in enumerate(new):
        batch.update(key, value, layer)
    fewer = batch.select([0, 2], drop=3)
    assert fewer.layer(0)[0].shape == (2, 2, 5, 4)
    row = fewer.row(1, [slice(5 - 3, 5)])
    assert torch.equal(row.layer(1)[0][0], torch.cat([made[2][1][1][0][0], new[1][0][2]], 1))
    pieces = batch.row(0, [slice(3, 5), slice(7, 8)])
    assert torch.equal(pieces.layer(0)[1][0], torch.cat([made[0][1][0][1][0][:, :2], new[0][1][0]], 1))


def test_a_batch_of_empty_caches_is_empty():
    assert len(KVCache.stack([KVCache(), KVCache()], [0, 0])) == 0
    cache, expected = filled(3)
    mixed = KVCache.stack([KVCache(), cache], [0, 3])
    assert torch.equal(mixed.layer(0)[0][1], expected[0][0][0])
    assert not mixed.layer(0)[0][0].any()
