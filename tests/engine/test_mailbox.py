"""A queue that a thread can wait for beside sockets."""

import os
import select
import threading

import pytest

from engine.mailbox import Mailbox


def is_readable(mailbox: Mailbox[int]) -> bool:
    return bool(select.select([mailbox], [], [], 0)[0])


def test_items_are_taken_in_the_order_in_which_they_were_put() -> None:
    mailbox: Mailbox[int] = Mailbox()
    for number in range(3):
        mailbox.put(number)
    assert [mailbox.take() for _ in range(4)] == [0, 1, 2, None]


def test_the_descriptor_is_readable_from_a_put_to_its_acknowledgement() -> None:
    mailbox: Mailbox[int] = Mailbox()
    assert not is_readable(mailbox)
    mailbox.put(1)
    mailbox.put(2)
    assert is_readable(mailbox)
    mailbox.acknowledge()
    assert not is_readable(mailbox)
    assert mailbox.take() == 1


def test_what_is_put_behind_an_acknowledgement_is_told_again() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put(1)
    mailbox.acknowledge()
    mailbox.put(2)
    assert is_readable(mailbox)


def test_a_waiting_thread_is_woken() -> None:
    mailbox: Mailbox[int] = Mailbox()
    waiting = threading.Thread(target=lambda: select.select([mailbox], [], [], 10))
    waiting.start()
    mailbox.put(1)
    waiting.join(10)
    assert not waiting.is_alive()


def test_its_descriptor_goes_with_it() -> None:
    mailbox: Mailbox[int] = Mailbox()
    fd = mailbox.fileno()
    os.fstat(fd)
    del mailbox
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
