"""A queue that a thread can wait for beside sockets."""

import os
import weakref
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """Any thread puts, one takes. Its descriptor is readable once something was put."""

    def __init__(self) -> None:
        self._items: SimpleQueue[Item] = SimpleQueue()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not with the taking thread's end: somebody may put an item even after it.
        weakref.finalize(self, os.close, self._fd)

    def fileno(self) -> int:
        return self._fd

    def put(self, item: Item) -> None:
        """Does not wait."""
        self._items.put(item)
        os.eventfd_write(self._fd, 1)

    def acknowledge(self) -> None:
        """Makes a readable descriptor unreadable; call it before taking what was put."""
        os.eventfd_read(self._fd)

    def take(self) -> Item | None:
        """The oldest item; None if there is none. Does not wait, nor look at the descriptor."""
        # Nobody else takes; and an exception would cost more than all the rest.
        return None if self._items.empty() else self._items.get_nowait()
