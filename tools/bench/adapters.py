"""Random adapters for servers under measurement."""

from collections.abc import Sequence
from pathlib import Path

from ipc.errors import InvalidRequest


def adapter_names(rank_counts: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
    """``(name, rank)`` of each adapter; ranks take turns, so that popularity favours none.

    Names are in alphabetical order, as workloads number adapters.
    """
    left = [[rank] * count for rank, count in rank_counts]
    ranks: list[int] = []
    while any(left):
        ranks += [group.pop() for group in left if group]
    digits = max(3, len(str(len(ranks) - 1)))
    return [(f"lora-{number:0{digits}d}-r{rank}", rank) for number, rank in enumerate(ranks)]


def make_adapters(folder: Path, model: Path, rank_counts: Sequence[tuple[int, int]]) -> list[str]:
    """Writes adapters of ``model``'s shape into ``folder``; their names.

    All adapters of a rank are hard links to one adapter's files: names of their own to a server,
    and the room of one on the disk and in the page cache.

    Raises:
        InvalidRequest: ``folder`` holds something, or ``model`` is no model.
    """
    # These bring torch along, which no other part of the bench needs.
    from tools.shapes import link_adapters, write_adapter

    if folder.exists() and any(folder.iterdir()):
        raise InvalidRequest(f"--make-adapters: expected an empty folder, got {folder}")
    names = adapter_names(rank_counts)
    for rank in dict.fromkeys(rank for rank, _ in rank_counts):
        first, *others = [name for name, of_rank in names if of_rank == rank]
        source = write_adapter(folder / first, model, rank, seed=rank)
        link_adapters(source, folder, others)
    return [name for name, _ in names]
