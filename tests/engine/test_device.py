"""The device seam: orders between the two streams."""

import numpy as np
import pytest
import torch

from engine.config import DeviceKind, ModelDType
from engine.device import CpuDevice, CudaDevice, choose_dtype, open_device
from ipc.base_model import DType
from ipc.errors import InvalidRequest


def occupy_stream() -> None:
    """Gives the current stream some 30 ms of nothing to do."""
    torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]


def test_on_a_cpu_a_copy_is_done_when_the_call_returns() -> None:
    device = CpuDevice()
    target = torch.zeros(4, dtype=torch.uint8)
    device.load_stream_copy(target, torch.ones(4, dtype=torch.uint8))
    event = device.record_load_event()
    assert event.query()
    event.synchronize()
    device.forward_wait(event)
    device.load_stream_wait(device.record_forward_event())
    assert target.tolist() == [1, 1, 1, 1]


def test_auto_is_float32_on_a_cpu_and_a_named_dtype_is_kept() -> None:
    device = CpuDevice()
    assert choose_dtype(ModelDType.AUTO, DType.BFLOAT16, device) is DType.FLOAT32
    assert choose_dtype(ModelDType.FLOAT16, DType.BFLOAT16, device) is DType.FLOAT16


def test_a_cpu_is_found_everywhere() -> None:
    assert open_device(DeviceKind.CPU).torch_device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert isinstance(open_device(DeviceKind.AUTO), CpuDevice)
    with pytest.raises(InvalidRequest, match="expected a GPU that torch can use"):
        open_device(DeviceKind.CUDA)


@pytest.mark.gpu
def test_the_load_stream_waits_for_the_forward_stream_without_the_host() -> None:
    device = CudaDevice()
    source = torch.ones(1 << 20, dtype=torch.uint8, device=device.torch_device)
    target = torch.zeros_like(source)
    device.synchronize()
    with device.forward_stream():
        occupy_stream()
        seen = target.clone()
    fence = device.record_forward_event()
    device.load_stream_wait(fence)
    device.load_stream_copy(target, source)
    copied = device.record_load_event()
    assert not copied.query()
    copied.synchronize()
    assert fence.query()
    device.synchronize()
    assert seen.sum().item() == 0
    assert target.sum().item() == 1 << 20


@pytest.mark.gpu
def test_the_forward_stream_waits_for_the_load_stream_without_the_host() -> None:
    device = CudaDevice()
    source = torch.ones(1 << 20, dtype=torch.uint8, device=device.torch_device)
    target = torch.zeros_like(source)
    device.synchronize()
    with device.load_stream():
        occupy_stream()
        device.load_stream_copy(target, source)
    device.forward_wait(device.record_load_event())
    with device.forward_stream():
        seen = target.clone()
    device.synchronize()
    assert seen.sum().item() == 1 << 20


@pytest.mark.gpu
def test_an_uploaded_array_arrives_whole() -> None:
    device = CudaDevice()
    with device.forward_stream():
        arrays = [device.upload(np.full(1000, number)) for number in range(50)]
        sums = [int(array.sum()) for array in arrays]
    assert sums == [1000 * number for number in range(50)]
