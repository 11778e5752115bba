"""How a decode's attention is cut up, and the memory in which its programs meet."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """How a decode is cut up; nothing of it changes the result beyond rounding.

    A program takes the cached tokens of its split ``tile_tokens`` at a time; a split has at least
    ``min_split_tokens``. There are about ``programs_per_processor`` of them on each multiprocessor.
    The first ``prefetched_tokens`` of a split are asked for while the launch before still runs, in
    batches of up to ``prefetched_rows``: of larger ones the contexts are so much to read that they
    hold up the product that runs (8 rows: a step is 2 % faster with it, 32 rows: 1 % slower).
    """

    tile_tokens: int = 64
    prefetched_tokens: int = 128
    prefetched_rows: int = 16
    min_split_tokens: int = 128
    programs_per_processor: int = 2
    num_warps: int = 4
    num_stages: int = 3


class DecodeWorkspace:
    """Owns what the programs of one launch leave to each other; for launches of one stream.

    ``partials`` is ``[max_partials, head_dim]``, ``maxima`` and ``sums`` ``[max_partials]`` fp32;
    ``arrivals`` ``[num_programs]`` int32, zeros between launches. ``overlaps``: how launches that
    use it are launched, see ``engine.kernels.overlap``.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_processors: int,
        device: torch.device,
        overlaps: bool,
        tuning: DecodeTuning | None = None,
    ) -> None:
        self.tuning = tuning or DecodeTuning()
        assert self.tuning.min_split_tokens % self.tuning.tile_tokens == 0, self.tuning
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.overlaps = overlaps
        # More splits than run at once would make the last ones a second round.
        self._num_programs = self.tuning.programs_per_processor * num_processors
        max_partials = self._num_programs * (num_heads // num_kv_heads)
        self.partials = torch.empty(max_partials, head_dim, device=device)
        self.maxima = torch.empty(max_partials, device=device)
        self.sums = torch.empty(max_partials, device=device)
        self.arrivals = torch.zeros(self._num_programs, dtype=torch.int32, device=device)

    def num_splits(self, num_rows: int, max_context: int) -> int:
        """Programs for each row and KV head, where no context is expected beyond ``max_context``.

        A longer one is computed as well, in longer splits.
        """
        that_fit = self._num_programs // (num_rows * self.num_kv_heads)
        return max(1, min(that_fit, -(-max_context // self.tuning.min_split_tokens)))
