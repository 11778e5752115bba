"""The device seam: orders between the two streams."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engine.config import DeviceKind, ModelDType
from engine.device import CpuDevice, CudaDevice, choose_dtype, open_device
from ipc.base_model import DType
from ipc.errors import InvalidRequest


def occupy_stream() -> None:
    """Gives the current stream some 300 ms of nothing to do: the first copy may take long."""
    torch.cuda._sleep(600_000_000)  # type: ignore[no-untyped-call]


def test_on_a_cpu_a_copy_is_done_when_the_call_returns() -> None:
    device = CpuDevice()
    target = torch.zeros(4, dtype=torch.uint8)
    source = torch.ones(4, dtype=torch.uint8)
    event = device.new_load_event()
    with device.load_stream():
        device.load_stream_copy(target.data_ptr(), source.data_ptr(), 3)
    device.record_load_event(event)
    assert event.query()
    event.synchronize()
    device.load_stream_wait(device.record_forward_event())
    assert target.tolist() == [1, 1, 1, 0]


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
    fence, copied = device.record_forward_event(), device.new_load_event()
    with device.load_stream():
        device.load_stream_wait(fence)
        device.load_stream_copy(target.data_ptr(), source.data_ptr(), source.numel())
        device.record_load_event(copied)
    assert not copied.query()
    copied.synchronize()
    assert fence.query()
    device.synchronize()
    assert seen.sum().item() == 0
    assert target.sum().item() == 1 << 20


@pytest.mark.gpu
def test_what_was_seen_to_be_copied_is_seen_by_work_that_is_enqueued_later() -> None:
    device = CudaDevice()
    source = torch.ones(1 << 20, dtype=torch.uint8, device=device.torch_device)
    target = torch.zeros_like(source)
    copied = device.new_load_event()
    device.synchronize()
    with device.load_stream():
        occupy_stream()
        device.load_stream_copy(target.data_ptr(), source.data_ptr(), source.numel())
        device.record_load_event(copied)
    copied.synchronize()
    with device.forward_stream():
        seen = target.clone()
    device.synchronize()
    assert seen.sum().item() == 1 << 20


@pytest.mark.gpu
def test_an_event_of_the_load_stream_is_recorded_again_and_again() -> None:
    device = CudaDevice()
    event = device.new_load_event()
    assert event.query(), "nothing was recorded, so nothing is to be waited for"
    for _ in range(2):
        with device.load_stream():
            occupy_stream()
            device.record_load_event(event)
        assert not event.query()
        event.synchronize()
        assert event.query()


@pytest.mark.gpu
def test_a_copy_on_a_thread_that_never_used_the_gpu_arrives() -> None:
    device = CudaDevice()
    source = torch.ones(1 << 20, dtype=torch.uint8, device=device.torch_device)
    target = torch.zeros_like(source)
    device.synchronize()

    def copy() -> None:
        with device.load_stream():
            device.load_stream_copy(target.data_ptr(), source.data_ptr(), source.numel())

    with ThreadPoolExecutor(1) as thread:
        thread.submit(copy).result()
    device.synchronize()
    assert target.sum().item() == 1 << 20


@pytest.mark.gpu
def test_an_uploaded_array_arrives_whole() -> None:
    device = CudaDevice()
    with device.forward_stream():
        arrays = [device.upload(np.full(1000, number)) for number in range(50)]
        sums = [int(array.sum()) for array in arrays]
    assert sums == [1000 * number for number in range(50)]
