"""Logprobs of the engine against transformers and peft, with the same weights in bfloat16.

That the comparison would notice is checked beside it: an adapter must change the answers by much
more than what may be off, and so must another adapter in its place.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.plan import ScheduledChunk, StepPlan
from engine.sequence import Sequence, SequenceId
from ipc.messages import AdapterId, RequestId, SamplingParams
from tools.gpu_checks.figures import Figure, Report
from tools.gpu_checks.lifelike import fill_adapter, scale_head
from tools.gpu_checks.live_engine import LiveEngine
from tools.gpu_checks.reference import Reference
from tools.gpu_checks.setting import Setting
from tools.gpu_checks.timing import machine_name

NUM_DECODED = 32
RANKS = (8, 64, 256)
SCALING = 2.0
LARGEST_DIFFERENCE = 0.1
# Three times the mean difference that rounding makes, which was 0.01 where it was tried.
LEAST_EFFECT = 0.03
# Another adapter in place of the right one must be off by that many times what the right one is.
LEAST_SWAPPED_RATIO = 5.0
_NUM_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Differences:
    """The largest ones: of ours to bfloat16 and to float32, and between these two."""

    ours_to_half: float
    ours_to_full: float
    half_to_full: float


def check_accuracy(setting: Setting) -> Report:
    """One batch of base rows and of adapters of three ranks: prefill, then 32 decoded tokens."""
    folder = setting.shape("llama-3.1-8b-4-layers")
    engine = LiveEngine(setting.engine_config(folder, max_adapter_bytes=2 << 30))
    report = Report("accuracy", machine_name(engine.device.torch_device))
    ranks: dict[AdapterId, int] = {}
    for rank in RANKS:
        (adapter_id,) = engine.add_adapters(setting.of(rank, min(rank, 32)), 1, SCALING)
        ranks[adapter_id] = setting.of(rank, min(rank, 32))
    engine.ensure_resident(list(ranks))
    scale_head(engine)
    for adapter_id in ranks:
        fill_adapter(engine, adapter_id, SCALING)

    rng = random.Random(1)
    vocab_size = engine.compute.model.vocab_size
    owners: list[AdapterId | None] = [None, *ranks, None, *ranks]
    prompts = [
        [rng.randrange(vocab_size) for _ in range(rng.randint(8, setting.of(300, 40)))]
        for _ in owners
    ]
    prefilled = _prefill_logprobs(engine, prompts, owners)
    requests = engine.ask(prompts, owners, NUM_DECODED, logprobs=_NUM_LOGPROBS)
    engine.run_until(lambda: engine.are_finished(requests))

    half = Reference(engine, folder, ranks, SCALING, torch.bfloat16)
    full = Reference(engine, folder, ranks, SCALING, torch.float32)
    in_prefill = Differences(0.0, 0.0, 0.0)
    in_decode = Differences(0.0, 0.0, 0.0)
    for prompt, owner, request, ours in zip(prompts, owners, requests, prefilled, strict=True):
        token_ids = prompt + engine.answers[request].token_ids
        of_half, of_full = half.logprobs(token_ids, owner), full.logprobs(token_ids, owner)
        prompt_rows = slice(0, len(prompt))
        in_prefill = _larger(
            in_prefill, _differences(ours, of_half[prompt_rows], of_full[prompt_rows])
        )
        positions, indices, decoded = _decoded_logprobs(engine, request, len(prompt), ours.device)
        in_decode = _larger(
            in_decode,
            _differences(decoded, of_half[positions, indices], of_full[positions, indices]),
        )
    for name, found in (("prefill", in_prefill), ("32 decoded tokens", in_decode)):
        report.details[name] = {
            "ours_to_half": found.ours_to_half,
            "ours_to_full": found.ours_to_full,
            "half_to_full": found.half_to_full,
        }
        report.figures += [
            Figure(f"{name}: ours to transformers", found.ours_to_half, LARGEST_DIFFERENCE),
            Figure(
                f"{name}: over transformers to its own float32",
                found.ours_to_half / found.half_to_full,
                2.0,
            ),
            Figure(f"{name}: ours to transformers in float32", found.ours_to_full),
            Figure(f"{name}: transformers to its own float32", found.half_to_full),
        ]
    first_of_each = list(zip(prompts, owners, prefilled, strict=True))[: 1 + len(ranks)]
    report.figures += _visibility(first_of_each, half, in_prefill.ours_to_half)
    return report


def _visibility(
    computed: list[tuple[list[int], AdapterId | None, Tensor]],
    reference: Reference,
    largest_difference: float,
) -> list[Figure]:
    """How plainly an adapter shows; ``computed`` are prompts, owners and our logprobs for them."""
    effects: list[float] = []
    swapped: list[float] = []
    for prompt, owner, ours in computed:
        for _, other, _ in computed:
            if other == owner:
                continue
            of_other = reference.logprobs(prompt, other)
            swapped.append(_largest(ours, of_other))
            if other is None:
                effects.append(float((reference.logprobs(prompt, owner) - of_other).abs().mean()))
    return [
        Figure(
            "weakest adapter: mean change of a logprob", min(effects), LEAST_EFFECT, at_most=False
        ),
        Figure("with another adapter: ours to transformers, at least", min(swapped)),
        Figure(
            "with another adapter: over ours to transformers with the right one",
            min(swapped) / largest_difference,
            LEAST_SWAPPED_RATIO,
            at_most=False,
        ),
    ]


def _prefill_logprobs(
    engine: LiveEngine, prompts: list[list[int]], owners: list[AdapterId | None]
) -> list[Tensor]:
    """``[num_tokens, vocab]`` fp32 of each prompt, all computed in one step.

    Takes blocks that nobody holds: the requests that come later overwrite them.
    """
    block_size = 16
    chunks = []
    next_block = 0
    for number, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
        sequence = Sequence(
            sequence_id=SequenceId(number),
            client=b"",
            request_id=RequestId(""),
            adapter_id=owner,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            max_tokens=1,
            sampling=SamplingParams(temperature=0.0),
            arrival_s=0.0,
        )
        num_blocks = -(-len(prompt) // block_size)
        sequence.block_table = list(range(next_block, next_block + num_blocks))
        next_block += num_blocks
        chunks.append(ScheduledChunk(sequence, 0, len(prompt), True))
    logits = engine.compute.runner.run_for_logits(StepPlan(tuple(chunks)))
    engine.device.synchronize()
    logprobs = logits.float().log_softmax(dim=-1)
    return list(logprobs.split_with_sizes([len(prompt) for prompt in prompts]))


def _decoded_logprobs(
    engine: LiveEngine, request: RequestId, num_prompt_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What a request was told: positions whose logits they are, token ids, logprobs; ``[n]``."""
    positions: list[int] = []
    token_ids: list[int] = []
    values: list[float] = []
    told = [each for delta in engine.answers[request].deltas for each in delta.logprobs or []]
    assert len(told) == NUM_DECODED, len(told)
    for index, logprobs in enumerate(told):
        for token_id, value in ((logprobs.token_id, logprobs.logprob), *logprobs.top):
            positions.append(num_prompt_tokens - 1 + index)
            token_ids.append(token_id)
            values.append(value)
    return (
        torch.tensor(positions, device=device),
        torch.tensor(token_ids, device=device),
        torch.tensor(values, device=device),
    )


def _differences(ours: Tensor, half: Tensor, full: Tensor) -> Differences:
    return Differences(_largest(ours, half), _largest(ours, full), _largest(half, full))


def _largest(left: Tensor, right: Tensor) -> float:
    """Infinity where one of them is not a number, so that it never passes."""
    difference = (left - right).abs().nan_to_num(nan=torch.inf)
    return float(difference.max())


def _larger(left: Differences, right: Differences) -> Differences:
    return Differences(
        max(left.ours_to_half, right.ours_to_half),
        max(left.ours_to_full, right.ours_to_full),
        max(left.half_to_full, right.half_to_full),
    )
