"""Arithmetic of launches on plain numbers. Triton's own serves kernels' constants too and takes 1.5 us a call."""


def cdiv(a: int, b: int) -> int:
    """a over b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n ≥ 1."""
    return 1 << (n - 1).bit_length()
