"""Sums ``[1, 1]`` of the words of A's and B's tiles, loaded as by the kernels that compute."""

import triton
import triton.language as tl


@triton.jit
def sum_of_row_tile(
    a_ptr,
    first_rank,
    num_ranks,
    split,
    IN_WORDS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    ranks = first_rank + tl.arange(0, TILE_RANKS)
    inputs = split * (NUM_CHUNKS * TILE_WORDS) + tl.arange(0, TILE_WORDS)
    IS_RAGGED: tl.constexpr = IN_WORDS != NUM_SPLITS * NUM_CHUNKS * TILE_WORDS
    words = _load_inputs(a_ptr, ranks, num_ranks, inputs, IN_WORDS, IS_RAGGED)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    for _ in range(1, NUM_CHUNKS):
        inputs += TILE_WORDS
        words += _load_inputs(a_ptr, ranks, num_ranks, inputs, IN_WORDS, IS_RAGGED)
    return tl.sum(words, keep_dims=True)


@triton.jit
def sum_of_rows_tile(
    a_ptr,
    num_ranks,
    split,
    num_splits,
    IN_WORDS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    NUM_STEPS: tl.constexpr = (IN_WORDS + TILE_WORDS - 1) // TILE_WORDS
    IS_RAGGED: tl.constexpr = IN_WORDS % TILE_WORDS != 0
    ranks = tl.arange(0, TILE_RANKS)
    split_steps = tl.cdiv(NUM_STEPS, num_splits)
    first_step = split * split_steps
    last_step = tl.minimum(first_step + split_steps, NUM_STEPS)
    inputs = first_step * TILE_WORDS + tl.arange(0, TILE_WORDS)
    words = _load_inputs(a_ptr, ranks, num_ranks, inputs, IN_WORDS, IS_RAGGED)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    for step in tl.range(first_step + 1, last_step, num_stages=NUM_STAGES):
        inputs = step * TILE_WORDS + tl.arange(0, TILE_WORDS)
        words += _load_inputs(a_ptr, ranks, num_ranks, inputs, IN_WORDS, IS_RAGGED)
    return tl.sum(words, keep_dims=True)


@triton.jit
def _load_inputs(a_ptr, ranks, num_ranks, inputs, IN_WORDS: tl.constexpr, IS_RAGGED: tl.constexpr):
    """``[ranks, inputs]`` of A, zeros outside of it."""
    mask = (ranks < num_ranks)[:, None]
    if IS_RAGGED:
        mask = mask & (inputs < IN_WORDS)[None, :]
    return tl.load(a_ptr + ranks[:, None] * IN_WORDS + inputs[None, :], mask=mask, other=0)


@triton.jit
def sum_of_b_tile(
    b_ptr,
    first_column,
    width,
    num_ranks,
    PER_WORD: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    columns = first_column + tl.arange(0, TILE_COLUMNS)
    ranks = tl.arange(0, TILE_RANKS // PER_WORD)
    rank_words = tl.multiple_of(num_ranks // PER_WORD, 8 // PER_WORD)
    words = tl.load(
        b_ptr + columns[:, None] * rank_words + ranks[None, :],
        mask=(columns < width)[:, None] & (ranks < rank_words)[None, :],
        other=0,
    )
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    return tl.sum(words, keep_dims=True)
