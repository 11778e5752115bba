"""Kernels run on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def same_numbers_every_time(seed: int) -> None:
    torch.manual_seed(seed)
