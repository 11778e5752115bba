"""Reads JSON that somebody else wrote, without taking two meanings for one.

Stricter than the standard reader: a key that stands twice in one object, ``NaN`` and ``Infinity``
are errors, because two readers could disagree on what such a file says.
"""

import json
from collections import Counter
from typing import Any, NoReturn

from ipc.errors import AdapterInvalid


def parse(payload: bytes, where: str) -> Any:
    """The value that ``payload`` (UTF-8) spells; ``where`` names it in messages.

    Memory is bounded by the caller's bound on ``payload``; nesting by the interpreter's own.

    Raises:
        AdapterInvalid: the payload is not exactly one unambiguous JSON value.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            raise AdapterInvalid(f"{where}: the key {shorten(twice)} stands there twice")
        return result

    def refuse_constant(constant: str) -> NoReturn:
        raise AdapterInvalid(f"{where}: {constant} is not a number of JSON")

    try:
        return json.loads(
            payload.decode(), object_pairs_hook=unique, parse_constant=refuse_constant
        )
    except RecursionError:
        raise AdapterInvalid(f"{where}: its JSON is nested too deeply") from None
    except ValueError as error:
        raise AdapterInvalid(f"{where} is not valid JSON: {error}") from error


def shorten(value: object, max_characters: int = 80) -> str:
    """``value`` as a message may quote it: what a file says is not bounded, a message is."""
    text = repr(value)
    return text if len(text) <= max_characters else f"{text[:max_characters]}…"
