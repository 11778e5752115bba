r"""Matches paths against patterns of strangers in bounded time: nothing is ever tried twice.

Patterns become one program of a few instructions. A path is read once, from left to right, with
the set of all instructions that could come next, as Thompson's construction has it: the time is
at most the program's length times the path's, whatever the pattern is. ``re`` tries one way after
the other instead, and takes longer than a life for ``(\w+\.?)+#``. A set that was met before is
not worked out again, so that the many paths of a model, which are alike, cost little more than one.

Whether a regular expression matches does not depend on the order in which ways are tried, so the
answer is that of ``re``. What depends on it, which part a group has matched, is not answered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from loader.path_pattern import (
    NOTHING,
    WORD_CHARACTERS,
    Alternation,
    Anchor,
    Characters,
    Concatenation,
    Pattern,
    PatternRefused,
    Repeat,
)

# About half a second. The largest that is known to be written, ranks and alphas of each module of
# a model of 128 layers, take two fifths of it.
MAX_EFFORT = 1_000_000
# An instruction takes as much memory and time as so many steps of matching.
_INSTRUCTION_EFFORT = 10


class Effort:
    """What one configuration's patterns may cost, all together; counted in steps of matching."""

    def __init__(self, limit: int = MAX_EFFORT) -> None:
        self._left = limit

    def spend(self, num_steps: int) -> None:
        """Raises ``PatternRefused`` when nothing is left."""
        self._left -= num_steps
        if self._left < 0:
            raise PatternRefused("it takes too long to match")


@dataclass(frozen=True, slots=True)
class _Consume:
    """The path's next character is one of ``members``."""

    members: frozenset[str]
    then: int


@dataclass(frozen=True, slots=True)
class _Check:
    anchor: Anchor
    then: int


@dataclass(frozen=True, slots=True)
class _Fork:
    """Goes on at each of ``targets``."""

    targets: list[int]


@dataclass(frozen=True, slots=True)
class _Accept:
    """The pattern of this index has matched if the path ends here."""

    index: int


_Instruction = _Consume | _Check | _Fork | _Accept


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """Where the program can be behind a part of a path.

    ``threads`` are instructions; ``after_word`` says of which kind the last character is, None
    before the first; ``moves`` remembers which state each next character has led to.
    """

    threads: tuple[int, ...]
    after_word: bool | None
    moves: "dict[str, _State]" = field(default_factory=dict)


class PathAutomaton:
    """Tells which of ``patterns``, each behind ``prefix``, match a path as a whole.

    Raises:
        PatternRefused: they are worth more than ``effort``; so do all methods.
    """

    def __init__(
        self, patterns: Sequence[Pattern], effort: Effort, prefix: Pattern = NOTHING
    ) -> None:
        self._effort = effort
        self._program: list[_Instruction] = []
        self._states: dict[tuple[tuple[int, ...], bool | None], _State] = {}
        self._root = self._add(_Fork([]))
        self._children: dict[tuple[int, Pattern], int] = {}
        for index, pattern in enumerate(patterns):
            self._insert(pattern, index)
        self._start = self._state((self._emit(prefix, self._root),), None)

    def first_match(self, path: str) -> int | None:
        """The lowest index of a pattern that matches ``path``, of ``ALPHABET`` alone."""
        state = self._start
        for character in path:
            following = state.moves.get(character)
            if following is None:
                following = state.moves[character] = self._move(state, character)
            state = following
            if not state.threads:
                return None
        reached = self._reach(state, None)
        return min((each.index for each in reached if isinstance(each, _Accept)), default=None)

    def _move(self, state: _State, character: str) -> _State:
        reached = self._reach(state, character)
        threads = {
            each.then
            for each in reached
            if isinstance(each, _Consume) and character in each.members
        }
        return self._state(tuple(sorted(threads)), character in WORD_CHARACTERS)

    def _state(self, threads: tuple[int, ...], after_word: bool | None) -> _State:
        return self._states.setdefault((threads, after_word), _State(threads, after_word))

    def _reach(self, state: _State, following: str | None) -> list[_Consume | _Accept]:
        """All that the state leads to before ``following``, the next character; None: the end."""
        reached: list[_Consume | _Accept] = []
        seen = set(state.threads)
        unread = list(state.threads)
        while unread:
            self._effort.spend(1)
            instruction = self._program[unread.pop()]
            match instruction:
                case _Consume() | _Accept():
                    reached.append(instruction)
                    continue
                case _Check():
                    holds = _holds(instruction.anchor, state.after_word, following)
                    targets = [instruction.then] if holds else []
                case _Fork():
                    targets = instruction.targets
            self._effort.spend(len(targets))
            for target in targets:
                if target not in seen:
                    seen.add(target)
                    unread.append(target)
        return reached

    def _insert(self, pattern: Pattern, index: int) -> None:
        """Adds a pattern beside the others; what it begins with as they do, it has in common."""
        self._effort.spend(_INSTRUCTION_EFFORT)
        node = self._root
        for part in pattern.parts if isinstance(pattern, Concatenation) else (pattern,):
            child = self._children.get((node, part))
            if child is None:
                child = self._add(_Fork([]))
                self._children[node, part] = child
                self._targets(node).append(self._emit(part, child))
            node = child
        self._targets(node).append(self._add(_Accept(index)))

    def _emit(self, pattern: Pattern, then: int) -> int:
        """Adds instructions that match ``pattern`` and go on at ``then``; the first of them."""
        # Also what adds nothing takes time: an empty group, repeated a million times.
        self._effort.spend(_INSTRUCTION_EFFORT)
        match pattern:
            case Anchor():
                return self._add(_Check(pattern, then))
            case Characters():
                return self._add(_Consume(pattern.members, then))
            case Alternation():
                return self._add(_Fork([self._emit(each, then) for each in pattern.options]))
            case Repeat():
                return self._emit_repeat(pattern, then)
        for part in reversed(pattern.parts):
            then = self._emit(part, then)
        return then

    def _emit_repeat(self, repeat: Repeat, then: int) -> int:
        if repeat.maximum is None:
            entry = self._add(_Fork([then]))
            self._targets(entry).append(self._emit(repeat.part, entry))
        else:
            entry = then
            for _ in range(repeat.maximum - repeat.minimum):
                entry = self._add(_Fork([self._emit(repeat.part, entry), then]))
        for _ in range(repeat.minimum):
            entry = self._emit(repeat.part, entry)
        return entry

    def _targets(self, fork: int) -> list[int]:
        instruction = self._program[fork]
        assert isinstance(instruction, _Fork)
        return instruction.targets

    def _add(self, instruction: _Instruction) -> int:
        self._program.append(instruction)
        return len(self._program) - 1


def _holds(anchor: Anchor, after_word: bool | None, following: str | None) -> bool:
    match anchor:
        case Anchor.START:
            return after_word is None
        case Anchor.END:
            return following is None
    before_word = following is not None and following in WORD_CHARACTERS
    return (bool(after_word) != before_word) == (anchor is Anchor.WORD_EDGE)
