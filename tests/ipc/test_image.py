"""The image layout: what both sides must agree on to the byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.base_model import LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.image import (
    ENTRY_ALIGNMENT,
    AdapterModule,
    EntryKind,
    layout_image,
    padded_rank,
)


def base_model(num_layers: int = 2, dtype: DType = DType.BFLOAT16) -> BaseModel:
    shapes = {
        "q_proj": (64, 64),
        "k_proj": (64, 32),
        "v_proj": (64, 32),
        "o_proj": (64, 64),
        "gate_proj": (64, 176),
        "up_proj": (64, 176),
        "down_proj": (176, 64),
    }
    linears = tuple(LinearShape(name, f"block.{name}", *shapes[name]) for name in LINEAR_MODULES)
    return BaseModel("LlamaForCausalLM", num_layers, 64, 300, 2, 1, dtype, linears)


def test_a_of_a_group_stand_together_and_their_b_follow() -> None:
    modules = [AdapterModule(1, name, 8, 1.0) for name in ("v_proj", "q_proj", "k_proj")]
    entries = layout_image(base_model(), modules).stages[1].entries
    assert [(entry.kind, entry.module) for entry in entries] == [
        (EntryKind.LORA_A, "q_proj"),
        (EntryKind.LORA_A, "k_proj"),
        (EntryKind.LORA_A, "v_proj"),
        (EntryKind.LORA_B, "q_proj"),
        (EntryKind.LORA_B, "k_proj"),
        (EntryKind.LORA_B, "v_proj"),
    ]


def test_a_rank_16_adapter_of_an_8b_llama_takes_the_bytes_that_its_values_take() -> None:
    attention = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)]
    shapes = [*attention, (4096, 14336), (4096, 14336), (14336, 4096)]
    linears = tuple(
        LinearShape(name, name, *shape) for name, shape in zip(LINEAR_MODULES, shapes, strict=True)
    )
    llama = BaseModel("LlamaForCausalLM", 32, 4096, 128256, 32, 8, DType.BFLOAT16, linears)
    modules = [
        AdapterModule(llama.layer_stage(layer), name, 16, 2.0)
        for layer in range(32)
        for name in LINEAR_MODULES
    ]
    assert layout_image(llama, modules).num_bytes == 16 * 81_920 * 32 * 2


def test_an_odd_rank_is_padded_to_eight_in_a_and_in_b() -> None:
    a, b = layout_image(base_model(), [AdapterModule(1, "k_proj", 3, 1.0)]).stages[1].entries
    assert (a.rows, a.columns) == (8, 64)
    assert (b.rows, b.columns) == (32, 8)


def test_an_untouched_stage_is_empty() -> None:
    layout = layout_image(base_model(), [AdapterModule(2, "o_proj", 8, 1.0)])
    assert layout.stage_bytes[0] == layout.stage_bytes[1] == layout.stage_bytes[3] == 0
    assert layout.num_bytes == layout.stages[2].num_bytes > 0


def test_every_kind_of_entry_has_its_shape() -> None:
    modules = [
        AdapterModule(0, "embed_tokens", 4, 1.0, whole=True),
        AdapterModule(1, "q_proj", 8, 1.0, row_scale=True, bias=True),
        AdapterModule(3, "lm_head", 0, 1.0, whole=True),
    ]
    stages = layout_image(base_model(), modules).stages
    shapes = {
        (number, entry.kind): (entry.rows, entry.columns, entry.num_bytes)
        for number, stage in enumerate(stages)
        for entry in stage.entries
    }
    assert shapes == {
        (0, EntryKind.LORA_A): (8, 300, 4800),
        (0, EntryKind.LORA_B): (64, 8, 1024),
        (0, EntryKind.WHOLE): (300, 64, 38400),
        (1, EntryKind.LORA_A): (8, 64, 1024),
        (1, EntryKind.LORA_B): (64, 8, 1024),
        (1, EntryKind.ROW_SCALE): (64, 1, 256),
        (1, EntryKind.BIAS): (64, 1, 128),
        (3, EntryKind.WHOLE): (300, 64, 38400),
    }


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([AdapterModule(9, "q_proj", 8, 1.0)], "stage 9 of q_proj: not in [0, 4)"),
        ([AdapterModule(1, "q_proj", -1, 1.0)], "rank -1 of q_proj is negative"),
        ([AdapterModule(1, "lm_head", 8, 1.0)], "stage 1 has no module called lm_head"),
        ([AdapterModule(1, "q_proj", 8, 1.0)] * 2, "q_proj is named twice in stage 1"),
    ],
)
def test_a_module_that_has_no_place_is_refused(modules: list[AdapterModule], message: str) -> None:
    with pytest.raises(ValueError) as error:
        layout_image(base_model(), modules)
    assert str(error.value) == message


@given(
    st.sets(st.tuples(st.integers(1, 2), st.sampled_from(LINEAR_MODULES))),
    st.integers(1, 70),
    st.sampled_from(DType),
)
def test_entries_are_aligned_disjoint_and_independent_of_the_order_of_modules(
    places: set[tuple[int, str]], rank: int, dtype: DType
) -> None:
    base = base_model(dtype=dtype)
    modules = [AdapterModule(stage, name, rank, 1.0) for stage, name in sorted(places)]
    layout = layout_image(base, modules)
    assert layout == layout_image(base, reversed(modules))
    expected_offset = 0
    for stage in layout.stages:
        assert stage.offset == expected_offset
        expected_offset += stage.num_bytes
        end = 0
        for entry in stage.entries:
            assert entry.offset % ENTRY_ALIGNMENT == 0
            assert end <= entry.offset < end + ENTRY_ALIGNMENT
            end = entry.offset + entry.num_bytes
        assert end <= stage.num_bytes < end + ENTRY_ALIGNMENT
    values = sum(
        padded_rank(rank) * (base.linear(name).in_features + base.linear(name).out_features)
        for _, name in places
    )
    assert layout.num_bytes >= values * dtype.num_bytes
