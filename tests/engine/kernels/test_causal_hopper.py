"""The causal attention made for Hopper against plain torch."""

import math

import pytest
import torch
from torch import Tensor

from engine.kernels.causal_choice import choose_causal
from engine.kernels.causal_hopper import CausalTuning, causal_hopper, has_causal_hopper
from engine.kernels.causal_varlen import causal_varlen
from engine.kernels.packed_sequences import PackedSequences
from tests.engine.kernels.dtypes import assert_near

# Small ones, so that several of them stand in the sequences here.
TUNINGS = (CausalTuning(64, 32), CausalTuning(64, 64, num_stages=1), CausalTuning(128, 64, 8))

# (queries, keys) of each sequence.
BATCHES = {
    "one token": [(1, 1)],
    "whole tiles": [(64, 64), (128, 128)],
    "odd lengths": [(7, 7), (65, 65), (1, 1), (130, 130), (63, 63)],
    "later chunks": [(40, 71), (1, 200), (64, 129), (65, 65), (3, 64)],
    "an empty sequence": [(5, 5), (0, 0), (70, 90), (0, 0)],
}


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    dtype: torch.dtype = request.param
    if device.type == "cuda" and not has_causal_hopper(device, dtype, 128):
        pytest.skip("no GPU of compute capability 9.0")
    if device.type == "cpu" and dtype is torch.bfloat16:
        pytest.skip("the interpreter rounds bf16 down instead of to the nearest")
    return dtype


class Packed:
    """Random heads of sequences, with rows as far apart as a model's projections leave them."""

    def __init__(
        self,
        chunks: list[tuple[int, int]],
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_heads, num_kv_heads, head_dim = heads
        counts = torch.tensor([(0, 0), *chunks], dtype=torch.int32)
        starts = counts.cumsum(0, dtype=torch.int32).T.contiguous().to(device)
        query_starts, key_starts = starts.unbind(0)
        max_queries, max_keys = counts.amax(0).tolist()
        self.sequences = PackedSequences(query_starts, key_starts, max_queries, max_keys)
        widths = (num_heads, num_kv_heads, num_kv_heads)
        num_queries, num_keys = counts.sum(0).tolist()
        rows = torch.randn(max(num_queries, num_keys), sum(widths), head_dim).to(device, dtype)
        query, self.key, self.value = rows.split_with_sizes(widths, dim=1)
        self.query = query[:num_queries]
        self.key, self.value = self.key[:num_keys], self.value[:num_keys]

    def attend(self, tuning: CausalTuning) -> Tensor:
        return causal_hopper(self.query, self.key, self.value, self.sequences, tuning)

    def expected(self) -> Tensor:
        """In fp32, sequence by sequence."""
        out = torch.empty_like(self.query, dtype=torch.float32)
        group = self.query.shape[1] // self.key.shape[1]
        query_starts = self.sequences.query_starts.tolist()
        key_starts = self.sequences.key_starts.tolist()
        for sequence in range(len(query_starts) - 1):
            rows = slice(*query_starts[sequence : sequence + 2])
            keys = slice(*key_starts[sequence : sequence + 2])
            query = self.query[rows].float()
            key = self.key[keys].float().repeat_interleave(group, 1)
            value = self.value[keys].float().repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[2])
            unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=out.device)
            unseen = unseen.triu(len(key) - len(query) + 1)
            weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, value)
        return out


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("heads", [(4, 2, 64), (2, 2, 128)], ids=str)
def test_each_query_attends_to_the_keys_up_to_its_own(
    heads: tuple[int, int, int],
    chunks: list[tuple[int, int]],
    tuning: CausalTuning,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    packed = Packed(chunks, heads, dtype, device)
    got = packed.attend(tuning)
    assert got.is_contiguous() and got.dtype == dtype
    assert_near(got, packed.expected(), num_roundings=4)


def test_the_heads_of_an_8b_model_share_their_keys_four_by_four(
    dtype: torch.dtype, device: torch.device
) -> None:
    packed = Packed([(9, 9), (20, 70)], (32, 8, 128), dtype, device)
    assert_near(packed.attend(CausalTuning()), packed.expected(), num_roundings=4)


def test_scores_that_would_overflow_an_exponential_do_not(
    dtype: torch.dtype, device: torch.device
) -> None:
    packed = Packed([(100, 100)], (1, 1, 64), dtype, device)
    packed.query.mul_(30)
    packed.key.mul_(30)
    assert_near(packed.attend(CausalTuning()), packed.expected(), num_roundings=4)


# The interpreter's numpy warns of the sequence without numbers.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("length", [3, 64, 100])
def test_what_is_no_number_stays_in_its_own_sequence(
    length: int, dtype: torch.dtype, device: torch.device
) -> None:
    chunks = [(length, length + 5), (length, length), (length, length + 70)]
    packed = Packed(chunks, (2, 1, 64), dtype, device)
    sound = packed.attend(CausalTuning())
    packed.query[length : 2 * length] = torch.nan
    first, last = packed.sequences.key_starts[1:3].tolist()
    packed.key[first:last] = torch.nan
    packed.value[first:last] = torch.nan
    got = packed.attend(CausalTuning())
    assert got[length : 2 * length].isnan().all()
    others = [*range(length), *range(2 * length, 3 * length)]
    assert torch.equal(got[others], sound[others])


def test_a_later_token_that_is_no_number_does_not_reach_earlier_tiles(
    dtype: torch.dtype, device: torch.device
) -> None:
    packed = Packed([(128, 128)], (1, 1, 64), dtype, device)
    packed.value[64:] = torch.nan
    assert packed.attend(CausalTuning(64, 64))[:64].isfinite().all()


def test_no_queries_at_all_are_an_empty_result(dtype: torch.dtype, device: torch.device) -> None:
    packed = Packed([(0, 0)], (2, 1, 64), dtype, device)
    assert packed.attend(CausalTuning()).shape == (0, 2, 64)


def test_other_devices_keep_the_kernel_of_torch() -> None:
    chosen = choose_causal(torch.device("cpu"), torch.bfloat16, 32, 8, 128)
    assert chosen is causal_varlen


@pytest.mark.gpu
def test_heads_that_the_kernel_does_not_have_keep_the_kernel_of_torch() -> None:
    device = torch.device("cuda")
    assert choose_causal(device, torch.bfloat16, 32, 8, 96) is causal_varlen
    assert choose_causal(device, torch.float32, 32, 8, 128) is causal_varlen
