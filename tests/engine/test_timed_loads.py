"""First tokens of ``--adapter-loading layerwise`` come no later than those of ``overlap``."""

import pytest

from engine.config import AdapterLoading
from tests.engine.timed_loads import TimedLoads

ONE, FOUR_ADAPTERS, THREE_OF_ONE = (1,), (1, 2, 3, 4), (1, 1, 1)


@pytest.mark.parametrize("load_ms", [1.5, 24.0])
@pytest.mark.parametrize("num_tokens", [64, 1024, 2048])
@pytest.mark.parametrize("num_decodes", [0, 8])
@pytest.mark.parametrize("adapters", [ONE, FOUR_ADAPTERS, THREE_OF_ONE])
def test_first_tokens_come_no_later_than_with_overlap(
    adapters: tuple[int, ...], num_decodes: int, num_tokens: int, load_ms: float
) -> None:
    arguments = (adapters, num_decodes, num_tokens, load_ms)
    overlap = first_tokens_ms(AdapterLoading.OVERLAP, *arguments)
    layerwise = first_tokens_ms(AdapterLoading.LAYERWISE, *arguments)
    assert sum(layerwise) <= 1.03 * sum(overlap)
    for ours, theirs in zip(sorted(layerwise), sorted(overlap), strict=True):
        assert ours <= 1.03 * theirs


@pytest.mark.parametrize("num_decodes", [0, 8])
def test_a_cold_requests_pass_is_hidden_behind_its_load(num_decodes: int) -> None:
    overlap, layerwise = (
        first_tokens_ms(mode, ONE, num_decodes, 1024, 24.0)[0]
        for mode in (AdapterLoading.OVERLAP, AdapterLoading.LAYERWISE)
    )
    assert layerwise < 0.65 * overlap


def first_tokens_ms(
    mode: AdapterLoading,
    adapters: tuple[int, ...],
    num_decodes: int,
    num_tokens: int,
    load_ms: float,
) -> list[float]:
    """Requests of so many tokens, one for each of ``adapters``, arrive beside so many decodes."""
    machine = TimedLoads(mode, load_ms)
    for _ in range(num_decodes):
        machine.ask(None, 16, max_tokens=6000)
    if num_decodes:
        machine.run_for(100.0)
    begin_ms = machine.now_ms
    requests = [machine.ask(adapter_id, num_tokens) for adapter_id in adapters]
    return [at_ms - begin_ms for at_ms in machine.run_until_first_tokens(requests)]
