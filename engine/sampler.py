"""Chooses the next token of every row of a batch; no row has an influence on another.

Nothing here waits for the device: what is drawn stays there, as ``DrawnTokens``.

In this order, each step only on the rows that ask for it:

1. ``logit_bias`` is added.
2. ``repetition_penalty`` r, for tokens of prompt or output: logits above 0 are divided by r, others
   multiplied. Then, for tokens of the output, ``presence_penalty`` and ``frequency_penalty`` times
   their count are subtracted.
3. Below ``min_tokens``, tokens that would end the request become impossible.
4. Temperature 0 takes the largest logit; ties go to the smaller id. Otherwise logits are divided by
   the temperature.
5. ``min_p`` keeps tokens at least so many times as likely as the likeliest, ``top_k`` the k
   likeliest, ``top_p`` the fewest likeliest that reach this probability within what is left.
   Tokens that tie with the last one kept are kept.
6. The Gumbel-max trick draws from what is left.

Logprobs are of the raw logits. Source: the order is that of vLLM, the penalties' definitions are
those of OpenAI (presence, frequency) and of CTRL (repetition).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.device import Device
from engine.drawn_tokens import DrawnLogprobs, DrawnTokens
from engine.sampling_noise import gumbel_noise, row_keys
from engine.sequence import Sequence
from engine.token_counts import TokenCountsBySequence
from ipc.messages import SamplingParams

# Below it, dividing could overflow float32; the draw is all but certain there.
_MIN_TEMPERATURE = 1e-5
_IMPOSSIBLE = float("-inf")


@dataclass(slots=True)
class _Entries:
    """Single values of a ``[num_rows, vocab]`` tensor, collected on the host."""

    rows: list[int]
    token_ids: list[int]
    values: list[float]

    def indices(self, device: Device) -> tuple[Tensor, Tensor]:
        rows, token_ids = device.upload(np.array((self.rows, self.token_ids), dtype=np.int64))
        return rows, token_ids


class Sampler:
    """Keeps token counts between steps, for rows with penalties; otherwise has no state.

    ``eos_token_ids`` end a request that does not set ``ignore_eos``.
    """

    def __init__(self, device: Device, eos_token_ids: tuple[int, ...]) -> None:
        self._device = device
        self._eos_token_ids = eos_token_ids
        self._counts = TokenCountsBySequence()

    def sample_on_device(self, logits: Tensor, sequences: list[Sequence]) -> DrawnTokens:
        """The next token of ``sequences[i]`` from row ``i`` of ``logits`` ``[n, vocab]``.

        ``logits`` may be overwritten on the current stream afterwards. To be called before the
        scheduler is told that the step was launched: the token to be drawn is not pending yet. A
        sequence with penalties has no pending token; every one that is not greedy has a seed (one
        without is given a random one at arrival).
        """
        if all(_is_plain_greedy(sequence) for sequence in sequences):
            return DrawnTokens(logits.argmax(dim=-1))
        raw = logits.float()
        scores = raw.clone()
        self._add_bias(scores, sequences)
        self._penalize(scores, sequences)
        self._forbid_early_end(scores, sequences)
        chosen = scores.argmax(dim=-1)
        drawing = _where(sequences, lambda s: s.sampling.temperature >= _MIN_TEMPERATURE)
        if drawing:
            rows = self._device.upload(np.array(drawing, dtype=np.int64))
            chosen[rows] = self._draw(scores[rows], [sequences[row] for row in drawing])
        return DrawnTokens(chosen, self._logprobs(raw, chosen, sequences))

    def _add_bias(self, scores: Tensor, sequences: list[Sequence]) -> None:
        entries = _Entries([], [], [])
        for row, sequence in enumerate(sequences):
            bias = sequence.sampling.logit_bias
            if bias:
                entries.rows += [row] * len(bias)
                entries.token_ids += bias.keys()
                entries.values += bias.values()
        if entries.rows:
            values = self._device.upload(np.array(entries.values, dtype=np.float32))
            scores[entries.indices(self._device)] += values

    def _penalize(self, scores: Tensor, sequences: list[Sequence]) -> None:
        rows = _where(sequences, lambda s: s.has_penalty)
        assert not any(sequences[row].num_pending_tokens for row in rows), "tokens to count"
        counts = self._counts.update([sequences[row] for row in rows])
        if not rows:
            return
        lengths = [len(of_row.token_ids) for of_row in counts]
        token_ids = np.concatenate([of_row.token_ids for of_row in counts])
        where = self._device.upload(np.stack((np.repeat(rows, lengths), token_ids)))
        sampling = [sequences[row].sampling for row in rows]
        output_counts = np.concatenate([of_row.output_counts for of_row in counts])
        repetition = np.repeat([s.repetition_penalty for s in sampling], lengths)
        presence = np.repeat([s.presence_penalty for s in sampling], lengths)
        frequency = np.repeat([s.frequency_penalty for s in sampling], lengths)
        subtracted = presence * (output_counts > 0) + frequency * output_counts
        factors, terms = self._device.upload(np.stack((repetition, subtracted)).astype(np.float32))
        index = (where[0], where[1])
        values = scores[index]
        scores[index] = torch.where(values > 0, values / factors, values * factors) - terms

    def _forbid_early_end(self, scores: Tensor, sequences: list[Sequence]) -> None:
        entries = _Entries([], [], [])
        for row, sequence in enumerate(sequences):
            sampling = sequence.sampling
            if sequence.num_drawn_tokens < sampling.min_tokens:
                ends = set(sampling.stop_token_ids)
                if not sampling.ignore_eos:
                    ends.update(self._eos_token_ids)
                entries.rows += [row] * len(ends)
                entries.token_ids += ends
                entries.values += [_IMPOSSIBLE] * len(ends)
        if entries.rows:
            # A scalar in place of the values would be copied to a GPU with the host waiting.
            values = self._device.upload(np.array(entries.values, dtype=np.float32))
            scores[entries.indices(self._device)] = values

    def _draw(self, scores: Tensor, sequences: list[Sequence]) -> Tensor:
        """One token id ``[n]`` for each row of ``scores`` ``[n, vocab]``, all with temperature."""
        temperatures = [sequence.sampling.temperature for sequence in sequences]
        scores = scores / self._device.upload(np.array(temperatures, dtype=np.float32)).unsqueeze(1)
        filtered = _where(sequences, lambda s: _has_filter(s.sampling))
        if filtered:
            rows = self._device.upload(np.array(filtered, dtype=np.int64))
            candidates = scores[rows]
            least = self._least_kept(candidates, [sequences[row].sampling for row in filtered])
            scores[rows] = candidates.masked_fill(candidates < least, _IMPOSSIBLE)
        keys = self._device.upload(row_keys(_seed_and_position(each) for each in sequences))
        return (scores.double() + gumbel_noise(keys, scores.shape[1])).argmax(dim=-1)

    def _least_kept(self, scores: Tensor, sampling: list[SamplingParams]) -> Tensor:
        """The smallest score ``[n, 1]`` that min-p, top-k and top-p all keep in each row."""
        vocab_size = scores.shape[1]
        widths = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in sampling]
        top_p = [s.top_p for s in sampling]
        log_min_p = [math.log(s.min_p) if s.min_p > 0 else _IMPOSSIBLE for s in sampling]
        width, nucleus, log_share = self._device.upload(
            np.array((widths, top_p, log_min_p), dtype=np.float64)
        ).unsqueeze(2)
        floor: Tensor = scores.amax(dim=-1, keepdim=True) + log_share
        if all(s.top_k == 0 and s.top_p >= 1.0 for s in sampling):
            return floor
        ranked = scores.topk(max(widths), dim=-1).values.double()
        ranks = torch.arange(ranked.shape[1], device=ranked.device)
        kept = (ranks < width) & (ranked >= floor)
        probabilities = ranked.masked_fill(~kept, _IMPOSSIBLE).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        # With top_p 1 nothing is cut, whatever rounding makes of the sum.
        kept &= (before < nucleus) | (nucleus >= 1.0)
        return ranked.masked_fill(~kept, float("inf")).amin(dim=-1, keepdim=True)

    def _logprobs(
        self, raw: Tensor, chosen: Tensor, sequences: list[Sequence]
    ) -> DrawnLogprobs | None:
        wanting = _where(sequences, lambda s: s.sampling.logprobs is not None)
        if not wanting:
            return None
        rows = self._device.upload(np.array(wanting, dtype=np.int64))
        logprobs = raw[rows].log_softmax(dim=-1)
        num_top = [sequences[row].sampling.logprobs or 0 for row in wanting]
        top = logprobs.topk(min(max(num_top), logprobs.shape[1]), dim=-1)
        of_chosen = logprobs.gather(1, chosen[rows].unsqueeze(1)).squeeze(1)
        return DrawnLogprobs(wanting, num_top, of_chosen, top.indices, top.values)


def _where(sequences: list[Sequence], wanted: Callable[[Sequence], bool]) -> list[int]:
    return [row for row, sequence in enumerate(sequences) if wanted(sequence)]


def _is_plain_greedy(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return (
        sampling.temperature < _MIN_TEMPERATURE
        and sampling.logprobs is None
        and not sampling.logit_bias
        and not sequence.has_penalty
        and sequence.num_drawn_tokens >= sampling.min_tokens
    )


def _has_filter(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _seed_and_position(sequence: Sequence) -> tuple[int, int]:
    seed = sequence.sampling.seed
    assert seed is not None, sequence.request_id
    return seed, sequence.num_tokens
