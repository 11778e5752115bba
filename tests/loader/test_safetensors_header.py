"""The tensor header is read with bounds, and a lie in it is named."""

import json
import os
import random
import resource
from pathlib import Path

import pytest

from ipc.errors import AdapterInvalid
from loader.safetensors_header import (
    MAX_HEADER_BYTES,
    FileTensor,
    TensorDType,
    parse_header,
    read_header,
)
from tests.adapters import base_model, random_tensors, raw_safetensors, safetensors_bytes


def read(path: Path, payload: bytes) -> tuple[FileTensor, ...]:
    path.write_bytes(payload)
    fd = os.open(path, os.O_RDONLY)
    try:
        return parse_header(read_header(fd, len(payload), "F"), len(payload), "F")
    finally:
        os.close(fd)


def tensor(
    begin: int = 0, end: int = 24, dtype: object = "F32", shape: object = None
) -> dict[str, object]:
    shape = [2, 3] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def peak_bytes() -> int:
    """The most memory that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refusal(header: object, data_bytes: int = 24) -> str:
    payload = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(AdapterInvalid) as caught:
        parse_header(payload, 8 + len(payload) + data_bytes, "F")
    return caught.value.message


def test_tensors_are_found_where_the_file_has_them(tmp_path: Path) -> None:
    header = {"b": tensor(0, 24), "a": tensor(24, 28, "BF16", [2])}
    first, second = read(tmp_path / "f", raw_safetensors(header, bytes(28)))
    data_start = (tmp_path / "f").stat().st_size - 28
    assert first == FileTensor("b", TensorDType.F32, (2, 3), data_start, 24)
    assert second == FileTensor("a", TensorDType.BF16, (2,), data_start + 24, 4)


def test_header_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    payload = (1000).to_bytes(8, "little") + b"{}"
    with pytest.raises(AdapterInvalid, match="claims 1000 bytes of a file of 10"):
        read(tmp_path / "f", payload)


def test_header_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    payload = (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}"
    with pytest.raises(AdapterInvalid, match=f"over {MAX_HEADER_BYTES}"):
        read(tmp_path / "f", payload)


def test_file_too_short_for_a_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="F has 3 bytes: too short"):
        read(tmp_path / "f", b"abc")


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    payload = raw_safetensors({"a": tensor()}, bytes(24))
    with pytest.raises(AdapterInvalid, match="bytes end at 24, but the file holds 23: it is cut"):
        read(tmp_path / "f", payload[:-1])


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        (b"[]", 0, "does not begin with '{'"),
        (b"{", 0, "is not valid JSON"),
        (b'{"a\xff": 1}', 0, "is not valid JSON"),
        (b'{"a":' * 100_000, 0, "nested too deeply"),
        (b'{"a": NaN}', 0, "NaN is not a number of JSON"),
        (b'{"a": {}, "a": {}}', 0, "the key 'a' stands there twice"),
        ({"a": 1}, 0, "tensor 'a': expected dtype, shape and data_offsets, got int"),
        ({"a": {"dtype": "F32"}}, 0, "expected dtype, shape and data_offsets, got ['dtype']"),
        ({"a": tensor() | {"x": 1}}, 24, "got ['data_offsets', 'dtype', 'shape', 'x']"),
        ({"a": tensor(dtype="F33")}, 24, "tensor 'a': unknown dtype 'F33'"),
        ({"a": tensor(dtype=["F32"])}, 24, "unknown dtype ['F32']"),
        ({"a": tensor(shape="23")}, 24, "shape is not a list: '23'"),
        ({"a": tensor(shape=[2, True])}, 24, "expected numbers of [0, 281474976710656], got True"),
        ({"a": tensor(shape=[-2, -3])}, 24, "got -2"),
        ({"a": tensor(shape=[1 << 60])}, 24, "got 1152921504606846976"),
        ({"a": tensor(shape=[1.5])}, 24, "got 1.5"),
        ({"a": tensor(shape=[1] * 9)}, 24, "9 dimensions, over 8"),
        ({"a": tensor(24, 0)}, 24, "end at 0, before they begin at 24"),
        ({"a": tensor(0, 20)}, 24, "F32 [2, 3] takes 24 bytes, its offsets span 20"),
        ({"a": {**tensor(), "data_offsets": [0]}}, 24, "data_offsets has 1 numbers, expected 2"),
        ({"a": tensor(), "b": tensor(20, 44)}, 44, "tensor 'b' overlaps the one before"),
        ({"a": tensor(), "b": tensor(28, 52)}, 52, "tensor 'b' leaves a gap before"),
        ({"a": tensor()}, 30, "its tensors end at byte"),
        ({"__metadata__": {"format": 1}}, 0, "'format' of __metadata__ is not a string: 1"),
        ({"__metadata__": []}, 0, "__metadata__ is not an object: []"),
    ],
)
def test_header_that_lies_is_refused(header: object, data_bytes: int, message: str) -> None:
    assert message in refusal(header, data_bytes)


def test_message_of_a_hostile_name_stays_short() -> None:
    assert len(refusal({"x" * 1_000_000: 1}, 0)) < 300


def test_mutated_files_are_read_or_refused_and_take_little_memory(tmp_path: Path) -> None:
    original = safetensors_bytes(random_tensors(base_model(num_layers=1)))
    header_bytes = 8 + int.from_bytes(original[:8], "little")
    seed = 20_240
    generator = random.Random(seed)
    num_read = 0
    before_bytes = peak_bytes()
    for _ in range(3_000):
        mutated = bytearray(original)
        for _ in range(generator.randint(1, 4)):
            position = generator.randrange(header_bytes)
            match generator.randrange(4):
                case 0:
                    mutated[position] = generator.randrange(256)
                case 1:
                    mutated[position] = generator.choice(b'0123456789{}[],:"')
                case 2:
                    del mutated[position : position + generator.randint(1, 16)]
                case 3:
                    mutated[position:position] = mutated[position : position + 16]
        try:
            read(tmp_path / "f", bytes(mutated))
            num_read += 1
        except AdapterInvalid as error:
            assert error.message, f"seed {seed}"
    assert peak_bytes() - before_bytes < 64 << 20
    assert num_read < 1_500, "the mutations hardly ever hit anything"


def test_worst_header_of_the_greatest_size_takes_bounded_memory() -> None:
    header = b'{"a":[' + b"[]," * (MAX_HEADER_BYTES // 3 - 8) + b"[]]}"
    assert len(header) <= MAX_HEADER_BYTES
    before_bytes = peak_bytes()
    assert "expected dtype" in refusal(header, 0)
    assert peak_bytes() - before_bytes < 256 << 20
