"""What msgspec says of a wrong field, as a sentence that begins with the field's name."""

import re
from collections.abc import Callable

import msgspec

from ipc.errors import InvalidRequest

# How much of a wrong value is repeated.
_SHOWN_CHARS = 80

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
_STEP = re.compile(r"\[(?P<place>\d+)\]|\.?(?P<key>[^.\[\]]+)")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")


def field_error(
    error: msgspec.ValidationError, whole: str, got: Callable[[str], str]
) -> InvalidRequest:
    """From ``Expected `int`, got `str` - at `$.n` `` to ``n: expected `int`, got `str` ``.

    ``whole`` is what the field is one of. ``got(path)`` is the text of the value at ``path``, for
    where msgspec tells only what it expected; empty where there is none.
    """
    message = str(error)
    match = _PATH.search(message)
    path = match["path"] if match else ""
    problem = _PATH.sub("", message)
    missing = _MISSING.match(problem)
    if missing is not None:
        path = f"{path}.{missing['field']}" if path else missing["field"]
        return InvalidRequest(f"{path}: this field is required", param=path)
    problem = problem[:1].lower() + problem[1:]
    if ", got " not in problem and path:
        value = got(path)
        problem += f", got {value}" if value else ""
    # What stands at a key of an object is said to be at [...].
    path = path.removesuffix("[...]")
    return InvalidRequest(f"{path or whole}: {problem}", param=path or None)


def value_at(document: object, path: str) -> object:
    """The value at msgspec's ``path``. Raises ``LookupError`` or ``TypeError`` without one."""
    value = document
    for step in _STEP.finditer(path):
        if step["place"] is None:
            if not isinstance(value, dict):
                raise TypeError(f"expected an object at {step['key']}")
            value = value[step["key"]]
        else:
            if not isinstance(value, list | tuple):
                raise TypeError(f"expected an array at [{step['place']}]")
            value = value[int(step["place"])]
    return value


def shorten(text: str) -> str:
    """``text``, cut where it is too long to be repeated."""
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."
