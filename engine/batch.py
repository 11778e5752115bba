"""A step's inputs: its chunks laid end to end, on the host and then on the device."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from engine.device import Device
from engine.lora.segments import Segment, find_segments, order_by_adapter
from engine.plan import StepPlan

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The chunks of a plan, those of one adapter side by side; not in the plan's order.

    | array             | shape                  | holds                                       |
    |-------------------|------------------------|---------------------------------------------|
    | `token_ids`       | `[num_tokens]`         | 0 in place of a pending one                 |
    | `pending_rows`    | `[num_pending]`        | where those stand                           |
    | `pending_samples` | `[num_pending]`        | their indices in what the step before draws |
    | `positions`       | `[num_tokens]`         | in each token's own sequence                |
    | `slot_mapping`    | `[num_tokens]`         | where its key and value go                  |
    | `block_tables`    | `[num_chunks, longest]`| each chunk's context, then zeros            |
    | `context_lens`    | `[num_chunks]`         | tokens up to the chunk's end                |
    | `first_rows`      | `[num_chunks]`         |                                             |
    | `row_counts`      | `[num_chunks]`         |                                             |
    | `sample_rows`     | `[num_samples]`        | rows to sample from, in the plan's order    |
    | `plan_rows`       | `[num_tokens]`         | all rows, in the plan's order               |
    """

    token_ids: IntArray
    pending_rows: IntArray
    pending_samples: IntArray
    positions: IntArray
    slot_mapping: IntArray
    block_tables: IntArray
    context_lens: IntArray
    first_rows: IntArray
    row_counts: IntArray
    sample_rows: IntArray
    plan_rows: IntArray
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """The arrays of a ``FlatBatch`` of the same names, int64 on the device."""

    token_ids: Tensor
    pending_rows: Tensor
    pending_samples: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor
    sample_rows: Tensor


def flatten(plan: StepPlan, block_size: int) -> FlatBatch:
    """The inputs of the one launch of ``plan``'s chunks, of which there is at least one."""
    order = order_by_adapter([chunk.sequence.adapter_id for chunk in plan.chunks])
    chunks = [plan.chunks[index] for index in order]
    num_chunks = len(chunks)

    counts = [chunk.num_tokens for chunk in chunks]
    row_counts = np.array(counts, dtype=np.int64)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    context_lens = starts + row_counts
    first_rows = np.cumsum(row_counts) - row_counts
    num_tokens = int(row_counts.sum())

    token_ids: list[int] = []
    pending: list[tuple[int, int]] = []
    num_blocks = -(-context_lens // block_size)
    block_tables = np.zeros((num_chunks, int(num_blocks.max())), dtype=np.int64)
    for index, (chunk, covered) in enumerate(zip(chunks, num_blocks.tolist(), strict=True)):
        sequence = chunk.sequence
        assert len(sequence.block_table) >= covered, sequence.sequence_id
        if chunk.pending_from is None:
            token_ids += sequence.token_ids[chunk.start : chunk.start + chunk.num_tokens]
        else:
            token_ids.append(0)
            pending.append((index, chunk.pending_from))
        block_tables[index, :covered] = sequence.block_table[:covered]
    assert len(token_ids) == num_tokens, "a chunk reaches past its sequence's end"

    chunk_of_row = np.repeat(np.arange(num_chunks), row_counts)
    positions = np.arange(num_tokens) + (starts - first_rows)[chunk_of_row]
    blocks = block_tables[chunk_of_row, positions // block_size]
    slot_mapping = blocks * block_size + positions % block_size

    pending_chunks, pending_samples = np.array(pending, dtype=np.int64).reshape(-1, 2).T
    place = np.empty(num_chunks, dtype=np.int64)
    place[order] = np.arange(num_chunks)
    samples = np.array([chunk.samples for chunk in plan.chunks], dtype=bool)
    sampling = place[samples]
    return FlatBatch(
        token_ids=np.array(token_ids, dtype=np.int64),
        pending_rows=first_rows[pending_chunks],
        pending_samples=pending_samples,
        positions=positions,
        slot_mapping=slot_mapping,
        block_tables=block_tables,
        context_lens=context_lens,
        first_rows=first_rows,
        row_counts=row_counts,
        sample_rows=first_rows[sampling] + row_counts[sampling] - 1,
        plan_rows=np.argsort(np.array(order)[chunk_of_row], kind="stable"),
        segments=find_segments([chunk.sequence.adapter_id for chunk in chunks], counts),
    )


def to_device(batch: FlatBatch, device: Device) -> DeviceBatch:
    """All arrays that the device needs, in one copy."""
    arrays = (
        batch.token_ids,
        batch.pending_rows,
        batch.pending_samples,
        batch.positions,
        batch.slot_mapping,
        batch.context_lens,
        batch.sample_rows,
        batch.block_tables.reshape(-1),
    )
    packed = device.upload(np.concatenate(arrays))
    *parts, tables = packed.split_with_sizes([array.size for array in arrays])
    token_ids, pending_rows, pending_samples, positions, slots, context_lens, sample_rows = parts
    return DeviceBatch(
        token_ids=token_ids,
        pending_rows=pending_rows,
        pending_samples=pending_samples,
        positions=positions,
        slot_mapping=slots,
        block_tables=tables.view(batch.block_tables.shape),
        context_lens=context_lens,
        sample_rows=sample_rows,
    )
