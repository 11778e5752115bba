"""Writes what ``ipc/RPC.md`` takes from the code: every message's fields, and an example.

python -m tools.rpc_reference
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import NODEFAULT, UNSET, inspect

from ipc.messages import (
    CallId,
    ClientMessage,
    Connect,
    EngineMessage,
    Epoch,
    FinishReason,
    Generate,
    RequestId,
    SamplingParams,
    StepOutputs,
    TokenDelta,
    Welcome,
)
from tools.marked_text import replace_section

DOCUMENT = Path(__file__).parent.parent / "ipc" / "RPC.md"

# Docstrings write the plural of a name with the ``s`` apart.
_PLURAL = re.compile(r"`` s\b")

EXAMPLE: tuple[ClientMessage | EngineMessage, ...] = (
    Connect(CallId(1)),
    Welcome(CallId(1), Epoch(1), "LlamaForCausalLM", 128_256, 8_192, 20, (128_009,), 5_000),
    Generate(
        RequestId("r1"),
        [128_000, 9_906],
        SamplingParams(max_tokens=2, temperature=0.0),
        adapter="sql",
        credits=64,
        deadline_ms=30_000,
    ),
    StepOutputs([TokenDelta(RequestId("r1"), [1_917])]),
    StepOutputs([TokenDelta(RequestId("r1"), [0], finish_reason=FinishReason.LENGTH)]),
)


def written_document(text: str) -> str:
    """``text`` of the document with its sections as the code has them now."""
    text = replace_section(text, "example", _example())
    return replace_section(text, "messages", _messages())


def _example() -> str:
    lines = ["```"]
    client_types = ClientMessage.__args__
    for message in EXAMPLE:
        arrow = ">" if isinstance(message, client_types) else "<"
        payload = msgspec.msgpack.encode(message)
        lines += [f"{arrow} {payload.hex()}", f"  {msgspec.json.encode(message).decode()}"]
    return "\n".join([*lines, "```"])


def _messages() -> str:
    parts = ["### From the client", *_tables(ClientMessage), "### From the engine"]
    parts += _tables(EngineMessage)
    parts += ["### Within messages", *(_table(kind) for kind in _inner_types())]
    return "\n\n".join(parts)


def _tables(union: Any) -> Iterator[str]:
    return (_table(inspect.type_info(kind)) for kind in union.__args__)


def _table(kind: Any) -> str:
    title = f"`{kind.tag}`" if kind.tag else f"{kind.cls.__name__}"
    if kind.array_like:
        title += " (an array of its fields, in this order)"
    meaning = _PLURAL.sub("``", kind.cls.__doc__ or "").replace("``", "`")
    head = f"**{title}**: {' '.join(meaning.split())}"
    if not kind.fields:
        return head
    # Of an array the order is what tells fields apart; of a map it may as well help the reader.
    fields = kind.fields if kind.array_like else sorted(kind.fields, key=lambda f: not f.required)
    rows = (
        f"| `{field.encode_name}` | {_type_name(field.type)} | {_default(field)} |"
        for field in fields
    )
    return "\n".join([head, "", "| field | type | default |", "|---|---|---|", *rows])


def _default(field: inspect.Field) -> str:
    if field.required:
        return "required"
    value = field.default
    if value is NODEFAULT:
        value = field.default_factory() if callable(field.default_factory) else UNSET
    return "`nil`" if value is None else f"`{msgspec.json.encode(value).decode()}`"


def _type_name(kind: Any) -> str:
    match kind:
        case inspect.UnionType(types):
            return " or ".join(_type_name(each) for each in types)
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return f"array of {_type_name(item)}"
        case inspect.TupleType(item_types=items):
            return f"array of {', '.join(map(_type_name, items))}"
        case inspect.DictType(key_type=key, value_type=value):
            return f"map of {_type_name(key)} to {_type_name(value)}"
        case inspect.EnumType(cls=cls):
            return " or ".join(f'`"{member.value}"`' for member in cls)
        case inspect.StructType(cls=cls):
            return str(cls.__name__)
        case inspect.IntType(ge=low, le=high):
            return "int" if low is None else f"int of [{low}, {high}]"
        case inspect.StrType(pattern=pattern) if pattern is not None:
            return f"str `{pattern}`"
        case inspect.StrType(min_length=low, max_length=high) if high is not None:
            return f"str of [{low}, {high}] characters"
        case inspect.NoneType():
            return "nil"
        case _:
            return type(kind).__name__.removesuffix("Type").lower()


def _inner_types() -> list[inspect.StructType]:
    """What messages are made of, in the order in which it is first met."""
    found: dict[type, inspect.StructType] = {}
    outer = set((ClientMessage | EngineMessage).__args__)

    def walk(kinds: Iterable[Any]) -> None:
        for kind in kinds:
            match kind:
                case inspect.StructType(cls=cls, fields=fields):
                    if cls not in outer and cls not in found:
                        found[cls] = kind
                    if cls in outer or found.get(cls) is kind:
                        walk(field.type for field in fields)
                case inspect.UnionType(types):
                    walk(types)
                case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
                    walk([item])
                case _:
                    pass

    walk(inspect.type_info(kind) for kind in (ClientMessage | EngineMessage).__args__)
    return list(found.values())


def main() -> None:
    DOCUMENT.write_text(written_document(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
