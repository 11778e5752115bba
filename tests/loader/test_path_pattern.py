"""Patterns mean what Python's ``re`` takes them for, and none takes long."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.path_automaton import Effort, PathAutomaton
from loader.path_pattern import ALPHABET, PatternRefused, parse_pattern

NUM_LAYERS = 128
PATHS = [
    f"model.layers.{layer}.{module}"
    for layer in range(NUM_LAYERS)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]

_CHARACTERS = ["a", "b", ".", "1", "_", "-", "é", r"\.", r"\d", r"\D", r"\w", r"\W", r"\s"]
_SETS = ["[a.]", "[^a]", "[a-b1]", r"[\d.]", r"[^\w]", "[]a]", "[a-]"]
_CONDITIONS = ["^", "$", r"\b", r"\B", r"\A", r"\Z", "()"]
_PARTS = st.sampled_from([*_CHARACTERS, *_SETS, *_CONDITIONS])
_REPETITIONS = st.sampled_from(
    ["*", "+", "?", "{2}", "{0}", "{1,2}", "{,2}", "{1,}", "{,}", "*?", "+?", "??", "{1,2}?"]
)


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        inner.map("({})".format),
        st.tuples(inner, _REPETITIONS).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


REGEXES = st.recursive(_PARTS, _larger, max_leaves=8)


def automaton(*texts: str) -> PathAutomaton:
    return PathAutomaton([parse_pattern(text) for text in texts], Effort())


@settings(max_examples=500, deadline=None)
@given(REGEXES, st.lists(st.text("ab.1_-", min_size=1, max_size=6), min_size=1, max_size=8))
def test_a_pattern_matches_what_it_matches_in_python(text: str, paths: list[str]) -> None:
    matcher = automaton(text)
    for path in paths:
        assert (matcher.first_match(path) == 0) == bool(re.fullmatch(text, path)), path


@pytest.mark.parametrize(
    "text", ["a$b", "a$", "b^a", "^ab", r"a\Zb", r"a\b.b", r"a\bb", r"a\B.?b", r"\Bab"]
)
@pytest.mark.parametrize("path", ["ab", "a", "a.b", "b"])
def test_a_condition_holds_where_it_holds_in_python(text: str, path: str) -> None:
    assert (automaton(text).first_match(path) == 0) == bool(re.fullmatch(text, path))


@settings(max_examples=200, deadline=None)
@given(st.lists(REGEXES, max_size=4), st.text("ab.1", min_size=1, max_size=4))
def test_the_first_of_several_patterns_is_the_first_that_matches(
    texts: list[str], path: str
) -> None:
    expected = next((i for i, text in enumerate(texts) if re.fullmatch(text, path)), None)
    assert automaton(*texts).first_match(path) == expected


@settings(max_examples=1_000, deadline=None)
@given(st.text("a.(){}[]|*+?^$\\d1,-:!", max_size=10))
def test_what_python_does_not_take_for_a_pattern_is_refused(text: str) -> None:
    try:
        parse_pattern(text)
    except PatternRefused:
        return
    re.compile(text)


@pytest.mark.parametrize("character", sorted(ALPHABET))
def test_an_escaped_character_is_itself_or_refused(character: str) -> None:
    try:
        matcher = automaton(rf"\{character}")
    except PatternRefused:
        assert character.isalnum()
    else:
        for other in ALPHABET:
            expected = bool(re.fullmatch(rf"\{character}", other))
            assert (matcher.first_match(other) == 0) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(a", "a '(' without its ')' at character 0"),
        ("a)", "a ')' without its '(' at character 1"),
        ("x[a", "a '[' without its ']' at character 1"),
        ("[b-a]", "a range without a begin and an end in the set at 0"),
        (r"[\d-z]", "a range without a begin and an end in the set at 0"),
        ("*a", "a '*' that repeats nothing at character 0"),
        ("a{x", "a '{' that repeats nothing at character 1"),
        ("^*", "a repetition of a mere condition at character 0"),
        ("a*+", "a possessive or second repetition at character 2"),
        ("a{3,2}", "a repetition of 3 to 2 times"),
        ("a{9999999}", "a '{' that repeats nothing at character 1"),
        ("a\\", "an end where a character must follow"),
        ("(?=a)", "a group of the kind '(?=', expected ( or (?:"),
        ("(?i)a", "a group of the kind '(?i', expected ( or (?:"),
        ("(?P<x>a)", "a group of the kind '(?P', expected ( or (?:"),
        (r"(a)\1", r"the escape '\1', expected one of \d \w \s \b or a sign"),
        ("[a[b]", "an unescaped '[' in a set"),
        ("[--a]", "an unescaped '-' in a set"),
        ("(" * 51 + ")" * 51, "groups nested more than 50 deep"),
        ("(" * 100_000, "groups nested more than 50 deep"),
    ],
)
def test_what_is_not_matched_here_is_said(text: str, message: str) -> None:
    with pytest.raises(PatternRefused) as caught:
        parse_pattern(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text", [r"(\w+\.?)+#", "(.*)*(.*)*(.*)*#", "(a|ab|b)*" * 9 + "#", "(x+x+)+y"]
)
def test_a_pattern_that_takes_re_for_ever_takes_few_steps(text: str) -> None:
    matcher = PathAutomaton([parse_pattern(text)], Effort(100_000))
    assert [matcher.first_match(path) for path in PATHS] == [None] * len(PATHS)


@pytest.mark.parametrize("text", ["((){9999}){9999}", "((.{0,60}){0,60}){0,60}", "(a{999}){999}"])
def test_a_pattern_too_large_to_be_built_is_refused(text: str) -> None:
    with pytest.raises(PatternRefused, match="it takes too long to match"):
        automaton(text)


def test_a_pattern_too_slow_to_be_matched_is_refused() -> None:
    matcher = automaton("|".join([".*"] * 5_000))
    with pytest.raises(PatternRefused, match="it takes too long to match"):
        for path in PATHS:
            matcher.first_match(path)


def test_ways_that_all_lead_to_one_place_are_counted() -> None:
    matcher = PathAutomaton([parse_pattern("(" + "|" * 1_000 + ")a")], Effort(10_500))
    with pytest.raises(PatternRefused, match="it takes too long to match"):
        matcher.first_match("a")


def test_patterns_share_one_effort() -> None:
    effort = Effort(100)
    PathAutomaton([parse_pattern("abcdefgh")], effort)
    with pytest.raises(PatternRefused):
        PathAutomaton([parse_pattern("abcdefghijklm")], effort)


def test_a_pattern_for_each_module_of_a_large_model_is_well_within_the_effort() -> None:
    effort = Effort(400_000)
    matcher = PathAutomaton([parse_pattern(path) for path in PATHS], effort)
    assert [matcher.first_match(path) for path in PATHS] == list(range(len(PATHS)))
