"""Which KV blocks belong to whom: reference counts, a free list, and the prefix cache.

A block holds the keys and values of ``block_size`` tokens through all layers. Blocks are known by
index; the tensors are the runner's affair.

| block is         | references | published | left by                                          |
|------------------|------------|-----------|--------------------------------------------------|
| blank            | 0          | no        | handed to a sequence: held                       |
| held             | ≥ 1        | no        | ``publish``: shared; last release: blank         |
| shared           | ≥ 1        | yes       | last release: cached; ``forget_adapter``: held   |
| cached           | 0          | yes       | found again: shared; evicted: held; forgotten: blank |

Blank blocks are handed out first, then cached ones, least recently used first.
"""

from array import array
from collections import OrderedDict
from hashlib import blake2b

from engine.sequence import Sequence
from ipc.errors import Internal
from ipc.messages import AdapterId

_KEY_BYTES = 32


class BlockManager:
    """Owns the bookkeeping of ``num_blocks`` KV blocks and every sequence's ``block_table``.

    A full block is published under a key that chains over all tokens up to its end. The key is a
    256-bit BLAKE2b digest: unlike Python's 64-bit hash nobody can make two prompts collide, and
    unlike the tokens themselves it is small enough to be kept with a sequence, so that no token
    is hashed twice. Keys are kept per adapter: no digest can lead from one adapter to another.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = enable_prefix_caching
        self._num_references = [0] * num_blocks
        self._published_as: list[tuple[AdapterId | None, bytes] | None] = [None] * num_blocks
        self._published: dict[AdapterId | None, dict[bytes, int]] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, cached ones among them."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence refers to."""
        return self.num_blocks - self.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens of one sequence lie in."""
        return -(-num_tokens // self.block_size)

    def can_admit(self, sequence: Sequence, num_spare: int) -> bool:
        """What ``admit`` would answer; changes nothing."""
        return self._num_to_take(sequence, self._find_prefix(sequence)) + num_spare <= self.num_free

    def admit(self, sequence: Sequence, num_spare: int) -> bool:
        """Gives ``sequence`` blocks for all its tokens, the cached ones of its prefix first.

        Sets ``num_computed_tokens`` to what the cache held; that never includes the last token,
        which has to be computed to draw the next one. False, and nothing changed, if fewer than
        ``num_spare`` blocks would remain free.
        """
        assert not sequence.block_table, "an admitted sequence holds blocks already"
        assert not sequence.num_pending_tokens, "a prefix is looked up by tokens that are known"
        found = self._find_prefix(sequence)
        if self._num_to_take(sequence, found) + num_spare > self.num_free:
            return False
        num_fresh = self.num_blocks_for(len(sequence.token_ids)) - len(found)
        for block in found:
            if self._num_references[block] == 0:
                del self._cached[block]
            self._num_references[block] += 1
        sequence.block_table.extend(found)
        sequence.block_table.extend(self._take_free() for _ in range(num_fresh))
        sequence.num_computed_tokens = len(found) * self.block_size
        return True

    def extend(self, sequence: Sequence) -> bool:
        """Makes ``block_table`` cover all tokens of ``sequence``; False if blocks run out.

        Pending tokens count. Blocks taken before they ran out stay with the sequence.
        """
        num_missing = self.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        for _ in range(num_missing):
            if not self.num_free:
                return False
            sequence.block_table.append(self._take_free())
        return True

    def can_extend(self, sequence: Sequence, num_spare: int) -> bool:
        """Whether ``extend`` would succeed, and leave ``num_spare`` blocks free."""
        num_missing = self.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        return max(num_missing, 0) + num_spare <= self.num_free

    def publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Lets others find the blocks that became full as tokens ``[start, end)`` were computed.

        To be called only once they *are* computed, through the last layer, and known. A block
        whose content is published already stays private.
        """
        if not self._caching:
            return
        first, last = start // self.block_size, end // self.block_size
        if first == last:
            return
        published = self._published.setdefault(sequence.adapter_id, {})
        for index in range(first, last):
            key = self._key(sequence, index)
            block = sequence.block_table[index]
            if published.setdefault(key, block) == block:
                self._published_as[block] = (sequence.adapter_id, key)

    def release(self, sequence: Sequence) -> None:
        """Takes all blocks of ``sequence`` back; published ones stay findable until evicted."""
        # From the tail on: the head of a prefix is of more use to others, so it is evicted last.
        for block in reversed(sequence.block_table):
            references = self._num_references[block] - 1
            if references < 0:
                raise Internal(f"KV block {block} was released more often than it was taken")
            self._num_references[block] = references
            if references == 0:
                if self._published_as[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0

    def forget_adapter(self, adapter_id: AdapterId) -> None:
        """Nothing that was computed with this adapter is found any more."""
        for block in self._published.pop(adapter_id, {}).values():
            self._published_as[block] = None
            if self._num_references[block] == 0:
                del self._cached[block]
                self._blank.append(block)

    def assert_idle(self) -> None:
        """Checks that no block is lost when no sequence runs. Raises ``Internal``."""
        held = [block for block, count in enumerate(self._num_references) if count]
        if held:
            raise Internal(f"KV blocks {held[:8]} are held although no sequence runs")
        self.assert_consistent()

    def assert_consistent(self) -> None:
        """Checks every block against the table above, in O(blocks). Raises ``Internal``."""
        blank, cached = set(self._blank), set(self._cached)
        if len(blank) != len(self._blank):
            raise Internal("a KV block is blank twice")
        by_key = {
            block: (adapter_id, key)
            for adapter_id, published in self._published.items()
            for key, block in published.items()
        }
        for block in range(self.num_blocks):
            free = self._num_references[block] == 0
            public = self._published_as[block]
            expected = (free and public is None, free and public is not None)
            if (block in blank, block in cached) != expected or by_key.get(block) != public:
                raise Internal(f"KV block {block} is in the wrong list")

    def _num_to_take(self, sequence: Sequence, found: list[int]) -> int:
        """Free blocks that the sequence needs, those of its prefix that nobody holds included."""
        num_cached = sum(self._num_references[block] == 0 for block in found)
        return num_cached + self.num_blocks_for(len(sequence.token_ids)) - len(found)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        published = self._published.get(sequence.adapter_id)
        if not published:
            return []
        found: list[int] = []
        for index in range((len(sequence.token_ids) - 1) // self.block_size):
            block = published.get(self._key(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """The key of the sequence's full block ``index``; keeps the keys up to it."""
        keys = sequence.block_keys
        size = self.block_size
        while len(keys) <= index:
            start = len(keys) * size
            tokens = array("q", sequence.token_ids[start : start + size]).tobytes()
            parent = keys[-1] if keys else b""
            keys.append(blake2b(parent + tokens, digest_size=_KEY_BYTES).digest())
        return keys[index]

    def _take_free(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unpublish(block)
        self._num_references[block] = 1
        return block

    def _unpublish(self, block: int) -> None:
        public = self._published_as[block]
        assert public is not None, "a cached block is published"
        adapter_id, key = public
        published = self._published[adapter_id]
        del published[key]
        if not published:
            del self._published[adapter_id]
        self._published_as[block] = None
