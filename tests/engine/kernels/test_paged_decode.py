"""Paged decode attention against SDPA in fp32."""

import pytest
import torch

from engine.kernels.decode_workspace import DecodeTuning, DecodeWorkspace
from engine.kernels.paged_decode import paged_decode
from tests.engine.kernels.dtypes import DTYPES, assert_near
from tests.engine.kernels.paged_cache import BLOCK_SIZE, SMALL, make_cache, make_workspace, run


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "tuning"),
    [
        (16, 4, 16, SMALL),
        (2, 1, 64, SMALL),
        (4, 4, 32, SMALL),
        (14, 2, 24, SMALL),
        # More at first than a split has; a split that has more than that and no multiple of it.
        (4, 2, 16, DecodeTuning(tile_tokens=16, min_split_tokens=32)),
        (4, 2, 16, DecodeTuning(tile_tokens=16, min_split_tokens=80)),
    ],
)
def test_every_length_around_the_edges_of_blocks_and_splits(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    tuning: DecodeTuning,
    device: torch.device,
) -> None:
    # The last token is not in the cache: 33 are a whole split and one.
    for lengths in ([1, 2, 16, 17, 18], [32, 33, 34, 255], [0, 256, 0, 257, 258]):
        cache = make_cache(lengths, num_kv_heads, head_dim, dtype, device)
        query = torch.randn(len(lengths), num_heads, head_dim, device=device).to(dtype)
        got = run(query, cache, make_workspace(num_heads, cache, tuning))
        assert_near(got, cache.attend(query), num_roundings=4)


def test_a_row_without_context_gets_zeros(device: torch.device) -> None:
    cache = make_cache([0, 5, 0], 1, 16, torch.float32, device)
    query = torch.full((3, 2, 16), torch.nan, device=device)
    query[1] = 1.0
    got = run(query, cache, make_workspace(2, cache))
    assert not got[0].any()
    assert not got[2].any()
    assert got[1].isfinite().all()


def test_a_value_that_is_not_a_number_stays_with_its_own_sequence(device: torch.device) -> None:
    cache = make_cache([40, 40], 2, 16, torch.float32, device)
    query = torch.randn(2, 4, 16, device=device)
    expected = cache.attend(query)
    cache.values[cache.block_tables[1, 1], 3, 0, 5] = torch.nan
    got = run(query, cache, make_workspace(4, cache))
    assert_near(got[0], expected[0])
    assert got[1, :2, 5].isnan().all()
    assert_near(got[1, 2:], expected[1, 2:])


def test_a_context_beyond_the_expected_one_is_computed_whole(device: torch.device) -> None:
    cache = make_cache([200, 3, 77], 1, 16, torch.float32, device)
    query = torch.randn(3, 4, 16, device=device)
    workspace = make_workspace(4, cache)
    for max_context in (1, 64, 100_000):
        assert_near(run(query, cache, workspace, max_context), cache.attend(query))


def test_rows_say_where_queries_and_results_stand_and_others_are_kept(
    device: torch.device,
) -> None:
    cache = make_cache([50, 3], 1, 16, torch.float32, device)
    qkv = torch.randn(5, 6, 16, device=device)
    query, key, value = qkv.split_with_sizes((4, 1, 1), dim=1)
    cache.key, cache.value = key[[4, 1]], value[[4, 1]]
    out = torch.full((5, 4, 16), 7.0, device=device)
    paged_decode(
        out,
        query,
        key,
        value,
        cache.keys,
        cache.values,
        cache.block_tables[:, :-1].int(),
        cache.context_lens.int(),
        50,
        make_workspace(4, cache),
        rows=torch.tensor([4, 1], device=device),
    )
    assert_near(out[[4, 1]], cache.attend(query[[4, 1]]))
    assert (out[[0, 2, 3]] == 7.0).all()


def test_small_batches_are_split_until_they_fill_the_gpu() -> None:
    workspace = DecodeWorkspace(32, 8, 128, 132, torch.device("cpu"), overlaps=False)
    for num_rows in (1, 2, 7, 32, 66, 100):
        num_splits = workspace.num_splits(num_rows, max_context=100_000)
        num_programs = num_rows * 8 * num_splits
        room = workspace.tuning.programs_per_processor * 132
        assert num_splits == 1 or num_programs <= room < num_programs + num_rows * 8
    assert workspace.num_splits(1, max_context=129) == 2
    assert workspace.num_splits(1000, max_context=100_000) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 8), (8, 8), (28, 4)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_contexts_of_large_batches(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> None:
    for lengths in ([9000], [1, 127, 128, 129, 0, 2048, 4097], list(range(0, 2600, 97))):
        cache = make_cache(lengths, num_kv_heads, head_dim, dtype, device)
        workspace = make_workspace(num_heads, cache, None, 132)
        query = torch.randn(len(lengths), num_heads, head_dim, device=device).to(dtype)
        expected = cache.attend(query)
        for _ in range(3):
            assert_near(run(query, cache, workspace), expected, num_roundings=4)


@pytest.mark.gpu
def test_a_cache_of_more_values_than_32_bits_count(device: torch.device) -> None:
    first_block = 2**31 // (BLOCK_SIZE * 8 * 128)
    cache = make_cache([100, 33], 8, 128, torch.bfloat16, device, first_block)
    query = torch.randn(2, 32, 128, device=device).bfloat16()
    got = run(query, cache, make_workspace(32, cache, None, 132))
    assert_near(got, cache.attend(query), num_roundings=4)


@pytest.mark.gpu
def test_a_captured_launch_replays_for_other_contexts(device: torch.device) -> None:
    lengths = [700, 0, 16, 1500]
    cache = make_cache(lengths, 8, 128, torch.bfloat16, device)
    workspace = make_workspace(32, cache, None, 132)
    query = torch.randn(4, 32, 128, device=device).bfloat16()
    run(query, cache, workspace, 4096)
    out = torch.empty_like(query)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_decode(
            out,
            query,
            cache.key,
            cache.value,
            cache.keys,
            cache.values,
            cache.block_tables,
            cache.context_lens,
            4096,
            workspace,
        )
    for contexts in (lengths, [1, 0, 15, 128], [0, 0, 0, 0], [699, 0, 1, 1129]):
        cache.context_lens.copy_(torch.tensor(contexts))
        query.normal_()
        out.fill_(torch.nan)
        graph.replay()
        assert_near(out, cache.attend(query), num_roundings=4)
    assert not workspace.arrivals.any()
