"""A load's events in the loader: their order, their names, and the arrows between them."""

import pytest

from ipc.messages import AdapterId, LoadId
from ipc.trace import Flow
from loader.load_trace import LoadTrace
from tests.trace_events import ListRecorder

FOLDER = "/adapters/shout"


def test_a_load_is_tied_to_the_read_that_it_follows_and_to_no_later_one() -> None:
    recorder = ListRecorder()
    trace = LoadTrace(recorder)
    trace.read(FOLDER, AdapterId(3), 100, 0.0, 1.0)
    trace.staged(LoadId(7), FOLDER, AdapterId(3), 0, (0, 60), 1.0, 2.0)
    trace.staged(LoadId(7), FOLDER, AdapterId(3), 1, (60, 100), 1.5, 2.5)
    # Evicted meanwhile, and back out of the host tier.
    trace.staged(LoadId(8), FOLDER, AdapterId(3), 0, (0, 60), 5.0, 6.0)
    assert [span[:2] for span in recorder.spans] == [
        ("read 1", "read shout"),
        ("ring chunk 0", "stage shout"),
        ("ring chunk 1", "stage shout"),
        ("ring chunk 0", "stage shout"),
    ]
    assert recorder.flows == [
        ("read 1", "read", 3, Flow.BEGIN),
        ("ring chunk 0", "read", 3, Flow.END),
        ("ring chunk 0", "load", 7, Flow.BEGIN),
        ("ring chunk 0", "load", 8, Flow.BEGIN),
    ]


@pytest.mark.parametrize(
    ("second", "track"), [((0.5, 2.0), "read 2"), ((1.0, 2.0), "read 1"), ((3.0, 4.0), "read 1")]
)
def test_only_reads_that_overlap_take_another_track(
    second: tuple[float, float], track: str
) -> None:
    recorder = ListRecorder()
    trace = LoadTrace(recorder)
    trace.read(FOLDER, AdapterId(1), 100, 0.0, 1.0)
    trace.read(FOLDER, AdapterId(2), 100, *second)
    assert recorder.spans[1][0] == track
