import random

import pytest

from engine.block_manager import BlockManager
from engine.sequence import Sequence
from ipc.errors import Internal
from ipc.messages import AdapterId
from tests.engine.builders import make_sequence

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


def _compute(blocks: BlockManager, sequence: Sequence) -> None:
    start, end = sequence.num_computed_tokens, len(sequence.token_ids)
    sequence.num_computed_tokens = end
    blocks.publish(sequence, start, end)


def _run_through(blocks: BlockManager, sequence: Sequence) -> int:
    """Admits, computes and releases; returns how many tokens came from the cache."""
    assert blocks.admit(sequence, num_spare=0)
    num_cached = sequence.num_computed_tokens
    _compute(blocks, sequence)
    blocks.release(sequence)
    return num_cached


def test_a_prefix_is_found_only_after_it_was_computed() -> None:
    blocks = BlockManager(16, 4, enable_prefix_caching=True)
    first, second, third = (make_sequence(i, PROMPT) for i in range(3))
    assert blocks.admit(first, num_spare=0)
    assert blocks.admit(second, num_spare=0)
    assert second.num_computed_tokens == 0
    _compute(blocks, first)
    assert blocks.admit(third, num_spare=0)
    assert third.num_computed_tokens == 8
    assert third.block_table[:2] == first.block_table[:2]
    assert third.block_table[2] != first.block_table[2]


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_is_always_left_to_compute(num_tokens: int, num_cached: int) -> None:
    blocks = BlockManager(16, 4, enable_prefix_caching=True)
    assert _run_through(blocks, make_sequence(0, PROMPT[:num_tokens])) == 0
    assert _run_through(blocks, make_sequence(1, PROMPT[:num_tokens])) == num_cached
    blocks.assert_idle()


def test_a_prefix_of_another_adapter_or_of_the_base_is_never_found() -> None:
    blocks = BlockManager(16, 4, enable_prefix_caching=True)
    for sequence_id, adapter_id in enumerate((None, 1, 2)):
        assert _run_through(blocks, make_sequence(sequence_id, PROMPT, adapter_id)) == 0
    for sequence_id, adapter_id in enumerate((None, 1, 2)):
        assert _run_through(blocks, make_sequence(sequence_id, PROMPT, adapter_id)) == 8


def test_equal_tokens_behind_another_beginning_are_not_found() -> None:
    blocks = BlockManager(16, 4, enable_prefix_caching=True)
    _run_through(blocks, make_sequence(0, [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert _run_through(blocks, make_sequence(1, [9, 2, 3, 4, 5, 6, 7, 8, 9])) == 0
    assert _run_through(blocks, make_sequence(2, [5, 6, 7, 8, 9])) == 0


def test_a_forgotten_adapters_prefixes_are_not_found_and_others_are() -> None:
    blocks = BlockManager(16, 4, enable_prefix_caching=True)
    for adapter_id in (1, 2):
        _run_through(blocks, make_sequence(adapter_id, PROMPT, adapter_id))
    held = make_sequence(3, PROMPT, 1)
    assert blocks.admit(held, num_spare=0)
    blocks.forget_adapter(AdapterId(1))
    blocks.assert_consistent()
    blocks.release(held)
    assert _run_through(blocks, make_sequence(4, PROMPT, 1)) == 0
    assert _run_through(blocks, make_sequence(5, PROMPT, 2)) == 8
    blocks.assert_idle()


def test_the_least_recently_used_prefix_is_evicted_first_and_its_head_last() -> None:
    blocks = BlockManager(6, 4, enable_prefix_caching=True)
    _run_through(blocks, make_sequence(0, [1] * 9))
    _run_through(blocks, make_sequence(1, [2] * 9))
    # Two blocks are blank, four cached: three are needed, so one is evicted.
    _run_through(blocks, make_sequence(2, [3] * 9))
    assert _run_through(blocks, make_sequence(3, [2] * 9)) == 8
    assert _run_through(blocks, make_sequence(4, [1] * 9)) == 4


def test_nothing_is_found_when_prefix_caching_is_off() -> None:
    blocks = BlockManager(16, 4, enable_prefix_caching=False)
    assert _run_through(blocks, make_sequence(0, PROMPT)) == 0
    assert _run_through(blocks, make_sequence(1, PROMPT)) == 0


def test_a_sequence_that_finds_too_few_blocks_changes_nothing() -> None:
    blocks = BlockManager(4, 4, enable_prefix_caching=True)
    _run_through(blocks, make_sequence(0, PROMPT))
    large = make_sequence(1, PROMPT + [10] * 8)
    assert not blocks.admit(large, num_spare=0)
    assert not blocks.admit(make_sequence(2, PROMPT), num_spare=2)
    assert large.block_table == [] and large.num_computed_tokens == 0
    assert blocks.num_free == 4
    blocks.assert_idle()


def test_a_block_that_is_still_held_is_reported_as_a_leak() -> None:
    blocks = BlockManager(4, 4, enable_prefix_caching=True)
    assert blocks.admit(make_sequence(0, PROMPT), num_spare=0)
    with pytest.raises(Internal, match=r"KV blocks \[0, 1, 2\] are held"):
        blocks.assert_idle()


def test_no_block_is_lost_or_shared_by_writers_under_random_use(rng: random.Random) -> None:
    blocks = BlockManager(24, 4, enable_prefix_caching=True)
    running: list[Sequence] = []
    for sequence_id in range(2000):
        action = rng.random()
        if action < 0.5:
            prompt = [7] * rng.choice((0, 4, 8)) + [rng.randrange(2) for _ in range(9)]
            sequence = make_sequence(sequence_id, prompt, rng.choice((None, 1, 2)))
            if blocks.admit(sequence, num_spare=0):
                running.append(sequence)
        elif action < 0.7 and running:
            _compute(blocks, rng.choice(running))
        elif action < 0.9 and running:
            blocks.release(running.pop(rng.randrange(len(running))))
        elif running:
            sequence = rng.choice(running)
            _compute(blocks, sequence)
            sequence.token_ids.append(rng.randrange(2))
            blocks.extend(sequence)
        blocks.forget_adapter(AdapterId(rng.randrange(1, 40)))
        blocks.assert_consistent()
        held = {block for sequence in running for block in sequence.block_table}
        assert blocks.num_used == len(held)
    for sequence in running:
        blocks.release(sequence)
    blocks.assert_idle()
