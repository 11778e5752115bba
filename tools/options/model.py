"""The model, and how its steps and its KV cache are bounded."""

from engine.config import DeviceKind, EngineConfig, LoadFormat, ModelDType
from tools.options.option import Option
from tools.values import choices, parse_choice, parse_count, parse_seed, parse_share, parse_size

MODEL: tuple[Option, ...] = (
    Option(
        "--device",
        EngineConfig,
        "device",
        parse_choice(DeviceKind),
        choices(DeviceKind),
        "Where the model runs; auto is a GPU if torch sees one.",
    ),
    Option(
        "--dtype",
        EngineConfig,
        "dtype",
        parse_choice(ModelDType),
        choices(ModelDType),
        "What the model computes in; auto is its own dtype on a GPU, float32 on a CPU.",
    ),
    Option(
        "--load-format",
        EngineConfig,
        "load_format",
        parse_choice(LoadFormat),
        choices(LoadFormat),
        "Weights: auto reads the model folder's, dummy draws random ones for measurements.",
    ),
    Option(
        "--max-model-len",
        EngineConfig,
        "max_model_len",
        parse_count,
        "TOKENS",
        "Longest prompt and answer together (default: the model's own limit).",
    ),
    Option(
        "--seed",
        EngineConfig,
        "seed",
        parse_seed,
        "NUMBER",
        "Seed of requests that bring none of their own, and of dummy weights.",
    ),
)

BATCHING: tuple[Option, ...] = (
    Option(
        "--max-num-seqs",
        EngineConfig,
        "max_num_seqs",
        parse_count,
        "COUNT",
        "Most sequences that run at once.",
    ),
    Option(
        "--max-num-batched-tokens",
        EngineConfig,
        "max_num_batched_tokens",
        parse_count,
        "TOKENS",
        "Most tokens in one step; longer prompts are computed in pieces.",
    ),
    Option(
        "--chunked-prefill-size",
        EngineConfig,
        "chunked_prefill_size",
        parse_count,
        "TOKENS",
        "Most tokens of prompts that are computed between two tokens of everybody else.",
    ),
    Option(
        "--max-waiting",
        EngineConfig,
        "max_waiting",
        parse_count,
        "COUNT",
        "Most requests that wait; further ones are refused with status 429.",
    ),
    Option(
        "--block-size",
        EngineConfig,
        "block_size",
        parse_count,
        "TOKENS",
        "Tokens in one block of the KV cache.",
    ),
    Option(
        "--kv-cache-memory",
        EngineConfig,
        "kv_cache_bytes",
        parse_size,
        "SIZE",
        "Memory for the KV cache (default: what is left on a GPU, 512MiB on a CPU).",
    ),
    Option(
        "--gpu-memory-utilization",
        EngineConfig,
        "gpu_memory_utilization",
        parse_share,
        "SHARE",
        "How much of a GPU's memory to use when --kv-cache-memory is not given.",
    ),
    Option(
        "--no-prefix-caching",
        EngineConfig,
        "enable_prefix_caching",
        None,
        "",
        "Compute every prompt anew, also where it begins like an earlier one.",
    ),
    Option(
        "--enforce-eager",
        EngineConfig,
        "cuda_graphs",
        None,
        "",
        "Launch every kernel of every step by itself: no CUDA graphs. Has no effect on a CPU.",
    ),
)
