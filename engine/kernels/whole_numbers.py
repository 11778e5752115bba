"""What launches are cut by.

Triton's own functions of these names are made for kernels: called on the host, each takes some
microseconds, and a prefill calls them a thousand times.
"""


def cdiv(number: int, divisor: int) -> int:
    """``number / divisor``, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below ``number``, which is above 0."""
    return 1 << (number - 1).bit_length()
