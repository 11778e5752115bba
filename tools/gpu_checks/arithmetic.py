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
    """Operations of ``num_prompts`` prompts of ``num_tokens``: a product and a sum are two.

    Linears of every token, causal attention (half of the square), the head of last tokens only.
    """
    linears = 2 * linear_values(model, base) * num_tokens
    attention = 2 * 2 * model.num_layers * model.query_size * num_tokens * num_tokens // 2
    head = 2 * head_values(model)
    return num_prompts * (linears + attention + head)


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
