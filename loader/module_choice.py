r"""Which modules the fields of a PEFT configuration mean, as PEFT itself would decide.

A module is given by its path from the base model's root: ``model.layers.3.self_attn.q_proj``.

Source: ``check_target_module_exists``, ``match_target_against_key`` and ``get_pattern_key`` of
PEFT 0.21. A name means every module whose path is it or ends with it behind a dot. A pattern of
``target_modules`` and ``exclude_modules`` must match the whole path, one of ``rank_pattern`` and
``alpha_pattern`` the path or its end behind a dot: ``(.*\.)?(pattern)$``. Those of
``layers_pattern`` stand between such a begin and the layer's index: ``(^|.*\.)pattern\.(\d+)\.``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ipc.errors import AdapterInvalid
from loader.path_automaton import Effort, PathAutomaton
from loader.path_pattern import (
    ANY_TEXT,
    DOT,
    NOTHING,
    Alternation,
    Concatenation,
    Pattern,
    PatternRefused,
    Repeat,
    parse_pattern,
)
from loader.strict_json import shorten

Value = TypeVar("Value")

_BEGIN_OF_PATH = Repeat(Concatenation((ANY_TEXT, DOT)), 0, 1)
_LAYER_INDEX = parse_pattern(r"\.\d+\..*")


class ModuleChoice(Protocol):
    """A choice among all modules; printed as the configuration has it."""

    def includes(self, path: str) -> bool:
        """Raises ``AdapterInvalid`` where that takes too long to tell."""


@dataclass(frozen=True)
class NamedModules:
    """Modules by their names, or by their paths or the ends of these."""

    names: frozenset[str]

    def includes(self, path: str) -> bool:
        return path in self.names or any(end in self.names for end in _ends(path))

    def has_path(self, path: str) -> bool:
        """Whether the module is given by its whole path, so that its layer does not matter."""
        return path in self.names

    def __str__(self) -> str:
        return shorten(sorted(self.names))


class FieldPatterns:
    """The patterns of one field, asked which of them is the first to match a path.

    Raises:
        AdapterInvalid: one can not be matched, or all of them take too long; the field is named.
    """

    def __init__(
        self,
        where: str,
        name: str,
        texts: Sequence[str],
        effort: Effort,
        prefix: Pattern = NOTHING,
        suffix: Pattern = NOTHING,
    ) -> None:
        self._where = where
        self._name = name
        try:
            effort.spend(sum(map(len, texts)))
            patterns = [self._parse(text, suffix) for text in texts]
            self._automaton = PathAutomaton(patterns, effort, prefix)
        except PatternRefused as error:
            raise self._refusal(str(error)) from error

    def first_match(self, path: str) -> int | None:
        """The index of the first pattern that matches."""
        try:
            return self._automaton.first_match(path)
        except PatternRefused as error:
            raise self._refusal(str(error)) from error

    def _parse(self, text: str, suffix: Pattern) -> Pattern:
        try:
            pattern = parse_pattern(text)
        except PatternRefused as error:
            raise self._refusal(f"{shorten(text)} has {error}") from error
        if suffix is NOTHING:
            return pattern
        if isinstance(pattern, Alternation):
            # PEFT puts no group around it, so that its last option alone would go on in the suffix.
            raise self._refusal(f"{shorten(text)} has a '|' outside of a group")
        return Concatenation((pattern, suffix))

    def _refusal(self, why: str) -> AdapterInvalid:
        return AdapterInvalid(
            f"{self._where}: {self._name}: this regular expression can not be served: {why}",
            param=self._name,
        )


@dataclass(frozen=True)
class MatchedModules:
    """Modules whose whole path the pattern ``text`` matches."""

    text: str
    _patterns: FieldPatterns = field(repr=False, compare=False)

    @classmethod
    def of(cls, where: str, name: str, text: str, effort: Effort) -> "MatchedModules":
        """Those of field ``name``. Raises ``AdapterInvalid``."""
        return cls(text, FieldPatterns(where, name, (text,), effort))

    def includes(self, path: str) -> bool:
        return self._patterns.first_match(path) is not None

    def __str__(self) -> str:
        return shorten(self.text)


@dataclass(frozen=True)
class LayerChoice:
    """The layers of ``layers_to_transform``, counted in what ``layers_pattern`` names.

    Without ``layers_pattern`` all layers are counted alike.
    """

    indices: frozenset[int]
    layers_patterns: tuple[str, ...]
    _patterns: FieldPatterns = field(repr=False, compare=False)

    @classmethod
    def of(
        cls, where: str, indices: frozenset[int], texts: tuple[str, ...], effort: Effort
    ) -> "LayerChoice":
        """Raises ``AdapterInvalid``."""
        patterns = FieldPatterns(
            where, "layers_pattern", texts, effort, _BEGIN_OF_PATH, _LAYER_INDEX
        )
        return cls(indices, texts, patterns)

    def includes(self, path: str, layer: int) -> bool:
        """Whether the module at ``path``, of decoder layer ``layer``, is of a chosen layer."""
        if layer not in self.indices:
            return False
        return not self.layers_patterns or self._patterns.first_match(path) is not None


@dataclass(frozen=True)
class PatternTable(Generic[Value]):
    """Values by patterns of paths; the first that matches counts."""

    values: tuple[tuple[str, Value], ...]
    _patterns: FieldPatterns = field(repr=False, compare=False)

    @classmethod
    def of(
        cls, where: str, name: str, values: Mapping[str, Value], effort: Effort
    ) -> "PatternTable[Value]":
        """That of field ``name``. Raises ``AdapterInvalid``."""
        patterns = FieldPatterns(where, name, tuple(values), effort, _BEGIN_OF_PATH)
        return cls(tuple(values.items()), patterns)

    def get(self, path: str, default: Value) -> Value:
        """The value for the module at ``path``. Raises ``AdapterInvalid``."""
        # Most adapters have one rank and one alpha.
        index = self._patterns.first_match(path) if self.values else None
        return default if index is None else self.values[index][1]


def _ends(path: str) -> list[str]:
    """What follows each dot of a path."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]
