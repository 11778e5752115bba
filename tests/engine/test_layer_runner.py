"""A prefill in groups of layers is the prefill that it would have been at once."""

import math
from pathlib import Path

import pytest
import torch

from engine.config import DeviceKind
from engine.plan import LayerGroup, ScheduledChunk, StepPlan
from engine.sequence import Sequence
from tests.engine.layer_rig import NUM_LAYERS, VOCAB_SIZE, LayerRig, splits

SPLITS = tuple(splits(NUM_LAYERS))
ALL_LAYERS = range(NUM_LAYERS)


@pytest.fixture(params=[DeviceKind.CPU, pytest.param(DeviceKind.CUDA, marks=pytest.mark.gpu)])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> LayerRig:
    return LayerRig(tmp_path, request.param)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(7 * i + 11 * seed + i * i) % VOCAB_SIZE for i in range(length)]


def chunk_of(
    sequence: Sequence, start: int, num_tokens: int, pending_from: int | None = None
) -> ScheduledChunk:
    samples = start + num_tokens == sequence.num_tokens
    return ScheduledChunk(sequence, start, num_tokens, samples, pending_from)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_every_split_gives_the_same_token_and_the_same_keys_and_values(
    length: int, rig: LayerRig
) -> None:
    assert len(SPLITS) == 8
    adapter_id = rig.install(1)
    rig.place(adapter_id)
    whole = rig.sequence(prompt(length), adapter_id)
    expected = rig.run_whole(chunk_of(whole, 0, length))
    stored = rig.stored(whole, length)
    assert not stored.isnan().any()
    for groups in SPLITS:
        rig.take_away(adapter_id)
        split = rig.sequence(prompt(length), adapter_id)
        assert rig.run_groups(chunk_of(split, 0, length), groups) == expected, groups
        assert torch.equal(rig.stored(split, length), stored), groups


def test_an_embedding_is_there_with_the_first_layer_and_a_head_with_the_last(
    rig: LayerRig,
) -> None:
    plain, adapter_id = rig.install(1), rig.install(1001, has_vocab=True)
    rig.place(adapter_id)
    whole = rig.sequence(prompt(9), adapter_id)
    expected = rig.run_whole(chunk_of(whole, 0, 9))
    stored = rig.stored(whole, 9)
    for groups in SPLITS:
        rig.take_away(adapter_id)
        split = rig.sequence(prompt(9), adapter_id)
        assert rig.run_groups(chunk_of(split, 0, 9), groups) == expected, groups
        assert torch.equal(rig.stored(split, 9), stored), groups
    rig.place(plain)
    assert rig.run_whole(chunk_of(rig.sequence(prompt(9), plain), 0, 9)) != expected


def test_the_adapter_is_applied(rig: LayerRig) -> None:
    adapter_id = rig.install(1)
    adapted, plain = (rig.sequence(prompt(9), each) for each in (adapter_id, None))
    drawn = rig.run_groups(chunk_of(adapted, 0, 9), SPLITS[-1])
    assert drawn != rig.run_whole(chunk_of(plain, 0, 9))


def test_layers_that_are_not_there_would_show(rig: LayerRig) -> None:
    adapter_id = rig.install(1)
    rig.place(adapter_id, range(NUM_LAYERS - 1))
    sequence = rig.sequence(prompt(9), adapter_id)
    group = LayerGroup(chunk_of(sequence, 0, 9), ALL_LAYERS, NUM_LAYERS)
    (token,) = rig.runner.launch(StepPlan((), group)).wait()
    assert token.logprobs is not None and math.isnan(token.logprobs.logprob)


def test_a_chunk_in_groups_is_followed_by_ordinary_ones(rig: LayerRig) -> None:
    adapter_id = rig.install(1)
    split = rig.sequence(prompt(20), adapter_id)
    assert rig.run_groups(chunk_of(split, 0, 12), SPLITS[-1]) == []
    drawn = rig.run_whole(chunk_of(split, 12, 8))
    whole = rig.sequence(prompt(20), adapter_id)
    rig.run_whole(chunk_of(whole, 0, 12))
    assert rig.run_whole(chunk_of(whole, 12, 8)) == drawn


def test_a_chunk_in_groups_may_begin_behind_a_cached_prefix(rig: LayerRig) -> None:
    adapter_id = rig.install(1)
    rig.place(adapter_id)
    whole = rig.sequence(prompt(20), adapter_id)
    rig.run_whole(chunk_of(whole, 0, 12))
    expected = rig.run_whole(chunk_of(whole, 12, 8))
    rig.take_away(adapter_id)
    split = rig.sequence(prompt(20), adapter_id)
    split.block_table[:3] = whole.block_table[:3]
    assert rig.run_groups(chunk_of(split, 12, 8), SPLITS[-1]) == expected


def test_steps_beside_the_groups_and_the_step_behind_them_draw_what_they_would(
    rig: LayerRig,
) -> None:
    ready, arriving = rig.install(1), rig.install(2)
    rig.place(ready)
    others = [rig.sequence(prompt(5, seed), each) for seed, each in ((1, None), (2, ready))]
    alone = [rig.sequence(prompt(5, seed), each) for seed, each in ((1, None), (2, ready))]
    job, job_alone = (rig.sequence(prompt(9), arriving) for _ in range(2))
    chunk = chunk_of(job, 0, 9)

    def launch_all(layers: range | None, sequences: list[Sequence]) -> list[int]:
        chunks = tuple(
            chunk_of(each, each.num_computed_tokens, each.num_uncomputed_tokens)
            for each in sequences
        )
        group = None if layers is None else LayerGroup(chunk, layers, NUM_LAYERS)
        plan = StepPlan(chunks, group)
        sampled = rig.runner.launch(plan).wait()
        for completed, token in zip(plan.completed_chunks, sampled, strict=True):
            completed.sequence.num_computed_tokens = completed.start + completed.num_tokens
            completed.sequence.token_ids.append(token.token_id)
        return [token.token_id for token in sampled]

    for layers in SPLITS[-1]:
        rig.place(arriving, layers)
        launch_all(layers, others)
    launch_all(None, [*others, job])
    for sequence in (*alone, job_alone):
        for _ in range(len(SPLITS[-1]) + 1 if sequence is not job_alone else 2):
            launch_all(None, [sequence])
    assert [each.token_ids for each in (*others, job)] == [
        each.token_ids for each in (*alone, job_alone)
    ]


def test_the_token_that_ends_the_groups_feeds_the_next_step_on_the_device(rig: LayerRig) -> None:
    adapter_id = rig.install(1)
    rig.place(adapter_id)
    job, other = rig.sequence(prompt(9), adapter_id), rig.sequence(prompt(5, 1), None)
    first = StepPlan((chunk_of(other, 0, 5),), LayerGroup(chunk_of(job, 0, 9), ALL_LAYERS, 4))
    ending = rig.runner.launch(first)
    job.num_pending_tokens = other.num_pending_tokens = 1
    second = StepPlan((chunk_of(job, 9, 1, pending_from=1), chunk_of(other, 5, 1, pending_from=0)))
    behind = rig.runner.launch(second)
    for sequence, token in zip((other, job), ending.wait(), strict=True):
        sequence.token_ids.append(token.token_id)
        sequence.num_pending_tokens = 0
    drawn = behind.wait()
    for sequence, token in zip((job, other), drawn, strict=True):
        alone = rig.sequence(sequence.token_ids, sequence.adapter_id)
        num_tokens = len(sequence.token_ids)
        (expected,) = rig.run_whole(chunk_of(alone, 0, num_tokens))
        assert token.token_id == expected.token_id


def test_a_job_that_was_given_up_leaves_nothing_to_the_next_one(rig: LayerRig) -> None:
    first, second = rig.install(1), rig.install(2)
    given_up = rig.sequence(prompt(9, 1), first)
    rig.run_groups(chunk_of(given_up, 0, 9), SPLITS[-1][:2])
    job = rig.sequence(prompt(9), second)
    job.block_table = given_up.block_table
    drawn = rig.run_groups(chunk_of(job, 0, 9), SPLITS[-1])
    whole = rig.sequence(prompt(9), second)
    assert rig.run_whole(chunk_of(whole, 0, 9)) == drawn


def test_groups_with_a_gap_are_refused(rig: LayerRig) -> None:
    adapter_id = rig.install(1)
    rig.place(adapter_id)
    chunk = chunk_of(rig.sequence(prompt(9), adapter_id), 0, 9)
    rig.runner.launch(StepPlan((), LayerGroup(chunk, range(1), NUM_LAYERS)))
    with pytest.raises(AssertionError):
        rig.runner.launch(StepPlan((), LayerGroup(chunk, range(2, 3), NUM_LAYERS)))
    other = chunk_of(rig.sequence(prompt(9), adapter_id), 0, 9)
    with pytest.raises(AssertionError, match="gaps"):
        rig.runner.launch(StepPlan((), LayerGroup(other, range(1, 2), NUM_LAYERS)))
