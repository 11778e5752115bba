"""A pytest plugin: fewer parametrizations of each test, and none begun after a time.

pytest -p tools.gpu_checks.thinned_tests --thin --end-after 300 tests/engine/kernels
"""

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import pytest

_BEGIN_S = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("thinned tests")
    group.addoption(
        "--thin",
        action="store_true",
        help="of each test, only as many parametrizations as each value needs to occur once",
    )
    group.addoption(
        "--end-after",
        type=float,
        metavar="SECONDS",
        help="begin no test after this time; what has run is reported",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BEGIN_S] = time.monotonic()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("thin"):
        return
    kept = set(thinned(items))
    left_out = [item for item in items if item not in kept]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item in kept]


def pytest_runtest_teardown(item: pytest.Item) -> None:
    end_after_s = item.config.getoption("end_after")
    if end_after_s is not None:
        spent_s = time.monotonic() - item.config.stash[_BEGIN_S]
        if spent_s > end_after_s:
            item.session.shouldstop = f"after {spent_s:.0f} s"


def thinned(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """Of each test only as many parametrizations as each value needs to occur once."""
    functions: dict[object, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(getattr(item, "function", item), []).append(item)
    for group in functions.values():
        for index in covering([_choice(item) for item in group]):
            yield group[index]


def _choice(item: pytest.Item) -> dict[str, str]:
    """What each ``parametrize`` of a test has given this one: its names, and their values."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return {}
    found = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        listed = names.split(",") if isinstance(names, str) else list(names)
        values = [callspec.params[name.strip()] for name in listed]
        found[repr(names)] = repr(values)
    return found


def covering(choices: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Indices of a few ``choices`` in which every value of every parameter occurs.

    The next one is always the first of those with the most values that are still missing, among
    these with the values that were taken least, and among these with the pairs that have met least.
    """
    missing = {pair for choice in choices for pair in choice.items()}
    taken: Counter[tuple[str, Hashable]] = Counter()
    met: Counter[tuple[tuple[str, Hashable], ...]] = Counter()
    left = list(range(len(choices)))
    found: list[int] = []
    while left and (missing or not found):
        best = min(
            left,
            key=lambda index: (
                -len(missing & set(choices[index].items())),
                sum(taken[pair] for pair in choices[index].items()),
                sum(met[pairs] for pairs in combinations(choices[index].items(), 2)),
            ),
        )
        left.remove(best)
        found.append(best)
        missing -= set(choices[best].items())
        taken.update(choices[best].items())
        met.update(combinations(choices[best].items(), 2))
    return sorted(found)
