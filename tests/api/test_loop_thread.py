"""A loop on a thread: interrupted while it opens, and forked off in the worst moment."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator, Coroutine
from types import TracebackType
from typing import Any

import pytest

from api.loop_thread import LoopThread
from tests.api.frontend import DEADLINE_S


class NeverOpen:
    """Entering it interrupts the program, as Ctrl-C does, and does not end by itself."""

    was_given_up = False

    async def __aenter__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.was_given_up = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        raise AssertionError("it was never entered")


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_it_opens_gives_up_and_leaves_no_thread() -> None:
    before = threading.active_count()
    never_open = NeverOpen()
    with pytest.raises(KeyboardInterrupt):
        LoopThread(never_open, "never-open")
    assert never_open.was_given_up
    assert threading.active_count() == before


def test_what_opening_raises_is_raised_and_leaves_no_thread() -> None:
    @contextlib.asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise LookupError("broken")
        yield

    before = threading.active_count()
    with pytest.raises(LookupError, match="broken"):
        LoopThread(broken(), "broken")
    assert threading.active_count() == before


async def nothing() -> None:
    """A call that ends at once."""


def _use(loop: LoopThread[None], answers: "multiprocessing.Queue[str]") -> None:
    try:
        loop.run(lambda _: nothing())
    except RuntimeError as error:
        answers.put(str(error))
    loop.post(lambda _: nothing())
    loop.close()


# From Python 3.12 on a fork beside threads is warned of; that it goes well is what is tried here.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_while_a_call_is_handed_over_is_told_and_not_held_up() -> None:
    forking = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[str] = forking.Queue()
    loop: LoopThread[None] = LoopThread(contextlib.nullcontext(), "loop")
    child = forking.Process(target=_use, args=(loop, answers))

    def fork(_: None) -> Coroutine[Any, Any, None]:
        child.start()
        return nothing()

    loop.run(fork)
    try:
        assert "before it forked" in answers.get(timeout=DEADLINE_S)
        child.join(DEADLINE_S)
        assert child.exitcode == 0
    finally:
        child.kill()
        loop.close()
