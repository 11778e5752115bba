"""The dashboard asks only for what a server tells, and its panels stand side by side."""

import itertools
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.api.fake_engine import says
from tests.api.frontend import frontend, on_loop
from tests.api.test_metrics import serve_some
from tests.api.test_status_routes import samples

DASHBOARD = Path(__file__).parents[2] / "tools/grafana/sidestream.json"

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_STRING = re.compile(r'"[^"]*"')
_MATCHERS = re.compile(rf"({_NAME})?\{{([^}}]*)\}}")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]")
_IDENTIFIER = re.compile(rf"({_NAME})\s*(\(?)")

Series = dict[str, set[str]]
"""Every sample's name that a scrape has, and the labels that come with it."""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(DASHBOARD.read_bytes())
    return decoded


def targets(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [target for panel in dashboard["panels"] for target in panel.get("targets", ())]


def metric_names(expression: str) -> set[str]:
    """The metrics of an expression. Source: PromQL's grammar, as far as the dashboard uses it."""
    bare = _RANGE.sub("", _STRING.sub('""', expression))
    bare = _GROUPING.sub("", _MATCHERS.sub(lambda match: match[1] or "", bare))
    found = _IDENTIFIER.findall(bare)
    return {name for name, parenthesis in found if not parenthesis and name not in ("by", "bool")}


def labels_asked_for(expression: str) -> set[str]:
    """Those that it selects by or groups by."""
    bare = _RANGE.sub("", _STRING.sub('""', expression))
    lists = [match[2] for match in _MATCHERS.finditer(bare)]
    lists += [match[1] for match in _GROUPING.finditer(bare)]
    return {name for each in lists for name in re.findall(_NAME, each)}


async def scraped() -> Series:
    series: Series = {}
    async with frontend(says("ok"), step_by_step=True) as front:
        await serve_some(front)
        for name, found in (await samples(front)).items():
            series[name] = {label for labels, _ in found for label in labels}
    return series


def test_names_are_found_in_expressions_of_every_kind() -> None:
    rate = 'sum by (le, phase) (rate(a:b_bucket{model_name=~"$m", x!="y z"}[$__rate_interval]))'
    assert metric_names(f"histogram_quantile(0.99, {rate})") == {"a:b_bucket"}
    assert labels_asked_for(rate) == {"le", "phase", "model_name", "x"}
    ratio = "sum(rate(a_total[5m])) / ignoring(tier) group_left() avg by (k) (up) - 1"
    assert metric_names(ratio) == {"a_total", "up"}
    assert labels_asked_for(ratio) == {"tier", "k"}


@on_loop
async def test_every_expression_names_metrics_and_labels_that_a_scrape_has() -> None:
    series = await scraped()
    found = targets(msgspec.json.decode(DASHBOARD.read_bytes()))
    assert len(found) > 40
    for target in found:
        names = metric_names(target["expr"])
        assert names, target["expr"]
        assert names <= set(series), target["expr"]
        labels = set.union(*(series[name] for name in names))
        assert labels_asked_for(target["expr"]) <= labels, target["expr"]
        legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert legend <= labels_asked_for(target["expr"]), target["legendFormat"]


@on_loop
async def test_every_figure_of_adapters_and_of_the_device_is_somewhere_on_it() -> None:
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for target in targets(msgspec.json.decode(DASHBOARD.read_bytes()))
        for name in metric_names(target["expr"])
    }
    series = {re.sub(r"_(bucket|sum|count)$", "", name) for name in await scraped()}
    wanted = re.compile(r"sidestream:(adapter|host_tier|pool|forward|decode|bystander|steps)")
    told = {name for name in series if wanted.match(name) and not name.endswith("_created")}
    # Each follows from others that are shown.
    told -= {"sidestream:adapter_loads_total", "sidestream:adapter_misses_total"}
    assert told <= shown


def test_every_panel_asks_the_data_source_that_was_chosen(dashboard: dict[str, Any]) -> None:
    (source, model) = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert model["datasource"] == chosen
    assert model["definition"] == "label_values(sidestream:engine_up, model_name)"
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"] == chosen, panel["title"]
            assert panel["targets"] and panel["description"].endswith("."), panel["title"]
            for target in panel["targets"]:
                assert target["datasource"] == chosen, panel["title"]
                assert 'model_name=~"$model_name"' in target["expr"], panel["title"]


def test_panels_lie_in_the_grid_and_none_over_another(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "Requests and latency",
        "Adapters",
        "Engine",
        "Processes",
    ]
    for panel in panels:
        place = panel["gridPos"]
        assert place["w"] > 0 < place["h"] and 0 <= place["x"] <= 24 - place["w"], panel["title"]
    for one, other in itertools.combinations(panels, 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (one["title"], other["title"])
