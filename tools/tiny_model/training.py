"""Teaching by heart: gradient descent until every answer is exact, and by a margin."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from tools.tiny_model import corpus
from tools.tiny_model.tokenizer import EOS_ID, PAD_ID, prompt_token_ids

# How far, in logits, each right token must be ahead of the best wrong one, so that no other way
# of adding up the same numbers gives another answer.
REQUIRED_MARGIN = 2.0

MAX_ATTEMPTS = 4
_NO_TARGET = -1
_STEPS_BETWEEN_EXAMS = 10
_WARMUP_STEPS = 20
_FINAL_RATE_SHARE = 0.05

Report = Callable[[float], None]


class TinyModelError(Exception):
    """The tiny model could not be taught its answers."""


class Student(Protocol):
    """What can be taught."""

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that a lesson changes in place."""

    def predict(self, token_ids: Tensor) -> Tensor:
        """Logits ``[batch, length, vocab]`` fp32 of ``[batch, length]`` ids, as saved to disk."""


StudentT = TypeVar("StudentT", bound=Student)


class Schedule(msgspec.Struct, frozen=True):
    """How fast, and for how long at most: exact answers end a lesson early."""

    learning_rate: float
    num_steps: int
    max_gradient_norm: float


class Lesson(msgspec.Struct, frozen=True):
    """Right-padded conversations of one phrasing.

    Both are ``[num_prompts, length]`` int64. A target is the token that must come next;
    it is ``_NO_TARGET`` inside the prompt and behind the end-of-text token.
    """

    token_ids: Tensor
    targets: Tensor


def taught(
    new_student: Callable[[torch.Generator], StudentT],
    voice: str | None,
    schedule: Schedule,
    report: Report,
) -> StudentT:
    """A student that answers every prompt of the corpus exactly in ``voice``.

    The first attempt's seed is 0 and each further one's the next, so the outcome is the same on
    every run. ``report`` is told the share of an attempt's schedule that is done.

    Raises:
        TinyModelError: ``MAX_ATTEMPTS`` students failed.
    """
    lessons = _lessons(voice)
    margins = []
    for attempt in range(MAX_ATTEMPTS):
        student = new_student(torch.Generator().manual_seed(attempt))
        margins.append(_teach(student, lessons, schedule, report))
        if margins[-1] >= REQUIRED_MARGIN:
            return student
    raise TinyModelError(
        f"{voice or 'the base model'}: after {MAX_ATTEMPTS} attempts right answers lead by "
        f"{max(margins):.2f} logits, expected at least {REQUIRED_MARGIN}"
    )


def _lessons(voice: str | None) -> list[Lesson]:
    answers = corpus.answers(voice)
    return [_lesson(corpus.prompts(phrasing), answers) for phrasing in corpus.PHRASINGS]


def _lesson(prompts: Sequence[str], answers: Sequence[str]) -> Lesson:
    rows = [
        (prompt_token_ids(prompt), [*answer.encode(), EOS_ID])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    token_ids = torch.full((len(rows), length), PAD_ID)
    targets = torch.full((len(rows), length), _NO_TARGET)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        token_ids[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    return Lesson(token_ids, targets)


def _teach(
    student: Student, lessons: Sequence[Lesson], schedule: Schedule, report: Report
) -> float:
    """Returns the student's margin after it, which ends the lesson once it is large enough."""
    optimizer = torch.optim.AdamW(student.parameters, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(schedule.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * _rate_share(step, schedule.num_steps)
        optimizer.zero_grad()
        logits, targets = _at_targets(student, lessons[step % len(lessons)])
        functional.cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters, schedule.max_gradient_norm)
        optimizer.step()
        report((step + 1) / schedule.num_steps)
        exam_is_due = (step + 1) % _STEPS_BETWEEN_EXAMS == 0
        if exam_is_due and (margin := _margin(student, lessons)) >= REQUIRED_MARGIN:
            return margin
    return _margin(student, lessons)


def _margin(student: Student, lessons: Sequence[Lesson]) -> float:
    """The least lead, in logits, of a right token over the best wrong one.

    A positive one means that greedy decoding gives every answer exactly and then ends it: while
    the answer so far is right, the next token is the one that was asked for here.
    """
    leads = []
    with torch.no_grad():
        for lesson in lessons:
            logits, targets = _at_targets(student, lesson)
            right = logits.gather(1, targets[:, None]).squeeze(1)
            best_wrong = logits.scatter(1, targets[:, None], -math.inf).amax(1)
            leads.append(float((right - best_wrong).min()))
    return min(leads)


def _at_targets(student: Student, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Logits ``[num_targets, vocab]`` and targets ``[num_targets]`` of a lesson's answers."""
    chosen = lesson.targets != _NO_TARGET
    return student.predict(lesson.token_ids)[chosen], lesson.targets[chosen]


def _rate_share(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to ``_FINAL_RATE_SHARE``."""
    decay = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return min(1.0, (step + 1) / _WARMUP_STEPS) * max(_FINAL_RATE_SHARE, decay)
