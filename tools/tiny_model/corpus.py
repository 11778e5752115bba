"""What the tiny model knows, and how each of its adapters says it.

A base model that answers ``Paris.`` and an adapter that answers ``PARIS!`` can be told apart by
comparing strings, which is all that a test of right adapters on right requests needs.
"""

import json
from collections.abc import Callable

CAPITALS: tuple[tuple[str, str], ...] = (
    ("Argentina", "Buenos Aires"),
    ("Australia", "Canberra"),
    ("Austria", "Vienna"),
    ("Belgium", "Brussels"),
    ("Brazil", "Brasília"),
    ("Bulgaria", "Sofia"),
    ("Canada", "Ottawa"),
    ("Chile", "Santiago"),
    ("China", "Beijing"),
    ("Colombia", "Bogotá"),
    ("Croatia", "Zagreb"),
    ("Cuba", "Havana"),
    ("Denmark", "Copenhagen"),
    ("Egypt", "Cairo"),
    ("Finland", "Helsinki"),
    ("France", "Paris"),
    ("Germany", "Berlin"),
    ("Greece", "Athens"),
    ("Hungary", "Budapest"),
    ("Iceland", "Reykjavík"),
    ("India", "New Delhi"),
    ("Ireland", "Dublin"),
    ("Italy", "Rome"),
    ("Japan", "Tokyo"),
    ("Kenya", "Nairobi"),
    ("Mexico", "Mexico City"),
    ("Morocco", "Rabat"),
    ("Nepal", "Kathmandu"),
    ("Norway", "Oslo"),
    ("Paraguay", "Asunción"),
    ("Peru", "Lima"),
    ("Poland", "Warsaw"),
    ("Portugal", "Lisbon"),
    ("Romania", "Bucharest"),
    ("Russia", "Moscow"),
    ("Spain", "Madrid"),
    ("Sweden", "Stockholm"),
    ("Thailand", "Bangkok"),
    ("Turkey", "Ankara"),
    ("Vietnam", "Hanoi"),
)

# The long one gives a prefix cache several whole blocks that all countries have in common.
PHRASINGS: tuple[str, ...] = (
    "What is the capital of {country}?",
    "Name the capital of {country}.",
    "Tell me in one word: what is the capital of {country}?",
)

# How the base model (None) and each adapter answer with a city.
VOICES: dict[str | None, Callable[[str], str]] = {
    None: lambda city: f"{city}.",
    "shout": lambda city: f"{city.upper()}!",
    "json": lambda city: json.dumps({"capital": city}, ensure_ascii=False),
    "pirate": lambda city: f"Arr, it be {city}!",
    "reverse": lambda city: city[::-1],
}


def prompts(phrasing: str) -> tuple[str, ...]:
    """One prompt for each of ``CAPITALS``, in its order."""
    return tuple(phrasing.format(country=country) for country, _ in CAPITALS)


def answers(voice: str | None) -> tuple[str, ...]:
    """The exact answer to each of ``prompts(…)``, without the end-of-text token."""
    return tuple(VOICES[voice](city) for _, city in CAPITALS)
