"""Who stops running before its end, so that others go on: preempted for a block, paused for a slot.

When a decode finds no block, the running sequence that arrived last goes back to waiting and is
computed anew later; its place in the queue is still the one that it had. Before that, who does not
run gives its blocks: a job that waits for layers, then those that are paused.

Where adapters rotate and a sequence has waited too long for a slot, turns that have lasted are
ended (see ``engine.rotation``): their sequences are paused, and wait at the end of the line with
their blocks.
"""

import logging

from engine.block_manager import BlockManager
from engine.layer_jobs import LayerJobs
from engine.overdue import OverdueWaits
from engine.paused_sequences import PausedSequences
from engine.rotation import Rotation
from engine.running_sequences import RunningSequences
from engine.scheduler_stats import SchedulerStats
from engine.sequence import Sequence, SequenceState
from engine.waiting_queue import WaitingQueue

logger = logging.getLogger(__name__)


class Displacement:
    """Moves sequences from those that run back to those that wait. Owned by the step thread.

    ``rotation`` None: nobody is paused.
    """

    def __init__(
        self,
        waiting: WaitingQueue,
        running: RunningSequences,
        paused: PausedSequences,
        blocks: BlockManager,
        layer_jobs: LayerJobs,
        overdue: OverdueWaits,
        stats: SchedulerStats,
        rotation: Rotation | None,
    ) -> None:
        self._waiting = waiting
        self._running = running
        self._paused = paused
        self._blocks = blocks
        self._layer_jobs = layer_jobs
        self._overdue = overdue
        self._stats = stats
        self._rotation = rotation

    def extend(self, sequence: Sequence) -> bool:
        """Gets the block for one more token; False if the sequence itself had to make room."""
        while not self._blocks.extend(sequence):
            if self._layer_jobs.make_room() or self._paused.drop_last():
                continue
            last = self._running.last
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def rotate(self, now_s: float) -> bool:
        """Makes room for the first in line that has found none; False if that is in vain."""
        if self._rotation is None:
            return False
        first = self._overdue.first_blocked()
        ended = self._rotation.turns_to_end(first, self._waiting.adapters(), now_s)
        self._paused.stats.num_rotations += len(ended)
        for adapter_id in ended:
            # They had their chance while the turn lasted; before ``first`` they would keep the
            # slot. They come before those that are paused now when it is their turn again.
            self._waiting.send_back(adapter_id, self._waiting.first(first).place)
            for sequence in self._rotation.running(adapter_id):
                self._pause(sequence, now_s)
        return bool(ended)

    def _preempt(self, sequence: Sequence) -> None:
        logger.debug("request %s is preempted", sequence.request_id)
        self._running.stop(sequence)
        sequence.state = SequenceState.WAITING
        sequence.num_preemptions += 1
        self._stats.num_preemptions += 1
        self._waiting.add(sequence)

    def _pause(self, sequence: Sequence, now_s: float) -> None:
        logger.debug("request %s is paused", sequence.request_id)
        self._running.stop(sequence, keeps_blocks=True)
        self._paused.add(sequence, now_s)
        self._waiting.add_last(sequence)
