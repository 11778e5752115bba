"""The engine's logits against transformers and peft, for every way a token can be computed."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.config import DeviceKind
from engine.device import Device, open_device
from engine.sequence import Sequence
from ipc.messages import AdapterId
from tests.engine.lora_images import image_of_peft
from tests.engine.rig import BLOCK_SIZE, Rig
from tests.engine.tiny_checkpoints import ADAPTERS, FAMILIES, VOCAB_SIZE, Oracle

TOLERANCE = 1e-4
CLEARLY = 0.1


@dataclass(frozen=True)
class Served:
    """One base model with all of ``ADAPTERS`` resident, beside its oracle."""

    oracle: Oracle
    rig: Rig
    adapter_ids: dict[str | None, AdapterId | None]

    def sequence(
        self, adapter: str | None, token_ids: list[int], shared_blocks: list[int] | None = None
    ) -> Sequence:
        return self.rig.sequence(token_ids, self.adapter_ids[adapter], shared_blocks)

    def difference(self, adapter: str | None, token_ids: list[int], got: Tensor) -> float:
        """The largest, over the last rows of the sequence, which ``got`` holds."""
        expected = self.oracle.logits(adapter, token_ids)[-len(got) :]
        assert got.isfinite().all()
        return (got - expected).abs().max().item()


@pytest.fixture(
    scope="module", params=[DeviceKind.CPU, pytest.param(DeviceKind.CUDA, marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> Device:
    return open_device(request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, device: Device, tmp_path_factory: pytest.TempPathFactory
) -> Served:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = Oracle(request.param, folder)
    rig = Rig(folder, device)
    adapter_ids: dict[str | None, AdapterId | None] = {None: None}
    for number, name in enumerate(ADAPTERS, start=1):
        image = image_of_peft(rig.base, oracle.layers, name)
        adapter_ids[name] = rig.install(number, image)
    return Served(oracle, rig, adapter_ids)


def prompt(length: int, number: int = 0) -> list[int]:
    source = random.Random(1000 * length + number)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


def everybody() -> list[tuple[str | None, list[int]]]:
    """Base rows and rows of every adapter, interleaved, in lengths around the block edges."""
    names = [None, *ADAPTERS, None, "rank_3", "rank_8"]
    lengths = [9, 1, 4, 5, 23, 8, 2, 10, 16, 40, 7]
    return [(name, prompt(length)) for name, length in zip(names, lengths, strict=True)]


def test_prefill_of_a_mixed_batch(served: Served) -> None:
    members = everybody()
    sequences = [served.sequence(*member) for member in members]
    logits = served.rig.advance(*((each, len(each.token_ids)) for each in sequences))
    for member, got in zip(members, logits, strict=True):
        assert served.difference(*member, got) < TOLERANCE, member[0]


def test_decode_of_a_mixed_batch_token_by_token(served: Served) -> None:
    members = [(name, [*token_ids, 7, 11, 13, 17]) for name, token_ids in everybody()]
    sequences = [served.sequence(*member) for member in members]
    served.rig.advance(*((each, len(each.token_ids) - 4) for each in sequences))
    for left in (3, 2, 1, 0):
        logits = served.rig.advance(*((each, 1) for each in sequences))
        for (name, token_ids), got in zip(members, logits, strict=True):
            so_far = token_ids[: len(token_ids) - left]
            assert served.difference(name, so_far, got) < TOLERANCE, name


def test_chunked_prefill_beside_decodes(served: Served) -> None:
    long = prompt(29)
    chunked = [served.sequence(name, long) for name in ("rank_3", None, "rank_64_qv")]
    decoding = served.sequence("rank_8", prompt(12))
    served.rig.advance((decoding, 6))
    done = 0
    for count in (5, 1, 3, 8, 12):
        done += count
        logits = served.rig.advance(
            (chunked[0], count), (decoding, 1), (chunked[1], count), (chunked[2], count)
        )
        for name, got in zip(("rank_3", None, "rank_64_qv"), logits[:1] + logits[2:], strict=True):
            assert served.difference(name, long[:done], got) < TOLERANCE, (name, done)


def test_prefix_cache_hit_continues_from_the_blocks_of_another_sequence(served: Served) -> None:
    for name in (None, "rank_16"):
        first = served.sequence(name, prompt(14))
        served.rig.advance((first, 14))
        token_ids = first.token_ids[: 3 * BLOCK_SIZE] + prompt(5, number=1)
        second = served.sequence(name, token_ids, shared_blocks=first.block_table[:3])
        (logits,) = served.rig.advance((second, 5))
        assert served.difference(name, token_ids, logits) < TOLERANCE, name


def test_prefix_cache_hit_within_one_step(served: Served) -> None:
    first = served.sequence("rank_8", prompt(10))
    token_ids = [*first.token_ids[: 2 * BLOCK_SIZE], 3]
    second = served.sequence("rank_8", token_ids, shared_blocks=first.block_table[:2])
    _, logits = served.rig.advance((first, 10), (second, 1))
    assert served.difference("rank_8", token_ids, logits) < TOLERANCE


def test_any_schedule_gives_the_logits_of_the_whole_sequence(
    served: Served, rng: random.Random
) -> None:
    members = [*everybody(), ("rank_1", prompt(60)), (None, prompt(51))]
    sequences = [served.sequence(*member) for member in members]
    parts: list[list[Tensor]] = [[] for _ in members]
    while any(sequence.num_uncomputed_tokens for sequence in sequences):
        unfinished = [i for i, each in enumerate(sequences) if each.num_uncomputed_tokens]
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        counts = [rng.choice((1, rng.randint(1, 9))) for _ in chosen]
        counts = [
            min(count, sequences[i].num_uncomputed_tokens)
            for i, count in zip(chosen, counts, strict=True)
        ]
        steps = [(sequences[i], count) for i, count in zip(chosen, counts, strict=True)]
        for i, got in zip(chosen, served.rig.advance(*steps), strict=True):
            parts[i].append(got)
    for (name, token_ids), of_member in zip(members, parts, strict=True):
        assert served.difference(name, token_ids, torch.cat(of_member)) < TOLERANCE, name


def test_every_adapter_answers_clearly_unlike_the_base_and_unlike_the_others(
    served: Served,
) -> None:
    token_ids = prompt(12)
    answers = {name: served.oracle.logits(name, token_ids) for name in (None, *ADAPTERS)}
    names = list(answers)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert (answers[one] - answers[other]).abs().max() > CLEARLY, (one, other)


def test_two_adapters_of_one_shape_put_in_each_others_place_are_noticed(served: Served) -> None:
    token_ids = prompt(12)
    swapped = {"rank_8": "rank_8_twin", "rank_8_twin": "rank_8"}
    sequences = [served.sequence(other, token_ids) for other in swapped.values()]
    logits = served.rig.advance(*((each, len(token_ids)) for each in sequences))
    for name, got in zip(swapped, logits, strict=True):
        assert served.difference(name, token_ids, got) > CLEARLY
        assert served.difference(swapped[name], token_ids, got) < TOLERANCE


def test_greedy_tokens_come_in_the_order_of_the_plan(served: Served) -> None:
    members = everybody()
    sequences = [served.sequence(*member) for member in members]
    unfinished = served.sequence("rank_1", prompt(9))
    steps = [(each, len(each.token_ids)) for each in sequences]
    sampled = served.rig.run(*steps[:3], (unfinished, 5), *steps[3:])
    expected = [int(served.oracle.logits(*member)[-1].argmax()) for member in members]
    assert [token.token_id for token in sampled] == expected
