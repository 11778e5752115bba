"""Pictures of hand-made measurements."""

import random
import struct
import sys
import zlib
from pathlib import Path

import msgspec
import pytest

from ipc.errors import InvalidRequest
from tests.tools.bench.records import bystander, measurement, planned, run_of
from tools.bench.plots import WIDTH_PX, draw, load_marks
from tools.bench.records import Measurement, Poll


def lively(name: str, seed: int, num_bystanders: int = 2) -> Measurement:
    rng = random.Random(seed)
    requests = [planned(number, number / 4, walk(rng, 5)) for number in range(40)]
    requests += [bystander(number, -0.1, walk(rng, 900)) for number in range(num_bystanders)]
    polls = [Poll(number / 10, number // 7, 0) for number in range(101)]
    return measurement(name, run_of(*requests, polls=polls))


def walk(rng: random.Random, count: int) -> list[float]:
    offsets_ms, at_ms = [], 50.0
    for _ in range(count):
        offsets_ms.append(at_ms)
        at_ms += rng.lognormvariate(2.0, 0.5)
    return offsets_ms


def pixels(path: Path) -> tuple[int, int, int]:
    """Width, height and number of different rows of a PNG file. Source: the PNG specification."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    place, packed, size = 8, b"", (0, 0)
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            size = struct.unpack_from(">II", content)
        elif kind == b"IDAT":
            packed += content
        place += length + 12
    raw = zlib.decompress(packed)
    stride = len(raw) // size[1]
    rows = {raw[begin : begin + stride] for begin in range(0, len(raw), stride)}
    return (*size, len(rows))


def test_latencies_and_bystanders_are_drawn(tmp_path: Path) -> None:
    paths = draw([lively("one", 1), lively("two", 2), lively("three", 3)], tmp_path / "new")
    assert [path.name for path in paths] == ["latency.png", "bystanders.png"]
    for path in paths:
        width, height, num_rows = pixels(path)
        assert width == WIDTH_PX
        assert height >= 500
        # A blank picture has rows that are all alike.
        assert num_rows > height / 2


def test_without_bystanders_there_is_no_picture_of_them(tmp_path: Path) -> None:
    (path,) = draw([lively("one", 1, num_bystanders=0)], tmp_path)
    assert path.name == "latency.png"
    assert not (tmp_path / "bystanders.png").exists()


def test_a_run_without_an_answer_is_drawn_as_such(tmp_path: Path) -> None:
    dead = measurement("dead", run_of(planned(0, 0.0, [], failure="connect")))
    (path,) = draw([dead], tmp_path)
    assert pixels(path)[0] == WIDTH_PX


def test_one_server_that_answered_is_drawn_beside_one_that_did_not(tmp_path: Path) -> None:
    dead = measurement("dead", run_of(planned(0, 0.0, [], failure="connect")))
    assert len(draw([dead, lively("one", 1)], tmp_path)) == 2


def test_a_load_is_marked_in_the_middle_of_the_polls_between_which_it_ended() -> None:
    polls = [Poll(-0.1, 2, 0), Poll(0.1, 3, 0), Poll(0.2, 3, 0), Poll(0.3, 5, 0), Poll(9.0, 6, 0)]
    done = measurement("one", run_of(planned(0, 0.0, [1.0]), polls=polls, duration_s=1.0))
    marks, meaning = load_marks(done)
    assert marks == pytest.approx([0.0, 0.25, 0.25])
    assert meaning == "3 adapter loads ended (counter polled every 0.1 s)"


def test_without_a_counter_the_first_requests_are_marked() -> None:
    done = measurement(
        "one",
        run_of(
            planned(0, 1.0, [1.0], adapter="a"),
            planned(1, 2.0, [1.0], adapter="b"),
            planned(2, 3.0, [1.0], adapter="a"),
            planned(3, 4.0, [1.0], adapter=None),
            msgspec.structs.replace(planned(4, 5.0, [], adapter="c"), sent_s=None),
        ),
    )
    assert load_marks(done) == ([1.0, 2.0], "2 adapters asked for the first time")


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidRequest) as caught:
        draw([lively("one", 1)], tmp_path)
    assert caught.value.message == "--plots needs matplotlib: pip install 'sidestream[bench]'"
