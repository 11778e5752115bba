"""Which kernels count as what, and what their times are compared with."""

import pytest

from tools.gpu_checks.breakdown import (
    ADAPTERS,
    ATTENTION,
    COPIES,
    GAPS,
    NORMS,
    OTHERS,
    PRODUCTS,
    ROPE,
    SILU,
    breakdown_figures,
    kind_of,
    longest_names,
    time_by_kind,
)
from tools.gpu_checks.timing import DeviceEvent


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", PRODUCTS),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(Params)", PRODUCTS),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(...)", PRODUCTS),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>(...)", ATTENTION),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<128>>(...)", ATTENTION),
        ("paged_decode_kernel", ATTENTION),
        ("_rms_norm_kernel", NORMS),
        ("_rope_kv_kernel", ROPE),
        ("_silu_mul_kernel", SILU),
        ("_shrink_many_kernel", ADAPTERS),
        ("_expand_few_kernel", ADAPTERS),
        ("Memcpy HtoD (Pinned -> Device)", COPIES),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>(...)", OTHERS),
    ],
)
def test_a_kernels_name_says_what_it_is_for(name: str, kind: str) -> None:
    assert kind_of(name) == kind


EVENTS = [
    DeviceEvent("nvjet_tst", 0.0, 600.0),
    DeviceEvent("_silu_mul_kernel", 600.0, 700.0),
    DeviceEvent("nvjet_tst", 800.0, 1000.0),
    # Begun before the one before it has ended.
    DeviceEvent("_rms_norm_kernel", 990.0, 1090.0),
]


def test_time_without_any_kernel_is_a_gap() -> None:
    times = time_by_kind(EVENTS)
    assert times[PRODUCTS].num_launches == 2
    assert times[PRODUCTS].seconds == pytest.approx(800e-6)
    assert times[GAPS].seconds == pytest.approx(100e-6)
    assert time_by_kind([]) == {}


def test_the_longest_come_first_beside_their_bounds() -> None:
    times = time_by_kind(EVENTS)
    figures = breakdown_figures("it", times, {SILU: 80e-6})
    assert figures[0].name == "it: products"
    notes = {figure.name: figure.note for figure in figures}
    assert notes["it: products"] == "72.7 %, 2 launches"
    assert notes["it: silu"] == "9.1 %, 1 launch, 0.80 of its bound"
    assert notes["it: gaps"] == "9.1 %"


def test_kernels_of_one_name_are_added_up() -> None:
    (longest,) = longest_names(EVENTS, 1)
    assert (longest["name"], longest["num_launches"]) == ("nvjet_tst", 2)
    assert longest["seconds"] == pytest.approx(800e-6)
