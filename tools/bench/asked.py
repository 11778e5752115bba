"""One request from the moment at which it is due until its end."""

from time import perf_counter

from tools.bench.http_exchange import ExchangeFailed
from tools.bench.records import RequestKind, RequestRecord
from tools.bench.streamed_answer import StreamedAnswer


class AskedRequest:
    """Collects what becomes of a request. Its times are ``perf_counter``'s."""

    def __init__(
        self,
        kind: RequestKind,
        number: int,
        adapter: str | None,
        input_tokens: int,
        output_tokens: int,
        due_s: float,
        answer: StreamedAnswer,
    ) -> None:
        self.kind = kind
        self.number = number
        self.adapter = adapter
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.due_s = due_s
        self.answer = answer
        self.level: str | None = None
        self.was_held = False
        self._ended_s: float | None = None
        self._failure: ExchangeFailed | None = None
        self._was_stopped = False

    @property
    def has_ended(self) -> bool:
        return self._ended_s is not None

    @property
    def failure(self) -> ExchangeFailed | None:
        return self._failure

    def end(self, failure: ExchangeFailed | None = None) -> None:
        self._ended_s = perf_counter()
        self._failure = failure

    def stop(self) -> None:
        """The run is over, and nothing was wrong with this request."""
        self.end()
        self._was_stopped = True

    def record(self, begin_s: float) -> RequestRecord:
        """The record of it, in seconds since ``begin_s``."""
        answer, failure = self.answer, self._failure
        sent_s = answer.sent_s
        return RequestRecord(
            kind=self.kind,
            number=self.number,
            adapter=self.adapter,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            due_s=round(self.due_s - begin_s, 6),
            sent_s=None if sent_s is None else round(sent_s - begin_s, 6),
            ended_s=None if self._ended_s is None else round(self._ended_s - begin_s, 6),
            offsets_us=[round((at_s - (sent_s or 0.0)) * 1e6) for at_s in answer.times_s],
            tokens=[] if all(count == 1 for count in answer.tokens) else answer.tokens,
            num_tokens=answer.num_tokens,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            level=self.level,
            was_held=self.was_held,
            was_stopped=self._was_stopped,
            failure=None if failure is None else failure.kind,
            detail=None if failure is None else failure.detail,
        )
