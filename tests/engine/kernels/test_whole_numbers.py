"""On the host as in kernels."""

import triton

from engine.kernels.whole_numbers import cdiv, next_power_of_2


def test_they_are_triton_s() -> None:
    for number in (*range(1, 70), 1023, 1024, 1025, (1 << 20) + 1):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        assert [cdiv(number, d) for d in (1, 7, 64)] == [triton.cdiv(number, d) for d in (1, 7, 64)]
    assert cdiv(0, 16) == 0
