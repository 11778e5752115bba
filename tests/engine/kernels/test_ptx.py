"""What every kernel has to keep to where launches may overlap, checked in what it compiles to."""

import os
import subprocess
import sys
from itertools import starmap
from operator import mul
from pathlib import Path

import pytest
from triton.backends.nvidia.compiler import get_ptxas

from engine.kernels.causal_hopper import HEAD_DIMS
from engine.kernels.decode_workspace import DecodeTuning
from engine.lora.launches import LoraTuning
from tests.engine.kernels.ptx import hasty_instructions, instructions_before_wait, launches

ROOT = Path(__file__).resolve().parents[3]

ENTRY = """
.visible .entry kernel(
	.param .u64 p
)
{
%s
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the PTX of every kernel, compiled by a process that does not interpret them."""
    folder = tmp_path_factory.mktemp("ptx")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "tests.engine.kernels.ptx", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=150, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", launches())
def test_every_path_waits_before_it_writes_or_ends(name: str, folder: Path) -> None:
    ptx = (folder / f"{name}.ptx").read_text()
    assert ".target sm_90" in ptx
    assert "griddepcontrol.launch_dependents" in ptx
    assert hasty_instructions(ptx) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shrink_few", "read_a", "read_a_and_b"])
def test_adapters_of_several_rows_stream_through_shared_memory(name: str, folder: Path) -> None:
    # Without what the compiler must know of the addresses, it would wait for every load.
    assert "cp.async.cg.shared.global" in (folder / f"{name}.ptx").read_text()


@pytest.mark.slow
def test_what_only_reads_loads_whole_tiles_16_bytes_a_thread(folder: Path) -> None:
    shrink, expand = LoraTuning().shrink_few, LoraTuning().expand_few
    b_tiles = zip(2 * expand.ranks, expand.columns, strict=True)
    loads_of = {
        # Of several rows' tiles the first; see above for the others.
        "read_a": shrink.row_ranks * shrink.row_inputs + shrink.rows_ranks * shrink.rows_inputs,
        "read_b": sum(starmap(mul, b_tiles)),
    }
    for name, num_values in loads_of.items():
        num_threads = 32 * shrink.num_warps
        ptx = (folder / f"{name}.ptx").read_text()
        assert ptx.count("ld.global.v4.b32") * num_threads * 16 == num_values * 2, name


@pytest.mark.slow
def test_the_first_tiles_of_an_adapter_are_asked_for_before_the_wait(folder: Path) -> None:
    shrink = LoraTuning().shrink_few
    early = instructions_before_wait((folder / "shrink_few.ptx").read_text())
    num_loads = sum(line.count("ld.global.v4.b32") for line in early)
    num_values = shrink.row_ranks * shrink.row_inputs + shrink.rows_ranks * shrink.rows_inputs
    assert num_loads * 32 * shrink.num_warps * 16 == num_values * 2


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_prefills_keep_the_tensor_cores_fed(head_dim: int, folder: Path) -> None:
    ptx = folder / f"causal_hopper_{head_dim}.ptx"
    text = ptx.read_text()
    assert "wgmma.mma_async" in text and "cp.async.bulk.tensor" in text
    told = assembler_messages(ptx)
    assert "0 bytes spill stores" in told
    # Where it finds that registers of a product in flight are touched, each is waited for.
    assert "serialized" not in told


@pytest.mark.slow
def test_a_decode_asks_for_the_keys_and_values_that_are_cached_before_the_wait(
    folder: Path,
) -> None:
    early = instructions_before_wait((folder / "paged_decode.ptx").read_text())
    tuning = DecodeTuning()
    # Keys and values of 256 bytes a token, in lines of 128.
    num_lines = 2 * 2 * tuning.prefetched_tokens
    num_threads = 32 * tuning.num_warps
    assert sum("prefetch.global.L2" in line for line in early) * num_threads == num_lines


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [16, 32])
def test_weights_stream_past_the_registers(num_rows: int, folder: Path) -> None:
    ptx = folder / f"few_rows_product_of_{num_rows}.ptx"
    text = ptx.read_text()
    # Rows of the weights are what a matrix product wants most of: so few of x fill it as well.
    assert f"wgmma.mma_async.sync.aligned.m64n{num_rows}k16" in text
    assert "cp.async.cg.shared.global" in text
    assert any("prefetch.global.L2" in line for line in instructions_before_wait(text))
    told = assembler_messages(ptx)
    assert "0 bytes spill stores" in told and "serialized" not in told


def assembler_messages(ptx: Path) -> str:
    command = [get_ptxas(90).path, "--verbose", "--gpu-name=sm_90a", str(ptx)]
    command += ["--output-file", str(ptx.with_suffix(".cubin"))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_a_write_or_an_end_before_the_wait_is_found() -> None:
    waits = "griddepcontrol.wait; // dummy\n st.global.b32 [%rd1], %r1;\n ret;"
    assert hasty_instructions(ENTRY % waits) == []
    writes = "st.global.v4.b32 [%rd1], {%r1};\n" + waits
    assert hasty_instructions(ENTRY % writes) == ["st.global.v4.b32 [%rd1], {%r1};"]
    ends = "@%p1 bra $L__BB0_2;\n" + waits + "\n$L__BB0_2:\n ret;"
    assert hasty_instructions(ENTRY % ends) == ["ret;"]
    adds = "@%p1 atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], 1;\n" + waits
    assert len(hasty_instructions(ENTRY % adds)) == 1
