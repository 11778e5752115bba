"""How many bytes a step must read and how many operations it must do: the floors of its time."""

from engine.models.config import ModelConfig
from ipc.base_model import LINEAR_MODULES, BaseModel
from ipc.image import AdapterModule


def linear_values(model: ModelConfig, base: BaseModel) -> int:
    """Weights of all decoder layers' linears, biases and norms left out."""
    per_layer = sum(linear.in_features * linear.out_features for linear in base.linears)
    return model.num_layers * per_layer


def head_values(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size


def decode_step_bytes(model: ModelConfig, base: BaseModel, batch: int, context: int) -> int:
    """What a decode step reads at least: linears, head, keys and values.

    The embedding table is not read but for a row a token; a tied one is read as the head.
    """
    weights = linear_values(model, base) + head_values(model)
    kv = 2 * model.num_layers * model.kv_size * batch * context
    return (weights + kv) * base.dtype.num_bytes


def prefill_flops(model: ModelConfig, base: BaseModel, num_prompts: int, num_tokens: int) -> int:
    """Operations of ``num_prompts`` prompts of ``num_tokens``: a product and a sum are two."""
    products = prefill_product_flops(model, base, num_prompts, num_tokens)
    return products + prefill_attention_flops(model, num_prompts, num_tokens)


def prefill_product_flops(
    model: ModelConfig, base: BaseModel, num_prompts: int, num_tokens: int
) -> int:
    """Those of the matrix products: linears of every token, the head of last tokens only."""
    return 2 * num_prompts * (linear_values(model, base) * num_tokens + head_values(model))


def prefill_attention_flops(model: ModelConfig, num_prompts: int, num_tokens: int) -> int:
    """Those of causal attention: two products over half of the square."""
    half = num_tokens * num_tokens // 2
    return 2 * 2 * num_prompts * model.num_layers * model.query_size * half


def prefill_norm_bytes(model: ModelConfig, base: BaseModel, num_tokens: int) -> int:
    """What the norms of ``num_tokens`` read and write; all but the first add to the residual."""
    values = (2 + 4 * (2 * model.num_layers - 1)) * model.hidden_size
    return values * num_tokens * base.dtype.num_bytes


def prefill_rope_bytes(model: ModelConfig, base: BaseModel, num_tokens: int) -> int:
    """Queries, keys and values read; the first two written back, the last two stored.

    Cosines and sines are fp32.
    """
    values = 2 * model.query_size + 5 * model.kv_size
    per_token = values * base.dtype.num_bytes + 4 * model.head_dim
    return model.num_layers * num_tokens * per_token


def prefill_silu_bytes(model: ModelConfig, base: BaseModel, num_tokens: int) -> int:
    """Gate and up read, their product written."""
    values = 3 * model.num_layers * model.intermediate_size
    return values * num_tokens * base.dtype.num_bytes


def all_linear_modules(base: BaseModel, rank: int, scaling: float) -> tuple[AdapterModule, ...]:
    """An adapter of ``rank`` on every linear of every layer."""
    return tuple(
        AdapterModule(base.layer_stage(layer), name, rank, scaling)
        for layer in range(base.num_layers)
        for name in LINEAR_MODULES
    )


def merged_length(intervals: list[tuple[float, float]], largest_gap: float) -> float:
    """Time covered by ``(begin, end)`` intervals, gaps up to ``largest_gap`` counted as covered."""
    covered = 0.0
    open_begin = open_end = None
    for begin, end in sorted(intervals):
        if open_begin is None or open_end is None:
            open_begin, open_end = begin, end
        elif begin - open_end <= largest_gap:
            open_end = max(open_end, end)
        else:
            covered += open_end - open_begin
            open_begin, open_end = begin, end
    if open_begin is not None and open_end is not None:
        covered += open_end - open_begin
    return covered
