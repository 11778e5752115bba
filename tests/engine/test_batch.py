"""How a plan becomes flat arrays."""

from dataclasses import replace

from engine.batch import flatten, to_device
from engine.device import CpuDevice
from engine.lora.segments import Segment
from engine.plan import ScheduledChunk, StepPlan
from ipc.messages import AdapterId
from tests.engine.rig import make_sequence


def chunk(
    token_ids: list[int], start: int, block_table: list[int], adapter: int | None
) -> ScheduledChunk:
    adapter_id = None if adapter is None else AdapterId(adapter)
    sequence = make_sequence(token_ids, adapter_id=adapter_id)
    sequence.block_table = block_table
    return ScheduledChunk(sequence, start, len(token_ids) - start, samples=start > 0)


PLAN = StepPlan(
    (
        chunk([10, 11, 12, 13, 14], 3, [5, 2, 8], adapter=2),
        chunk([20, 21, 22], 0, [1, 4], adapter=None),
        chunk([30, 31, 32], 2, [7, 0], adapter=1),
        chunk([40, 41], 1, [3], adapter=2),
    )
)


def test_chunks_of_one_adapter_lie_side_by_side_behind_those_of_the_base() -> None:
    batch = flatten(PLAN, block_size=2)
    assert batch.token_ids.tolist() == [20, 21, 22, 32, 13, 14, 41]
    assert batch.positions.tolist() == [0, 1, 2, 2, 3, 4, 1]
    assert batch.segments == (Segment(AdapterId(1), 3, 4), Segment(AdapterId(2), 4, 7))


def test_every_token_has_the_slot_that_its_block_table_gives() -> None:
    batch = flatten(PLAN, block_size=2)
    assert batch.slot_mapping.tolist() == [2, 3, 8, 0, 5, 16, 7]
    assert batch.block_tables.tolist() == [[1, 4, 0], [7, 0, 0], [5, 2, 8], [3, 0, 0]]
    assert batch.context_lens.tolist() == [3, 3, 5, 2]


def test_sampling_rows_and_all_rows_can_be_put_into_the_order_of_the_plan() -> None:
    batch = flatten(PLAN, block_size=2)
    assert batch.token_ids[batch.sample_rows].tolist() == [14, 32, 41]
    assert batch.token_ids[batch.plan_rows].tolist() == [13, 14, 20, 21, 22, 32, 41]


def test_the_device_gets_the_same_arrays() -> None:
    batch = flatten(PLAN, block_size=2)
    tensors = to_device(batch, CpuDevice())
    assert tensors.token_ids.tolist() == batch.token_ids.tolist()
    assert tensors.pending_rows.tolist() == batch.pending_rows.tolist()
    assert tensors.pending_samples.tolist() == batch.pending_samples.tolist()
    assert tensors.positions.tolist() == batch.positions.tolist()
    assert tensors.slot_mapping.tolist() == batch.slot_mapping.tolist()
    assert tensors.block_tables.tolist() == batch.block_tables.tolist()
    assert tensors.context_lens.tolist() == batch.context_lens.tolist()
    assert tensors.sample_rows.tolist() == batch.sample_rows.tolist()


def test_a_pending_token_is_taken_from_what_the_step_before_draws() -> None:
    chunks = list(PLAN.chunks)
    for index, sample in ((2, 1), (3, 4)):
        sequence = chunks[index].sequence
        pending = make_sequence(sequence.token_ids[:-1], adapter_id=sequence.adapter_id)
        pending.block_table = sequence.block_table
        pending.num_pending_tokens = 1
        chunks[index] = replace(chunks[index], sequence=pending, pending_from=sample)
    batch = flatten(StepPlan(tuple(chunks)), block_size=2)
    assert batch.token_ids.tolist() == [20, 21, 22, 0, 13, 14, 0]
    assert batch.pending_rows.tolist() == [3, 6]
    assert batch.pending_samples.tolist() == [1, 4]
    assert batch.positions.tolist() == flatten(PLAN, block_size=2).positions.tolist()
