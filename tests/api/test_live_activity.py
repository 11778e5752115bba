"""However many look, the engine is asked now and then."""

import asyncio
from typing import cast

from api.live_activity import SHARED_S, LiveActivity
from ipc.errors import Unavailable
from ipc.messages import Activity
from tests.api.frontend import on_loop


class Engine:
    """Answers with something new each time, or not at all while it is ``away``."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_asked = 0
        self.away = False
        self.activity = LiveActivity(self.ask, lambda: self.now_s)

    async def ask(self) -> Activity:
        self.num_asked += 1
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("away")
        return cast(Activity, object())


@on_loop
async def test_all_who_look_at_the_same_time_share_one_answer() -> None:
    engine = Engine()
    seen = await asyncio.gather(*(engine.activity.look() for _ in range(20)))
    assert engine.num_asked == 1 and len({id(each.activity) for each in seen}) == 1
    engine.now_s = SHARED_S
    assert (await engine.activity.look()).activity is not seen[0].activity
    assert engine.num_asked == 2


@on_loop
async def test_an_engine_that_is_away_is_not_asked_by_each_in_turn_and_is_asked_again() -> None:
    engine = Engine()
    engine.away = True
    seen = await asyncio.gather(*(engine.activity.look() for _ in range(20)))
    assert engine.num_asked == 1
    assert {(each.activity, each.reason) for each in seen} == {(None, "away")}
    engine.away, engine.now_s = False, SHARED_S
    assert (await engine.activity.look()).reason is None


@on_loop
async def test_whoever_leaves_while_the_engine_is_asked_leaves_the_others_their_answer() -> None:
    engine = Engine()
    first = asyncio.create_task(engine.activity.look())
    second = asyncio.create_task(engine.activity.look())
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).activity is not None
