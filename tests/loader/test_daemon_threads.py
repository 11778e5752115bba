"""Work ends on the loop, or, where there is none any more, without a word."""

import asyncio
import threading

from ipc.errors import Internal, SidestreamError
from loader.daemon_threads import DaemonThreads

DEADLINE_S = 20.0


def test_defect_in_the_work_is_an_internal_error_of_it_alone() -> None:
    async def scenario() -> list[object]:
        threads = DaemonThreads("test", 1, asyncio.get_running_loop())
        threads.start()
        results: list[object] = []
        try:
            await threads.call(lambda: [][0])
        except SidestreamError as error:
            results.append(error)
        results.append(await threads.call(lambda: 7))
        threads.stop()
        return results

    failed, done = asyncio.run(scenario())
    assert isinstance(failed, Internal) and "list index out of range" in failed.message
    assert done == 7


def test_result_that_comes_after_the_loop_has_closed_is_dropped() -> None:
    loop = asyncio.new_event_loop()
    threads = DaemonThreads("test", 1, loop)
    threads.start()
    may_go, came_next = threading.Event(), threading.Event()
    results: list[object] = []
    threads.submit(lambda: may_go.wait(DEADLINE_S), results.append)
    loop.close()
    may_go.set()
    threads.submit(came_next.set, results.append)
    assert came_next.wait(DEADLINE_S)
    threads.stop()
    assert results == []
