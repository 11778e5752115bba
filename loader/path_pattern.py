"""Reads regular expressions over module paths: a part of Python's syntax, with Python's meaning.

====================  ============================================================================
``a`` ``\\.`` ``.``     a character; one with its meaning taken; any
``[a-z_]`` ``[^.]``   a set of characters
``\\d \\w \\s``          digits, word characters and blanks; ``\\D \\W \\S`` all others
``( )`` ``(?: )``     a group
``|``                 one or the other
``* + ? {m,n}``       repetitions; a ``?`` behind one changes which match is found, not whether
``^ $ \\A \\Z \\b \\B``   the path's start and end; the edge of a word, and none
====================  ============================================================================

Anything else is refused: lookarounds and backreferences, which no automaton matches, flags and
named groups, and what Python itself does not take for a regular expression. ``re`` is not asked:
it takes some expressions years to match and some minutes to compile, and holds the interpreter.

Source: "Regular Expression Syntax" of Python's ``re``.
"""

import re
import string
from dataclasses import dataclass
from enum import Enum

MAX_NESTING = 50

# Paths are made of these; a pattern's characters beyond them match nothing.
ALPHABET = frozenset(chr(code) for code in range(0x20, 0x7F))
WORD_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_")

_CLASSES = {
    "d": frozenset(string.digits),
    "w": WORD_CHARACTERS,
    "s": frozenset(" "),
    "D": ALPHABET - frozenset(string.digits),
    "W": ALPHABET - WORD_CHARACTERS,
    "S": ALPHABET - frozenset(" "),
}
_COUNTS = re.compile(r"\{(\d{0,6}),(\d{0,6})\}|\{(\d{1,6})\}")
_SIMPLE_COUNTS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class PatternRefused(ValueError):
    """A pattern is none that is matched here; the message says why."""


class Anchor(Enum):
    """A condition on a place between two characters of a path."""

    START = "start"
    END = "end"
    WORD_EDGE = "word edge"
    NO_WORD_EDGE = "no word edge"


@dataclass(frozen=True, slots=True)
class Characters:
    """Any one of ``members``; none of them: nothing matches."""

    members: frozenset[str]


@dataclass(frozen=True, slots=True)
class Concatenation:
    """One part behind the other; without parts: the empty string."""

    parts: "tuple[Pattern, ...]"


@dataclass(frozen=True, slots=True)
class Alternation:
    options: "tuple[Pattern, ...]"


@dataclass(frozen=True, slots=True)
class Repeat:
    """``part`` at least ``minimum`` times and at most ``maximum`` times, None: any number."""

    part: "Pattern"
    minimum: int
    maximum: int | None


Pattern = Anchor | Characters | Concatenation | Alternation | Repeat

NOTHING = Concatenation(())
ANY_TEXT = Repeat(Characters(ALPHABET), 0, None)
DOT = Characters(frozenset("."))

_ANCHORS = {
    "A": Anchor.START,
    "Z": Anchor.END,
    "b": Anchor.WORD_EDGE,
    "B": Anchor.NO_WORD_EDGE,
}


def parse_pattern(text: str) -> Pattern:
    """The tree of ``text``, in time linear in its length.

    Raises:
        PatternRefused: it is no regular expression, or one that is not matched here.
    """
    parser = _Parser(text)
    pattern = parser.choice(nesting=0)
    if not parser.at_end:
        raise PatternRefused(f"a ')' without its '(' at character {parser.position}")
    return pattern


class _Parser:
    """Reads ``text`` from ``position`` on, by recursive descent."""

    def __init__(self, text: str) -> None:
        self.position = 0
        self._text = text

    @property
    def at_end(self) -> bool:
        return self.position == len(self._text)

    def choice(self, nesting: int) -> Pattern:
        if nesting > MAX_NESTING:
            raise PatternRefused(f"groups nested more than {MAX_NESTING} deep")
        options = [self._sequence(nesting)]
        while self._take("|"):
            options.append(self._sequence(nesting))
        return options[0] if len(options) == 1 else Alternation(tuple(options))

    def _sequence(self, nesting: int) -> Pattern:
        parts: list[Pattern] = []
        while not self.at_end and self._text[self.position] not in "|)":
            parts.append(self._repeated(nesting))
        return Concatenation(tuple(parts))

    def _repeated(self, nesting: int) -> Pattern:
        start = self.position
        part = self._part(nesting)
        counts = self._counts()
        if counts is None:
            return part
        if isinstance(part, Anchor):
            raise PatternRefused(f"a repetition of a mere condition at character {start}")
        self._take("?")
        start = self.position
        if self._counts() is not None:
            raise PatternRefused(f"a possessive or second repetition at character {start}")
        minimum, maximum = counts
        if maximum is not None and maximum < minimum:
            raise PatternRefused(f"a repetition of {minimum} to {maximum} times")
        return Repeat(part, minimum, maximum)

    def _counts(self) -> tuple[int, int | None] | None:
        """The repetition that stands here, and the position moves behind it; None: there is none.

        A brace that begins no repetition is a character to Python; here it is left to ``_part``,
        which refuses it, because it looks like a mistake.
        """
        if self.at_end:
            return None
        simple = _SIMPLE_COUNTS.get(self._text[self.position])
        if simple is not None:
            self.position += 1
            return simple
        match = _COUNTS.match(self._text, self.position)
        if match is None:
            return None
        self.position = match.end()
        lower, upper, exact = match.groups()
        if exact is not None:
            return int(exact), int(exact)
        return int(lower or 0), int(upper) if upper else None

    def _part(self, nesting: int) -> Pattern:
        character = self._next()
        match character:
            case "(":
                return self._group(nesting)
            case "[":
                return self._set()
            case ".":
                return Characters(ALPHABET)
            case "^":
                return Anchor.START
            case "$":
                return Anchor.END
            case "\\":
                escaped = self._next()
                return _ANCHORS.get(escaped) or Characters(_escaped(escaped))
            case "*" | "+" | "?" | "{":
                raise PatternRefused(
                    f"a {character!r} that repeats nothing at character {self.position - 1}"
                )
        return Characters(ALPHABET & {character})

    def _group(self, nesting: int) -> Pattern:
        start = self.position - 1
        if self._take("?") and not self._take(":"):
            kind = self._text[start : start + 3]
            raise PatternRefused(f"a group of the kind {kind!r}, expected ( or (?:")
        inside = self.choice(nesting + 1)
        if not self._take(")"):
            raise PatternRefused(f"a '(' without its ')' at character {start}")
        return inside

    def _set(self) -> Characters:
        start = self.position - 1
        is_negated = self._take("^")
        members: set[str] = set()
        is_first = True
        while is_first or not self._take("]"):
            is_first = False
            if self.at_end:
                raise PatternRefused(f"a '[' without its ']' at character {start}")
            low, low_members = self._member()
            is_range = (
                self._text.startswith("-", self.position)
                and self.position + 1 < len(self._text)
                and self._text[self.position + 1] != "]"
            )
            if not is_range:
                members |= low_members
                continue
            self.position += 1
            high, _ = self._member()
            if low is None or high is None or high < low:
                raise PatternRefused(f"a range without a begin and an end in the set at {start}")
            members |= {character for character in ALPHABET if low <= character <= high}
        return Characters(ALPHABET - members if is_negated else ALPHABET & members)

    def _member(self) -> tuple[str | None, frozenset[str]]:
        """One item of a set: the character, None for a class of them, and all that it means."""
        character = self._next()
        if character == "[" or (
            character in "-&~|" and self._text.startswith(character, self.position)
        ):
            # Python warns that these will mean operations on sets.
            raise PatternRefused(f"an unescaped {character!r} in a set")
        if character != "\\":
            return character, frozenset(character)
        escaped = self._next()
        return None if escaped in _CLASSES else escaped, _escaped(escaped)

    def _next(self) -> str:
        if self.at_end:
            raise PatternRefused("an end where a character must follow")
        self.position += 1
        return self._text[self.position - 1]

    def _take(self, expected: str) -> bool:
        """Moves behind ``expected`` if it stands here."""
        if not self._text.startswith(expected, self.position):
            return False
        self.position += len(expected)
        return True


def _escaped(character: str) -> frozenset[str]:
    """What a backslash before ``character`` means, beside the anchors."""
    if character in _CLASSES:
        return _CLASSES[character]
    if character in WORD_CHARACTERS - {"_"}:
        raise PatternRefused(
            f"the escape '\\{character}', expected one of \\d \\w \\s \\b or a sign"
        )
    return frozenset(character)
