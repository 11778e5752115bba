"""Waits that are many and short are bounded by one timer."""

import asyncio

from api.patience import Patience
from tests.api.frontend import on_loop, until


@on_loop
async def test_a_wait_that_lasts_too_long_is_given_up_once() -> None:
    given_up: list[float] = []
    loop = asyncio.get_running_loop()
    patience = Patience(0.02, lambda: given_up.append(loop.time()))
    began_s = loop.time()
    patience.begin()
    await until(lambda: bool(given_up))
    assert given_up[0] - began_s >= 0.02
    assert len(given_up) == 1


@on_loop
async def test_the_time_of_a_wait_is_its_own_however_long_all_of_them_take() -> None:
    given_up: list[float] = []
    loop = asyncio.get_running_loop()
    patience = Patience(0.1, lambda: given_up.append(loop.time()))
    first_s = loop.time()
    while loop.time() < first_s + 0.15:
        patience.begin()
        await asyncio.sleep(0)
        patience.end()
    assert given_up == []
    last_s = loop.time()
    patience.begin()
    await until(lambda: bool(given_up))
    assert given_up[0] - last_s >= 0.1


@on_loop
async def test_nothing_is_given_up_after_the_end_of_a_wait_or_of_all() -> None:
    given_up: list[None] = []
    for over in (Patience.end, Patience.close):
        patience = Patience(0.005, lambda: given_up.append(None))
        patience.begin()
        over(patience)
    await asyncio.sleep(0.02)
    assert given_up == []
