"""The loader's configuration, as the supervisor hands it over. Defaults live here alone."""

import os

import msgspec

MiB = 1 << 20
GiB = 1 << 30

MAX_READ_THREADS = 16


def default_read_threads() -> int:
    """As many as the machine has cores, at least 2 and at most ``MAX_READ_THREADS``.

    Reading out of the page cache is bound by the cores that copy and check. The threads step back
    for whoever else wants one (``Reader``): the engine's threads, and ours that feed the GPU.
    Beyond the upper bound they would only wait for each other, and for the GIL.
    """
    return min(max(2, os.cpu_count() or 1), MAX_READ_THREADS)


class LoaderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the loader may use and where it may look.

    ``adapter_roots`` and ``lora_dir`` are absolute; no file outside of them is ever read.
    ``model`` is the base model's folder, absolute; without it DoRA and biases are refused.
    ``host_tier_bytes`` is the whole memory for adapter images, so it bounds each of them.
    ``inject_read_delay_s`` is for tests alone: every block of a file is held back that long
    before it is read, as a slow disk would; a small adapter is one block.
    ``adapter_sources`` are prefixes of addresses on other machines where adapters may lie, and
    ``adapter_addresses`` such addresses, each by itself. They
    are kept in the folder ``adapter_cache``, absolute, None for one below the user's own: at most
    ``adapter_cache_bytes`` of them. Fetching one may take ``adapter_fetch_timeout_s``.
    Row scales that were computed are kept in the folder ``row_scale_cache``, absolute, None for
    one below the user's own; all together take ``row_scale_cache_bytes``.
    ``trace`` is the file that what happens is recorded in.
    """

    host_tier_bytes: int = 4 * GiB
    adapter_roots: tuple[str, ...] = ()
    lora_dir: str | None = None
    model: str | None = None
    num_read_threads: int = default_read_threads()
    read_block_bytes: int = 8 * MiB
    adapter_sources: tuple[str, ...] = ()
    adapter_addresses: tuple[str, ...] = ()
    adapter_cache: str | None = None
    adapter_cache_bytes: int = 64 * GiB
    adapter_fetch_timeout_s: float = 1800.0
    row_scale_cache: str | None = None
    row_scale_cache_bytes: int = 2 * GiB
    inject_read_delay_s: float = 0.0
    trace: str | None = None

    def __post_init__(self) -> None:
        for name in (
            *("host_tier_bytes", "num_read_threads", "read_block_bytes"),
            *("row_scale_cache_bytes", "adapter_cache_bytes", "adapter_fetch_timeout_s"),
        ):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if not 0.0 <= self.inject_read_delay_s < float("inf"):
            raise ValueError(f"inject_read_delay_s must be ≥ 0, got {self.inject_read_delay_s}")
        for name, paths in (
            ("adapter_roots", self.adapter_roots),
            ("lora_dir", (self.lora_dir,)),
            ("model", (self.model,)),
            ("row_scale_cache", (self.row_scale_cache,)),
            ("adapter_cache", (self.adapter_cache,)),
        ):
            for path in paths:
                if path is not None and not os.path.isabs(path):
                    raise ValueError(f"{name} must be absolute, got {path!r}")
