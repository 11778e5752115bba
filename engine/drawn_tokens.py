"""Sampled tokens on their way from the device to the host, without the host waiting."""

from dataclasses import dataclass

from torch import Tensor

from engine.device import Device, TimedEvent
from engine.plan import SampledToken
from ipc.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class DrawnLogprobs:
    """Logprobs of the rows that want them; row ``rows[i]`` shows ``num_top[i]`` of the likeliest.

    | tensor         | shape            | dtype   |
    |----------------|------------------|---------|
    | `of_drawn`     | `[len(rows)]`    | float32 |
    | `top_ids`      | `[len(rows), k]` | int64   |
    | `top_logprobs` | `[len(rows), k]` | float32 |
    """

    rows: list[int]
    num_top: list[int]
    of_drawn: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """One token for each row of a batch of logits: ``token_ids`` ``[num_rows]`` int64."""

    token_ids: Tensor
    logprobs: DrawnLogprobs | None = None


class DrawnStep:
    """The ``LaunchedStep`` behind ``drawn``, whose way to the host begins here.

    Made on the step thread, inside the forward stream, when all of the step's work was enqueued.
    Copies are enqueued behind it, and an event behind them: ``wait`` waits for that event alone.
    ``drawn``'s own tensors may be overwritten on the forward stream at once. None stands for a step
    that draws nothing: it, too, is waited for, so that the host never runs far ahead. ``begin`` is
    an event ahead of all of the step's work.
    """

    def __init__(self, drawn: DrawnTokens | None, device: Device, begin: TimedEvent) -> None:
        self._drawn = None if drawn is None else _download(drawn, device)
        self._begin = begin
        self._end = device.record_timed_event()

    def is_done(self) -> bool:
        return self._end.query()

    def device_s(self) -> float:
        return self._begin.elapsed_time(self._end) / 1e3

    def wait(self) -> list[SampledToken]:
        self._end.synchronize()
        return [] if self._drawn is None else _sampled_tokens(self._drawn)


def _download(drawn: DrawnTokens, device: Device) -> DrawnTokens:
    logprobs = drawn.logprobs
    return DrawnTokens(
        device.download(drawn.token_ids),
        logprobs
        and DrawnLogprobs(
            logprobs.rows,
            logprobs.num_top,
            device.download(logprobs.of_drawn),
            device.download(logprobs.top_ids),
            device.download(logprobs.top_logprobs),
        ),
    )


def _sampled_tokens(drawn: DrawnTokens) -> list[SampledToken]:
    """``drawn`` lies in host memory, complete."""
    token_ids: list[int] = drawn.token_ids.tolist()
    sampled = [SampledToken(token_id, None) for token_id in token_ids]
    logprobs = drawn.logprobs
    if logprobs is None:
        return sampled
    for row, count, logprob, top_ids, top_logprobs in zip(
        logprobs.rows,
        logprobs.num_top,
        logprobs.of_drawn.tolist(),
        logprobs.top_ids.tolist(),
        logprobs.top_logprobs.tolist(),
        strict=True,
    ):
        token_id = token_ids[row]
        pairs = tuple(zip(top_ids[:count], top_logprobs[:count], strict=True))
        sampled[row] = SampledToken(token_id, TokenLogprobs(token_id, logprob, pairs))
    return sampled
