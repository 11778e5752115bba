import random

from engine.sequence import Sequence
from engine.waiting_queue import WaitingQueue
from ipc.messages import AdapterId
from tests.engine.builders import make_sequence


def _fill(*adapter_ids: int | None) -> tuple[WaitingQueue, list[Sequence]]:
    queue = WaitingQueue()
    sequences = [make_sequence(i, [1], adapter_id) for i, adapter_id in enumerate(adapter_ids)]
    for sequence in sequences:
        queue.add(sequence)
    return queue, sequences


def test_adapters_come_in_the_order_of_their_earliest_sequence() -> None:
    queue, sequences = _fill(None, 5, 3, 5, 4)
    assert queue.adapters() == (5, 3, 4)
    queue.remove(sequences[1])
    assert queue.adapters() == (3, 5, 4)
    assert queue.remove_all(AdapterId(3)) == [sequences[2]]
    assert queue.adapters() == (5, 4)


def test_a_sequence_that_comes_back_stands_where_its_arrival_puts_it() -> None:
    queue, sequences = _fill(1, 2, 1)
    queue.remove(sequences[0])
    assert queue.adapters() == (2, 1)
    queue.add(sequences[0])
    assert queue.adapters() == (1, 2)
    assert queue.first(AdapterId(1)) is sequences[0]


def test_admissible_sequences_come_in_order_of_arrival_over_all_adapters() -> None:
    queue, sequences = _fill(2, None, 1, 2, 3, None)
    taken = []
    for sequence in queue.admissible(lambda sequence: sequence.adapter_id != 1):
        queue.remove(sequence)
        taken.append(sequence)
    assert taken == [sequences[i] for i in (0, 1, 3, 4, 5)]
    assert len(queue) == 1


def test_the_queue_agrees_with_a_sorted_list_under_random_use(rng: random.Random) -> None:
    queue, sequences = _fill(*[rng.choice((None, 1, 2, 3)) for _ in range(60)])
    waiting = set(sequences)
    for _ in range(2000):
        sequence = rng.choice(sequences)
        if sequence in waiting:
            waiting.discard(sequence)
            queue.remove(sequence)
        else:
            waiting.add(sequence)
            queue.add(sequence)
        in_order = sorted(waiting, key=lambda sequence: sequence.sequence_id)
        adapters = dict.fromkeys(s.adapter_id for s in in_order if s.adapter_id is not None)
        assert queue.adapters() == tuple(adapters)
        assert len(queue) == len(waiting)


def test_who_goes_to_the_end_of_the_line_stands_before_all_that_come_later() -> None:
    queue, sequences = _fill(1, 2, 3)
    for first in sequences[:2]:
        queue.remove(first)
        queue.add_last(first)
    newcomer = make_sequence(3, [1], 4)
    queue.add(newcomer)
    assert queue.adapters() == (3, 1, 2, 4)


def test_only_those_before_a_place_are_sent_back_and_keep_their_order() -> None:
    queue, sequences = _fill(1, 1, 2, 1)
    queue.send_back(AdapterId(1), behind=sequences[2].place)
    assert queue.adapters() == (2, 1)
    assert queue.waiting_for(AdapterId(1)) == [sequences[3], sequences[0], sequences[1]]
