"""Every rule of the sampler against an obvious loop over one row."""

import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from engine.device import CpuDevice, Device
from engine.drawn_tokens import DrawnStep
from engine.plan import SampledToken
from engine.sampler import Sampler
from engine.sequence import Sequence
from ipc.messages import SamplingParams
from tests.engine.rig import GREEDY, make_sequence

EOS = 3


def sample_with(
    sampler: Sampler, device: Device, logits: Tensor, sequences: list[Sequence]
) -> list[SampledToken]:
    begin = device.record_timed_event()
    return DrawnStep(sampler.sample_on_device(logits, sequences), device, begin).wait()


def sample(logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
    return sample_with(Sampler(CpuDevice(), (EOS,)), CpuDevice(), logits, sequences)


def sequence(
    sampling: SamplingParams, prompt: list[int], output: list[int], number: int = 0
) -> Sequence:
    token_ids = [*prompt, *output]
    return make_sequence(token_ids, number=number, sampling=sampling, num_prompt_tokens=len(prompt))


def draws(logits: list[float], count: int = 4000, **params: float) -> dict[int, float]:
    """How often each token is drawn, over ``count`` seeds."""
    sequences = [
        sequence(SamplingParams(seed=seed, **params), [1], [])  # type: ignore[arg-type]
        for seed in range(count)
    ]
    tokens = sample(torch.tensor([logits] * count), sequences)
    counted = Counter(token.token_id for token in tokens)
    return {token_id: number / count for token_id, number in counted.items()}


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(value - max(logits)) for value in logits]
    return [weight / sum(weights) for weight in weights]


def assert_distribution(drawn: dict[int, float], expected: dict[int, float]) -> None:
    assert drawn.keys() == {token for token, share in expected.items() if share > 0.003}
    for token, share in expected.items():
        # Five standard deviations of a share of 4,000 draws.
        assert abs(drawn.get(token, 0.0) - share) <= 5 * math.sqrt(share * (1 - share) / 4000)


def kept_by_filters(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    probabilities = softmax(logits)
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    ranked = [token for token in ranked if probabilities[token] >= min_p * max(probabilities)]
    if top_k:
        ranked = ranked[:top_k]
    total = sum(probabilities[token] for token in ranked)
    kept: set[int] = set()
    reached = 0.0
    for token in ranked:
        if reached < top_p or top_p == 1.0:
            kept.add(token)
        reached += probabilities[token] / total
    return kept


def test_temperature_zero_takes_the_largest_logit_and_the_smaller_of_two_equal_ids() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 1.0, 5.0]])
    tokens = sample(logits, [sequence(GREEDY, [1], [])] * 2)
    assert [token.token_id for token in tokens] == [1, 0]


def test_draws_follow_the_softmax_of_logits_over_temperature() -> None:
    logits = [0.5, 1.0, -0.5, 0.0, 2.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = softmax([value / temperature for value in logits])
        assert_distribution(draws(logits, temperature=temperature), dict(enumerate(expected)))


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(2, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.3), (4, 0.8, 0.1), (1, 0.01, 0.9), (99, 0.9, 0.0)],
)
def test_filters_keep_what_the_loop_keeps_and_leave_its_proportions(
    top_k: int, top_p: float, min_p: float
) -> None:
    logits = [0.5, 1.0, -0.5, 0.0, 2.0, 1.3]
    kept = kept_by_filters(logits, top_k, top_p, min_p)
    probabilities = softmax(logits)
    total = sum(probabilities[token] for token in kept)
    expected = {token: probabilities[token] / total for token in kept}
    drawn = draws(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    assert_distribution(drawn, expected)


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    assert draws([1.0, 0.0, 1.0, 1.0], count=200, top_k=2).keys() == {0, 2, 3}
    assert draws([1.0, 0.0, 1.0, 1.0], count=200, top_p=0.1).keys() == {0, 2, 3}


def test_top_p_sums_what_top_k_left() -> None:
    # Of the two likeliest, 0.6 of the mass is one token's: top_p 0.55 needs no second one.
    logits = [math.log(0.3), math.log(0.2), math.log(0.17), math.log(0.17), math.log(0.16)]
    assert draws(logits, count=200, top_k=2, top_p=0.55).keys() == {0}


def test_penalties_change_the_logits_as_the_loop_does(rng: random.Random) -> None:
    vocab_size = 4
    for _ in range(300):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 3))]
        output = [rng.randrange(vocab_size) for _ in range(rng.randint(0, 4))]
        # Mostly below 0, so that the largest often is, too.
        logits = [rng.gauss(-1, 2) for _ in range(vocab_size)]
        repetition, presence = rng.choice((0.5, 1.0, 1.7)), rng.choice((-1.0, 0.0, 0.8))
        frequency = rng.choice((-0.5, 0.0, 0.4))
        expected = list(logits)
        for token in range(vocab_size):
            if token in prompt or token in output:
                value = expected[token]
                expected[token] = value / repetition if value > 0 else value * repetition
            if token in output:
                expected[token] -= presence + frequency * output.count(token)
        sampling = SamplingParams(
            temperature=0.0,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        (got,) = sample(torch.tensor([logits]), [sequence(sampling, prompt, output)])
        assert got.token_id == max(range(vocab_size), key=expected.__getitem__)


def test_penalties_count_the_tokens_that_came_since_the_last_step() -> None:
    growing = sequence(SamplingParams(temperature=0.0, frequency_penalty=1.0), [0], [])
    sampler = Sampler(CpuDevice(), ())
    drawn = []
    for _ in range(5):
        (token,) = sample_with(sampler, CpuDevice(), torch.tensor([[2.1, 3.0, 0.5]]), [growing])
        growing.token_ids.append(token.token_id)
        drawn.append(token.token_id)
    # 3.0, then 2.1 against 2.0, then 2.0 against 1.1, then 1.1 against 1.0, then 1.0 against 0.5.
    assert drawn == [1, 0, 1, 0, 1]


def test_logit_bias_is_added() -> None:
    sampling = SamplingParams(temperature=0.0, logit_bias={2: 3.0, 0: -1.0})
    tokens = sample(
        torch.tensor([[2.0, 1.5, 0.0], [2.0, 1.5, 0.0]]),
        [sequence(sampling, [1], []), sequence(GREEDY, [1], [])],
    )
    assert [token.token_id for token in tokens] == [2, 0]


@pytest.mark.parametrize(
    ("output", "ignore_eos", "expected"),
    [([], False, 1), ([0, 0], False, EOS), ([], True, EOS)],
)
def test_tokens_that_end_a_request_wait_for_min_tokens(
    output: list[int], ignore_eos: bool, expected: int
) -> None:
    sampling = SamplingParams(
        temperature=0.0, min_tokens=2, stop_token_ids=(2,), ignore_eos=ignore_eos
    )
    (token,) = sample(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), [sequence(sampling, [1], output)])
    assert token.token_id == expected


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = [0.5, 1.0, -0.5, 2.0]
    sampling = SamplingParams(temperature=0.0, logit_bias={0: 50.0}, logprobs=2)
    (token,) = sample(torch.tensor([logits]), [sequence(sampling, [1], [])])
    assert token.logprobs is not None
    expected = [math.log(share) for share in softmax(logits)]
    assert token.token_id == token.logprobs.token_id == 0
    assert token.logprobs.logprob == pytest.approx(expected[0])
    assert [token_id for token_id, _ in token.logprobs.top] == [3, 1]
    assert [logprob for _, logprob in token.logprobs.top] == pytest.approx(
        [expected[3], expected[1]]
    )


def test_rows_ask_for_different_numbers_of_logprobs() -> None:
    wanted = (None, 0, 3, 20)
    sequences = [sequence(SamplingParams(temperature=0.0, logprobs=n), [1], []) for n in wanted]
    tokens = sample(torch.arange(24.0).view(4, 6), sequences)
    got = [token.logprobs and len(token.logprobs.top) for token in tokens]
    assert got == [None, 0, 3, 6]


def random_sampling(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice((0.0, 0.3, 1.0, 1.5)),
        top_p=rng.choice((1.0, 1.0, 0.8, 0.3)),
        top_k=rng.choice((0, 0, 1, 5, 40)),
        min_p=rng.choice((0.0, 0.0, 0.05)),
        seed=rng.randrange(-(2**63), 2**63),
        min_tokens=rng.choice((0, 3)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        presence_penalty=rng.choice((0.0, 0.5)),
        logit_bias=rng.choice((None, {5: 1.0})),
        logprobs=rng.choice((None, None, 0, 4)),
    )


def test_a_row_gives_the_same_token_alone_and_in_any_batch(rng: random.Random) -> None:
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(rng.randrange(1000)))
    sequences = [sequence(random_sampling(rng), [1, 2, row], [4, row], row) for row in range(30)]
    alone = [sample(logits[row : row + 1], [sequences[row]])[0] for row in range(30)]
    for _ in range(10):
        rows = rng.sample(range(30), rng.randint(1, 30))
        together = sample(logits[rows], [sequences[row] for row in rows])
        for row, token in zip(rows, together, strict=True):
            assert token.token_id == alone[row].token_id
            assert (token.logprobs is None) == (alone[row].logprobs is None)


def test_a_row_that_is_not_a_number_changes_no_other() -> None:
    sampling = SamplingParams(seed=1, top_p=0.9, top_k=5, logprobs=2)
    rows = [sequence(sampling, [1], []) for _ in range(3)]
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(1))
    logits[2] = logits[0]
    expected = sample(logits, rows)[0]
    logits[1] = torch.nan
    first, _, last = sample(logits, rows)
    assert first == last == expected


def test_a_pending_token_counts_for_the_position_and_for_min_tokens() -> None:
    sampling = SamplingParams(seed=7, min_tokens=2)
    known, pending = sequence(sampling, [1], [5, 6]), sequence(sampling, [1], [5])
    pending.num_pending_tokens = 1
    logits = torch.zeros(1, 1000)
    logits[0, EOS] = 5.0
    assert sample(logits, [pending]) == sample(logits, [known])
    greedy = sequence(SamplingParams(temperature=0.0, min_tokens=2), [1], [5])
    assert sample(logits, [greedy])[0].token_id != EOS
    greedy.num_pending_tokens = 1
    assert sample(logits, [greedy])[0].token_id == EOS


def test_the_seed_and_the_position_decide_the_draw() -> None:
    flat = torch.zeros(1, 1000)

    def draw(seed: int, length: int) -> int:
        drawn = sequence(SamplingParams(seed=seed), [1] * length, [])
        return sample(flat, [drawn])[0].token_id

    assert draw(7, 4) == draw(7, 4)
    assert len({draw(seed, 4) for seed in range(20)}) > 15
    assert len({draw(7, length) for length in range(1, 21)}) > 15


@pytest.mark.gpu
def test_a_gpu_draws_the_same_tokens_as_the_cpu(rng: random.Random) -> None:
    from engine.device import CudaDevice

    logits = torch.randn(64, 2000, generator=torch.Generator().manual_seed(3))
    sequences = [sequence(random_sampling(rng), [1, 2, row], [4, row], row) for row in range(64)]
    device = CudaDevice()
    with device.forward_stream():
        on_gpu = sample_with(Sampler(device, (EOS,)), device, logits.cuda(), sequences)
    on_cpu = sample(logits, sequences)
    assert [token.token_id for token in on_gpu] == [token.token_id for token in on_cpu]


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_gpu_to_draw(rng: random.Random) -> None:
    from engine.device import CudaDevice

    device = CudaDevice()
    sampler = Sampler(device, (EOS,))
    sequences = [sequence(random_sampling(rng), [1, 2, row], [4, row], row) for row in range(64)]
    logits = torch.randn(64, 2000, device=device.torch_device)
    device.synchronize()
    for _ in range(2):
        # The first round loads kernels, for which the host may have to wait.
        with device.forward_stream():
            torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
            asleep = device.record_forward_event()
            begin = device.record_timed_event()
            step = DrawnStep(sampler.sample_on_device(logits, sequences), device, begin)
            is_early = not asleep.query()
        tokens = step.wait()
    assert is_early
    assert 0.0 <= step.device_s() < 0.05
    on_cpu = sample(logits.cpu(), sequences)
    assert [token.token_id for token in tokens] == [token.token_id for token in on_cpu]
