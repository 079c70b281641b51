"""What a slot stores of a key or a value: its numbers as they are, or each in eight bits. Then a slot is the scale, the bytes of
a float32, and behind it D whole numbers from -127 to 127, so that it moves about as one row. A departure from the paper."""

import torch

from .checks import LessError

SCALE = 4  # bytes
LARGEST = 127  # the largest number of a key or value is stored as this


def width(head_dim: int) -> int:
    """Bytes of one in eight bits. LessError for a head_dim of which rows would not lie where a float32 can."""
    if head_dim % SCALE:
        raise LessError(f"int8 needs a head_dim that is a multiple of {SCALE}, not {head_dim}: leave int8 out")
    return SCALE + head_dim


def packed(x: torch.Tensor) -> torch.Tensor:
    """x (..., D) -> (..., 4 + D) int8: the largest number of each row becomes 127, all others are rounded, halves to even.

    What is unpacked and packed again keeps its bits: a float32 that was divided by 127 stays itself, times 127 and divided again.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / LARGEST  # (..., 1)
    whole = (x / torch.where(scale > 0, scale, 1)).round().to(torch.int8)
    return torch.cat([scale.view(torch.int8), whole], -1)


def unpacked(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(..., 4 + D) int8 -> (..., D) in the dtype. What is stored as it is comes back as it is, in its own."""
    if stored.dtype != torch.int8:
        return stored
    scale = stored[..., :SCALE].view(torch.float32).to(dtype)  # (..., 1)
    whole = stored.to(dtype)[..., SCALE:]  # rows are converted faster whole, scale and all
    if torch.compiler.is_compiling():
        return whole * scale
    return whole.mul_(scale)  # in the memory made just now, which compiled code does without
