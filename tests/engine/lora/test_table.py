"""The table by which the kernels find adapters."""

import numpy as np
import pytest

from engine.device import CpuDevice
from engine.lora.table import RECORD, AdapterTable
from ipc.base_model import LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.errors import AdapterInvalid, Internal
from ipc.image import AdapterModule, EntryKind, layout_image
from ipc.messages import AdapterId

NUM_LAYERS = 2
# Far beyond what 32 bits can count.
FAR = 1 << 40


def base_model(dtype: DType = DType.BFLOAT16) -> BaseModel:
    linears = tuple(LinearShape(name, f"block.{name}", 16, 32) for name in LINEAR_MODULES)
    return BaseModel("LlamaForCausalLM", NUM_LAYERS, 16, 100, 2, 1, dtype, linears)


def install(
    table: AdapterTable, number: int, *modules: AdapterModule, dtype: DType = DType.BFLOAT16
) -> None:
    layout = layout_image(base_model(dtype), modules)
    extents = tuple(FAR + 4096 * stage for stage in range(len(layout.stages)))
    table.install(AdapterId(number), modules, layout, extents)


def records_of(table: AdapterTable, number: int, layer: int) -> dict[str, np.void]:
    index = table.entry(AdapterId(number)).index
    records = table.records[index, layer].numpy().view(RECORD).reshape(-1)
    return dict(zip(LINEAR_MODULES, records, strict=True))


def test_records_say_where_an_adapters_matrices_lie() -> None:
    table = AdapterTable(base_model(), 4, CpuDevice())
    install(
        table,
        7,
        AdapterModule(2, "q_proj", 3, 0.5),
        AdapterModule(2, "v_proj", 9, 2.0),
        AdapterModule(2, "down_proj", 16, 1.0),
    )
    records = records_of(table, 7, 1)
    extent = (FAR + 2 * 4096) // 2
    query, value, down = (records[name] for name in ("q_proj", "v_proj", "down_proj"))
    # q's A is 8 by 16, v's is 16 by 16; then q's B, 32 by 8.
    assert (query["a"], query["b"]) == (extent, extent + 24 * 16)
    assert (value["a"], value["b"]) == (extent, extent + 24 * 16 + 32 * 8)
    assert (query["first_rank"], query["rank"], query["scaling"]) == (0, 8, 0.5)
    assert (value["first_rank"], value["rank"], value["scaling"]) == (8, 16, 2.0)
    assert {records[name]["group_rank"] for name in ("q_proj", "k_proj", "v_proj")} == {24}
    assert (down["a"], down["rank"], down["group_rank"]) == (extent + 24 * 16 + 24 * 32, 16, 16)
    assert (query["row_scale"], query["bias"]) == (-1, -1)


@pytest.mark.parametrize("dtype", DType)
def test_records_say_where_row_scales_and_biases_lie(dtype: DType) -> None:
    table = AdapterTable(base_model(dtype), 4, CpuDevice())
    modules = (
        AdapterModule(2, "q_proj", 8, 1.0, row_scale=True),
        AdapterModule(2, "k_proj", 8, 1.0, bias=True),
        AdapterModule(2, "o_proj", 8, 1.0, row_scale=True, bias=True),
        AdapterModule(2, "up_proj", 8, 1.0),
    )
    install(table, 7, *modules, dtype=dtype)
    records = records_of(table, 7, 1)
    offsets = {
        (entry.kind, entry.module): FAR + 2 * 4096 + entry.offset
        for entry in layout_image(base_model(dtype), modules).stages[2].entries
    }
    for name, record in records.items():
        row_scale = offsets.get((EntryKind.ROW_SCALE, name))
        bias = offsets.get((EntryKind.BIAS, name))
        assert record["row_scale"] == (-1 if row_scale is None else row_scale // 4), name
        assert record["bias"] == (-1 if bias is None else bias // dtype.num_bytes), name
    assert [records[name]["row_scale"] >= 0 for name in ("q_proj", "o_proj")] == [True, True]
    assert [records[name]["bias"] >= 0 for name in ("k_proj", "o_proj")] == [True, True]


def test_the_entry_tells_whether_any_linear_has_a_row_scale() -> None:
    table = AdapterTable(base_model(), 4, CpuDevice())
    plain = AdapterModule(1, "q_proj", 8, 1.0)
    install(table, 1, plain, AdapterModule(2, "up_proj", 8, 1.0, row_scale=True))
    install(table, 2, plain, AdapterModule(2, "up_proj", 8, 1.0, bias=True))
    assert table.entry(AdapterId(1)).scales_rows
    assert not table.entry(AdapterId(2)).scales_rows


def test_what_an_adapter_leaves_alone_has_rank_zero() -> None:
    table = AdapterTable(base_model(), 4, CpuDevice())
    install(table, 7, AdapterModule(2, "q_proj", 3, 0.5))
    for layer in range(NUM_LAYERS):
        ranks = {name: record["rank"] for name, record in records_of(table, 7, layer).items()}
        assert ranks.pop("q_proj") == (8 if layer == 1 else 0)
        assert set(ranks.values()) == {0}


def test_the_entry_tells_the_largest_padded_rank() -> None:
    table = AdapterTable(base_model(), 4, CpuDevice())
    install(table, 1, AdapterModule(1, "q_proj", 3, 1.0), AdapterModule(2, "up_proj", 33, 1.0))
    install(table, 2)
    assert table.entry(AdapterId(1)).max_rank == 40
    assert table.entry(AdapterId(2)).max_rank == 0


def test_a_freed_place_is_taken_again_after_all_others() -> None:
    table = AdapterTable(base_model(), 3, CpuDevice())
    module = AdapterModule(1, "q_proj", 8, 1.0)
    install(table, 1, module)
    table.remove(AdapterId(1))
    for number in (2, 3, 4):
        install(table, number, module)
    indices = [table.entry(AdapterId(number)).index for number in (2, 3, 4)]
    assert indices == [1, 2, 0]
    with pytest.raises(Internal, match="adapter 5: the table's 3 rows are full"):
        install(table, 5, module)


def test_an_adapter_that_is_not_resident_never_passes_for_the_base() -> None:
    table = AdapterTable(base_model(), 3, CpuDevice())
    install(table, 1, AdapterModule(1, "q_proj", 8, 1.0))
    table.remove(AdapterId(1))
    with pytest.raises(KeyError):
        table.entry(AdapterId(1))


def test_a_record_of_an_earlier_adapter_leaves_nothing_behind() -> None:
    table = AdapterTable(base_model(), 1, CpuDevice())
    install(table, 1, *(AdapterModule(1, name, 64, 3.0) for name in LINEAR_MODULES))
    table.remove(AdapterId(1))
    install(table, 2, AdapterModule(1, "o_proj", 8, 1.0))
    records = records_of(table, 2, 0)
    assert [records[name]["rank"] for name in LINEAR_MODULES] == [0, 0, 0, 8, 0, 0, 0]


def test_a_part_that_the_forward_pass_does_not_apply_is_refused() -> None:
    table = AdapterTable(base_model(), 1, CpuDevice())
    with pytest.raises(AdapterInvalid, match="got bias of k_proj"):
        install(table, 1, AdapterModule(2, "k_proj", 0, 1.0, bias=True))
    install(table, 2, AdapterModule(1, "o_proj", 8, 1.0))
