"""What the picture has: its lanes in order, its colours, and names that do not crowd it."""

import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from ipc.errors import InvalidRequest
from tests.tools.timeline.traces import copy, group, one_load, one_load_with_groups, stage, step
from tools.timeline.drawing import (
    MAX_LEGEND_ADAPTERS,
    WIDTH_PX,
    adapter_colors,
    draw,
    lanes_of,
    save,
)
from tools.timeline.figures import Window, whole
from tools.trace_file import Trace


def test_lanes_stand_in_the_order_in_which_an_adapter_comes_in() -> None:
    trace = one_load()
    axis = draw(trace, whole(trace), "title", ["a note"]).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "loader · read 1",
        "loader · ring chunk 0",
        "engine · load stream",
        "engine · forward stream",
    ]
    places = axis.get_yticks()
    assert list(places) == sorted(places, reverse=True)
    assert list(axis.get_xlim()) == pytest.approx([0, 60])
    assert axis.get_xlabel() == "time since the window's begin (ms)\n\na note"


def test_every_span_is_a_bar_in_the_colour_of_what_it_holds() -> None:
    trace = one_load()
    axis = draw(trace, whole(trace), "", []).axes[0]
    bars = [(bar.get_x(), bar.get_width(), to_hex(bar.get_facecolor())) for bar in axis.patches]  # type: ignore[attr-defined]
    assert len(bars) == len(trace.spans)
    colors = {round(begin_ms): color for begin_ms, _, color in bars}
    # Decode only; the mixed and the prefill step alike; the adapter on every lane.
    assert colors[0] != colors[14] == colors[42]
    assert colors[8] == colors[18] == colors[26] == adapter_colors(trace)["shout"].lower()
    assert bars[0][1] == pytest.approx(10)


def test_groups_lie_over_their_steps_in_their_adapters_colour_with_their_layers() -> None:
    trace = one_load_with_groups()
    axis = draw(trace, whole(trace), "", []).axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[-1] == "engine · forward stream" and len(labels) == 3
    colors = adapter_colors(trace)
    over = [bar for bar in axis.patches if bar.get_zorder() == 2]
    assert [to_hex(bar.get_facecolor()) for bar in over] == [colors["shout"].lower()] * 2
    assert {"0-3", "4-11"} <= {text.get_text() for text in axis.texts}


def test_a_group_of_the_base_model_is_a_prefill_and_no_adapter() -> None:
    trace = Trace((step(0, 9, "layers"), group("", "0-7", 0, 9)), 0)
    axis = draw(trace, whole(trace), "", []).axes[0]
    assert adapter_colors(trace) == {}
    assert len({to_hex(bar.get_facecolor()) for bar in axis.patches}) == 1


def test_lines_lead_from_station_to_station() -> None:
    trace = one_load()
    axis = draw(trace, whole(trace), "", []).axes[0]
    *ways, first_use = [line.get_xydata().tolist() for line in axis.lines]  # type: ignore[union-attr]
    assert [[round(at_ms) for at_ms, _ in way] for way in ways] == [[18, 18], [20, 20], [22, 42]]
    assert [[place for _, place in way] for way in ways] == [[0, -1], [-1, -2], [-2, -3]]
    assert [round(at_ms) for at_ms, _ in first_use] == [42]


def test_lanes_without_anything_in_the_window_are_left_out() -> None:
    lanes = lanes_of(one_load(), Window(0.045, 0.055))
    assert [lane.label for lane in lanes] == ["engine · forward stream"]


def test_colours_are_the_same_in_every_window_and_the_legend_is_bounded() -> None:
    names = [f"adapter-{number:02}" for number in range(30)]
    spans = [
        span
        for number, name in enumerate(names)
        for span in (
            stage(name, number, number, 0, number, number + 0.5),
            copy(name, number, 0, number + 0.5, number + 1),
        )
    ]
    trace = Trace((*spans, step(0, 40)), 0)
    figure = draw(trace, whole(trace), "", [])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text for text in texts if text in names] == names[:MAX_LEGEND_ADAPTERS]
    assert texts[-1] == "and 22 more adapters"
    bars = draw(trace, Window(0.020, 0.0205), "", []).axes[0].patches
    assert to_hex(bars[0].get_facecolor()) == adapter_colors(trace)[names[20]].lower()


def test_a_picture_that_can_not_be_written_is_told_by_its_path(tmp_path: Path) -> None:
    trace = one_load()
    figure = draw(trace, whole(trace), "", [])
    with pytest.raises(InvalidRequest, match=r"--out: expected .* got .*/none/a\.png: No such"):
        save(figure, tmp_path / "none" / "a.png")


def test_the_file_is_a_png_of_the_stated_width(tmp_path: Path) -> None:
    trace, path = one_load(), tmp_path / "a.png"
    save(draw(trace, whole(trace), "", []), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(data[16:20]) == WIDTH_PX


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidRequest, match=r"needs matplotlib: pip install 'sidestream\[bench\]"):
        draw(one_load(), Window(0, 1), "", [])
