"""The engine's configuration, as the supervisor hands it over. Defaults live here alone."""

from enum import Enum

import msgspec

MiB = 1 << 20


class ModelDType(Enum):
    """``auto``: the model's own on a GPU, float32 on a CPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class DeviceKind(Enum):
    """``auto``: a GPU if torch sees one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class LoadFormat(Enum):
    """``auto``: the folder's safetensors; ``dummy``: random weights in the shape of its config."""

    AUTO = "auto"
    DUMMY = "dummy"


class AdapterLoading(Enum):
    """``overlap``: steps go on without the sequences whose adapter is being loaded;
    ``blocking``: the step waits for its adapters; ``layerwise``: as ``overlap``, and a prefill
    goes through the layers whose part of its adapter has arrived."""

    OVERLAP = "overlap"
    BLOCKING = "blocking"
    LAYERWISE = "layerwise"


class StartAdapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter of the command line; one that can not be registered fails the start."""

    name: str
    path: str
    pinned: bool = False


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Units are in the names; ``kv_cache_bytes`` and ``max_adapter_bytes`` are device memory.

    ``kv_cache_bytes`` None: on a GPU what ``gpu_memory_utilization``, a share of its whole memory,
    leaves beside everything else; on a CPU a fixed size. ``seed`` is also that of dummy weights.
    ``adapter_load_format`` ``dummy`` loads no adapter's weights (``DummySlots``): only with a model
    that has none of its own either.
    """

    model: str
    served_model_name: str
    device: DeviceKind = DeviceKind.AUTO
    dtype: ModelDType = ModelDType.AUTO
    load_format: LoadFormat = LoadFormat.AUTO
    adapter_load_format: LoadFormat = LoadFormat.AUTO
    seed: int = 0

    adapters: tuple[StartAdapter, ...] = ()
    lora_dir: str | None = None
    catalog: str | None = None

    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    chunked_prefill_size: int | None = 512
    max_waiting: int = 4096
    block_size: int = 16
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    cuda_graphs: bool = True

    max_adapter_bytes: int = 1024 * MiB
    max_lora_rank: int = 256
    adapter_loading: AdapterLoading = AdapterLoading.LAYERWISE
    max_adapter_wait_s: float = 2.0
    adapter_load_timeout_s: float = 60.0
    adapter_fetch_timeout_s: float = 1800.0
    adapter_cohorts: bool = True
    adapter_rotation: bool = True
    num_staging_chunks: int = 4
    staging_chunk_bytes: int = 32 * MiB

    rpc_bind: str | None = None
    rpc_key: str | None = None
    rpc_client_keys: str | None = None
    max_unread_tokens: int = 16_384
    heartbeat_interval_s: float = 5.0

    trace: str | None = None

    def __post_init__(self) -> None:
        if self.rpc_bind is not None:
            if not self.rpc_bind.startswith("tcp://"):
                raise ValueError(f"--rpc-bind: expected tcp://ADDRESS:PORT, got {self.rpc_bind!r}")
            if self.rpc_key is None or self.rpc_client_keys is None:
                raise ValueError(
                    "--rpc-bind: expected --rpc-key and --rpc-client-keys beside it: nobody is"
                    " served over TCP without keys"
                )
        if (
            self.adapter_load_format is LoadFormat.DUMMY
            and self.load_format is not LoadFormat.DUMMY
        ):
            raise ValueError(
                "--adapter-load-format dummy: expected it only with --load-format dummy,"
                f" got --load-format {self.load_format.value}"
            )
