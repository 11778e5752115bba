"""Loads are put together from chunks, reads and first uses, each of them used once."""

import pytest

from tests.tools.timeline.traces import copy, one_load, one_load_with_groups, read, stage, step
from tools.timeline.loads import loads_of
from tools.trace_file import Trace


def test_a_load_has_its_read_its_chunks_and_its_first_use() -> None:
    trace = one_load()
    (load,) = loads_of(trace)
    assert (load.adapter, load.num_bytes) == ("shout", 100)
    assert load.read == trace.spans[1]
    assert load.staged == (trace.spans[2], trace.spans[5])
    assert load.copied == (trace.spans[3], trace.spans[6])
    assert load.first_use == trace.spans[7]
    assert load.way == (trace.spans[1], trace.spans[2], trace.spans[3], trace.spans[7])


def test_a_load_out_of_the_host_tier_has_no_read() -> None:
    again = (stage("shout", 3, 8, 0, 70, 71), copy("shout", 8, 0, 71, 72), step(80, 90))
    first, second = loads_of(Trace(one_load().spans + again, 0))
    assert first.read is not None
    assert (second.read, second.first_use) == (None, None)


def test_a_read_that_ends_after_the_last_chunk_belongs_to_a_later_load() -> None:
    again = (read("shout", 3, 65, 70), stage("shout", 3, 8, 0, 70, 71))
    first, second = loads_of(Trace(one_load().spans + again, 0))
    assert (first.read, second.read) == (one_load().spans[1], again[0])


def test_load_ids_that_a_restarted_engine_counts_anew_are_other_loads() -> None:
    again = (stage("json", 1, 7, 0, 70, 71), copy("json", 7, 0, 71, 73))
    loads = loads_of(Trace(one_load().spans + again, 0))
    assert [(load.adapter, load.num_bytes) for load in loads] == [("shout", 100), ("json", 50)]


def test_each_first_use_is_that_of_the_load_before_it() -> None:
    again = (
        stage("shout", 3, 8, 0, 70, 71),
        copy("shout", 8, 0, 71, 72),
        step(75, 80, "mixed", "json, shout"),
    )
    first, second = loads_of(Trace(again + one_load().spans, 0))
    assert first.first_use == one_load().spans[7]
    assert second.first_use == again[2]


def test_a_load_has_the_groups_of_its_prefill_that_began_before_its_end() -> None:
    trace = one_load_with_groups()
    (load,) = loads_of(trace)
    assert load.groups == (trace.spans[5],)
    assert load.beside_groups_s == pytest.approx(0.006)
    assert loads_of(one_load())[0].beside_groups_s == 0.0
    # The same adapter's next load has groups of its own.
    again = (stage("shout", 3, 8, 0, 40, 41), copy("shout", 8, 0, 41, 45))
    assert [each.groups for each in loads_of(Trace(trace.spans + again, 0))] == [load.groups, ()]
