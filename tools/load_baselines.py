"""What a machine gives with nothing else to do: the rates, in GB/s, to compare loading with."""

import ctypes
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engine.device import Device
from loader.native.casts import check_bfloat16
from loader.native.runs import Fault

GB = 1e9
MiB = 1 << 20
# Larger ones bring nothing, smaller ones have the threads wait for each other.
READ_BLOCK_BYTES = 4 * MiB
COPY_BLOCK_BYTES = 32 * MiB
_CONVERTER = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def median_rate(num_bytes: int, repeats: int, run: Callable[[], float]) -> float:
    """GB/s of the median of ``repeats`` runs, each of which tells its seconds."""
    return num_bytes / statistics.median(run() for _ in range(repeats)) / GB


def copy_rate(device: Device, buffer: torch.Tensor, chunk_bytes: int) -> float:
    """GB/s from ``buffer``, pinned if there is a GPU, chunk by chunk into device memory."""
    target = torch.empty(chunk_bytes, dtype=torch.uint8, device=device.torch_device)
    starts = range(0, buffer.numel(), chunk_bytes)
    chunks = [buffer[start : start + chunk_bytes] for start in starts]

    def run() -> float:
        device.synchronize()
        begin_s = time.perf_counter()
        for chunk in chunks:
            target[: chunk.numel()].copy_(chunk, non_blocking=True)
        device.synchronize()
        return time.perf_counter() - begin_s

    run()
    return median_rate(buffer.numel(), 7, run)


def read_rate(path: Path, buffer: memoryview, num_threads: int) -> float:
    """GB/s of ``num_threads`` threads that do nothing but ``preadv`` into ``buffer``."""
    read_seconds(path, buffer, num_threads)
    return median_rate(buffer.nbytes, 5, lambda: read_seconds(path, buffer, num_threads))


def read_seconds(path: Path, buffer: memoryview, num_threads: int, offset: int = 0) -> float:
    """What one such read takes, of as many bytes from ``offset`` on.

    Where in a page they begin matters: with the loader's reads compare one from the same place.
    """
    fd = os.open(path, os.O_RDONLY)
    blocks = itertools.count(0, READ_BLOCK_BYTES)
    begin = threading.Barrier(num_threads + 1)

    def read() -> None:
        begin.wait()
        while (start := next(blocks)) < buffer.nbytes:
            os.preadv(fd, [buffer[start : start + READ_BLOCK_BYTES]], offset + start)

    threads = [threading.Thread(target=read) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    begin.wait()
    begin_s = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin_s
    os.close(fd)
    return seconds


def read_and_copy_rate(device: Device, path: Path, buffer: torch.Tensor, num_threads: int) -> float:
    """GB/s of as many threads that read into ``buffer`` while what they have read is copied on.

    Reading, and the device's fetching, share the host's memory: where that is what bounds them,
    this is less than ``read_rate``.
    """
    target = torch.empty(COPY_BLOCK_BYTES, dtype=torch.uint8, device=device.torch_device)

    def run() -> float:
        device.synchronize()
        return _read_and_copy_seconds(device, path, buffer, target, num_threads)

    run()
    return median_rate(buffer.numel(), 5, run)


def _read_and_copy_seconds(
    device: Device, path: Path, buffer: torch.Tensor, target: torch.Tensor, num_threads: int
) -> float:
    fd = os.open(path, os.O_RDONLY)
    view = buffer.numpy().data
    starts = iter(range(0, view.nbytes, READ_BLOCK_BYTES))
    finished = [threading.Event() for _ in range(-(-view.nbytes // READ_BLOCK_BYTES))]

    def read() -> None:
        # Taking the next start is one step of the interpreter: threads need no lock for it.
        for start in starts:
            os.preadv(fd, [view[start : start + READ_BLOCK_BYTES]], start)
            finished[start // READ_BLOCK_BYTES].set()

    threads = [threading.Thread(target=read) for _ in range(num_threads)]
    begin_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for start in range(0, view.nbytes, COPY_BLOCK_BYTES):
        chunk = buffer[start : start + COPY_BLOCK_BYTES]
        first = start // READ_BLOCK_BYTES
        for block in finished[first : first + COPY_BLOCK_BYTES // READ_BLOCK_BYTES]:
            block.wait()
        target[: chunk.numel()].copy_(chunk, non_blocking=True)
    device.synchronize()
    seconds = time.perf_counter() - begin_s
    for thread in threads:
        thread.join()
    os.close(fd)
    return seconds


def check_rate(buffer: memoryview, tile_bytes: int) -> float:
    """GB/s of the check for finite values on one core, of bytes that are in its cache."""
    tile = np.frombuffer(buffer[:tile_bytes], np.uint16) & np.uint16(0xBFFF)
    check = _CONVERTER(check_bfloat16.address)
    num_rounds = max(1, 256 * MiB // tile_bytes)

    def run() -> float:
        begin_s = time.perf_counter()
        for _ in range(num_rounds):
            assert check(tile.ctypes.data, tile.ctypes.data, tile.size) == Fault.NONE
        return time.perf_counter() - begin_s

    run()
    return median_rate(num_rounds * tile_bytes, 3, run)
