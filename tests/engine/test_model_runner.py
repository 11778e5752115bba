"""Steps that are launched before the tokens of the one before are known on the host."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.batch import FlatBatch
from engine.config import DeviceKind
from engine.device import open_device
from engine.plan import LaunchedStep, SampledToken, ScheduledChunk, StepPlan
from engine.sequence import Sequence
from ipc.image import AdapterModule
from ipc.messages import AdapterId, SamplingParams
from tests.engine.lora_images import image_of_peft, make_image
from tests.engine.rig import Rig
from tests.engine.tiny_checkpoints import VOCAB_SIZE, Oracle

NUM_DECODES = 6
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(seed=3, top_p=0.9, logprobs=2),
    SamplingParams(temperature=0.0, min_tokens=4, logit_bias={5: 0.5}),
)


class Chat:
    """Sequences of the base and of one adapter, decoded in an order that changes every step."""

    def __init__(self, rig: Rig, rng: random.Random, adapter_id: AdapterId) -> None:
        self._rig = rig
        self._rng = rng
        self._last: list[Sequence] = []
        self.sequences: list[Sequence] = []
        for number in range(6):
            prompt = [(5 * number + 3 * i) % VOCAB_SIZE for i in range(4 + number)]
            room = [0] * (NUM_DECODES + 1)
            sequence = rig.sequence([*prompt, *room], None if number % 2 else adapter_id)
            sequence.token_ids = prompt
            sequence.num_prompt_tokens = len(prompt)
            sequence.sampling = SAMPLINGS[number % len(SAMPLINGS)]
            self.sequences.append(sequence)

    def launch(self) -> tuple[list[Sequence], LaunchedStep]:
        order = self._rng.sample(self.sequences, len(self.sequences))
        plan = StepPlan(tuple(self._chunk(sequence) for sequence in order))
        self._last = order
        return order, self._rig.launch(plan)

    def _chunk(self, sequence: Sequence) -> ScheduledChunk:
        return ScheduledChunk(
            sequence,
            sequence.num_computed_tokens,
            sequence.num_uncomputed_tokens,
            samples=True,
            pending_from=self._last.index(sequence) if sequence.num_pending_tokens else None,
        )


def take(launched: tuple[list[Sequence], LaunchedStep]) -> dict[int, SampledToken]:
    """Completes a step: what it drew, by sequence."""
    order, step = launched
    drawn: dict[int, SampledToken] = {}
    for sequence, token in zip(order, step.wait(), strict=True):
        sequence.num_pending_tokens -= 1
        sequence.token_ids.append(token.token_id)
        drawn[sequence.num_prompt_tokens] = token
    return drawn


@pytest.mark.parametrize(
    "kind", [DeviceKind.CPU, pytest.param(DeviceKind.CUDA, marks=pytest.mark.gpu)]
)
def test_overlapped_steps_draw_what_steps_one_by_one_draw(
    kind: DeviceKind, tmp_path: Path, rng: random.Random
) -> None:
    oracle = Oracle("llama", tmp_path)
    rig = Rig(tmp_path, open_device(kind))
    adapter_id = rig.install(1, image_of_peft(rig.base, oracle.layers, "rank_16"))
    one_by_one, overlapped = (Chat(rig, rng, adapter_id) for _ in range(2))
    expected = [take(one_by_one.launch()) for _ in range(NUM_DECODES + 1)]
    drawn = []
    before = overlapped.launch()
    for _ in range(NUM_DECODES):
        launched = overlapped.launch()
        drawn.append(take(before))
        before = launched
    drawn.append(take(before))
    for got, wanted in zip(drawn, expected, strict=True):
        for number, token in wanted.items():
            assert got[number].token_id == token.token_id
            assert (got[number].logprobs is None) == (token.logprobs is None)


class MarkedGraphs:
    """Takes decodes, and answers each with a token that says where it was in the batch."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []

    def fits(self, batch: FlatBatch) -> bool:
        return len(batch.token_ids) == len(batch.context_lens) == len(batch.sample_rows)

    def replay(self, batch: FlatBatch) -> Tensor:
        self.num_rows.append(len(batch.token_ids))
        marks = torch.arange(VOCAB_SIZE - len(batch.sample_rows), VOCAB_SIZE)
        return torch.nn.functional.one_hot(marks, VOCAB_SIZE).float()


def test_graphs_take_decodes_and_no_prefill_however_short(tmp_path: Path) -> None:
    Oracle("llama", tmp_path)
    prompt = [3, 6, 9, 12, 15]
    device = open_device(DeviceKind.CPU)
    alone, graphs = Rig(tmp_path, device), MarkedGraphs()
    rig = Rig(tmp_path, device, graphs=graphs)
    expected = alone.run((alone.sequence(list(prompt)), 5))[0].token_id

    part, *decodes = rig.sequence(list(prompt)), rig.sequence([1, 2]), rig.sequence([4, 5])
    rig.run((part, 3), *((sequence, 1) for sequence in decodes))
    drawn = rig.run(*((sequence, 1) for sequence in decodes))
    assert graphs.num_rows == [2]
    assert [token.token_id for token in drawn] == [VOCAB_SIZE - 2, VOCAB_SIZE - 1]
    # What is left of it is a prefill.
    assert rig.run((part, 2))[0].token_id == expected
    assert graphs.num_rows == [2]


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_graphs_take_no_decode_beside_an_embedding_or_head_of_an_adapters_own(
    module: str, tmp_path: Path
) -> None:
    Oracle("llama", tmp_path)
    device = open_device(DeviceKind.CPU)
    graphs = MarkedGraphs()
    rig = Rig(tmp_path, device, graphs=graphs)
    base = rig.base
    stage, out, inputs = base.head_stage, base.vocab_size, base.hidden_size
    if module == "embed_tokens":
        stage, out, inputs = 0, base.hidden_size, base.vocab_size
    pairs = {(stage, module): (torch.ones(8, inputs), torch.ones(out, 8))}
    image = make_image(base, [AdapterModule(stage, module, 8, 1.0)], pairs)
    adapter_id = rig.install(1, image)
    own, plain = rig.sequence([1, 2], adapter_id), rig.sequence([4, 5])
    rig.run((own, 1), (plain, 1))
    rig.run((own, 1), (plain, 1))
    assert graphs.num_rows == []
    rig.run((rig.sequence([7]), 1))
    assert graphs.num_rows == [1]
