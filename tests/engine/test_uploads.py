"""Memory that is used in a circle is written anew only when it has been read."""

from dataclasses import dataclass

import pytest

from engine.uploads import Circle


@dataclass
class Reading:
    """Somebody who reads bytes until the host waits for the end."""

    done: bool = False
    was_waited_for: bool = False

    def synchronize(self) -> None:
        self.done = self.was_waited_for = True

    def query(self) -> bool:
        return self.done


def take(circle: Circle, num_bytes: int) -> tuple[int, Reading]:
    start = circle.take(num_bytes)
    reading = Reading()
    circle.read_until(start, start + num_bytes, reading)
    return start, reading


def test_places_follow_one_another_and_nobody_waits_as_long_as_there_are_free_ones() -> None:
    circle = Circle(1024)
    taken = [take(circle, 200) for _ in range(4)]
    assert [start for start, _ in taken] == [0, 256, 512, 768]
    assert not any(reading.was_waited_for for _, reading in taken)


def test_a_place_that_is_being_read_is_waited_for_and_no_later_one() -> None:
    circle = Circle(1024)
    readings = [take(circle, 256)[1] for _ in range(4)]
    start, _ = take(circle, 300)
    assert start == 0
    assert [reading.was_waited_for for reading in readings] == [True, True, False, False]


def test_a_place_that_has_been_read_is_taken_without_waiting() -> None:
    circle = Circle(1024)
    readings = [take(circle, 512)[1] for _ in range(2)]
    readings[0].done = True
    assert take(circle, 512)[0] == 0
    assert not readings[0].was_waited_for and not readings[1].was_waited_for


def test_what_does_not_fit_before_the_end_begins_at_the_start() -> None:
    circle = Circle(1024)
    first = take(circle, 600)[1]
    assert take(circle, 600)[0] == 0
    assert first.was_waited_for


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(AssertionError):
        Circle(1024).take(1025)
