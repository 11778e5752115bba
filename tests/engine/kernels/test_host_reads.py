"""Words out of host memory, as they lie and as rows."""

import numpy as np
import pytest
import torch

from engine.device import CudaDevice
from engine.kernels.host_reads import read_host
from engine.uploads import Rows


@pytest.mark.parametrize("num_words", [1, 5, 512, 1300])
def test_words_as_they_lie_leave_what_is_behind_them(num_words: int, device: torch.device) -> None:
    source = torch.randint(-(2**31), 2**31, (num_words,), device=device).int()
    target = torch.full((num_words + 7,), -9, dtype=torch.int32, device=device)
    read_host(source, target, head=num_words, width=1, pitch=1)
    assert torch.equal(target[:num_words], source)
    assert target[num_words:].tolist() == [-9] * 7


@pytest.mark.parametrize(("head", "num_rows", "width", "pitch"), [(0, 3, 2, 5), (700, 9, 130, 131)])
def test_rows_go_where_their_pitch_says_and_leave_what_is_between(
    head: int, num_rows: int, width: int, pitch: int, device: torch.device
) -> None:
    source = torch.arange(1, 1 + head + num_rows * width, dtype=torch.int32, device=device)
    target = torch.full((head + num_rows * pitch,), -9, dtype=torch.int32, device=device)
    read_host(source, target, head, width, pitch)
    assert torch.equal(target[:head], source[:head])
    rows = target[head:].view(num_rows, pitch)
    assert torch.equal(rows[:, :width], source[head:].view(num_rows, width))
    assert (rows[:, width:] == -9).all()


@pytest.mark.gpu
def test_what_is_sent_on_and_on_arrives_although_the_pinned_memory_is_used_again() -> None:
    device = CudaDevice()
    generator = np.random.default_rng(5)
    with device.forward_stream():
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        arrays = [generator.integers(1 << 40, size=200_000) for _ in range(12)]
        uploaded = [device.upload(array) for array in arrays]
    device.synchronize()
    for array, tensor in zip(arrays, uploaded, strict=True):
        assert np.array_equal(tensor.cpu().numpy(), array)


@pytest.mark.gpu
def test_an_array_larger_than_the_pinned_memory_arrives_in_order() -> None:
    device = CudaDevice()
    target = torch.zeros(5 << 20, dtype=torch.int32, device=device.torch_device)
    device.synchronize()
    rows = Rows(head=10, width=300, pitch=500)
    words = np.arange(10 + 300 * 9_000, dtype=np.int32)
    device.upload_into(words, target, rows)
    device.upload_into(np.array([-1], dtype=np.int32), target[:1])
    device.synchronize()
    assert target[:11].tolist() == [-1, *range(1, 11)]
    last = target[10 + 500 * 8_999 :][:300]
    assert last.tolist() == words[-300:].tolist()
