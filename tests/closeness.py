"""The tolerance policy, in one place. An error is the largest absolute difference, relative to the magnitude of what is
compared: the largest absolute value, and at least 1, because inputs are of order 1 and the kernels' erf cancels to an
absolute error. (An element alone may cancel to zero; an output is a mean of values, and inherits their error.)
"""

import numpy as np
import torch

FLOAT64 = 1e-10
"""Both paths compute the same sums of at most some hundred terms in another order; the largest error of 5,500 random
cases is 4.0e-15. 1e-10 leaves room for longer sums, larger logits and derivatives, while a wrong term, a missing token,
or a detour through float32 (6e-8) is far beyond it."""


def error(actual, expected):
    """The error of `actual` against `expected`, both arrays or tensors of the same shape; infinite where NaN."""
    actual, expected = _float64(actual), _float64(expected)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    if not expected.size:
        return 0.0
    difference = np.abs(actual - expected).max()
    return float(difference / max(1.0, np.abs(expected).max())) if np.isfinite(difference) else np.inf


def error_before_rounding(actual, expected):
    """The least error that `actual`, a tensor, can have had before it was rounded to its dtype."""
    rounded, expected = _float64(actual), _float64(expected)
    exponent = np.frexp(rounded)[1] - 1
    half = torch.finfo(actual.dtype).eps / 2 * 2.0**exponent * (rounded != 0)  # half a unit in the last place
    return error(np.clip(expected, rounded - half, rounded + half), expected)


def assert_close(actual, expected, budget=FLOAT64):
    assert error(actual, expected) <= budget, f"error {error(actual, expected):.2e} is beyond {budget:.2e}"


def _float64(x):
    return x.detach().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, float)


BUDGETS = {
    torch.float32: dict(out=3e-5, first=3e-5, score=2e-6, H=2.5e-5, z=5e-6, rank=2e-6),
    torch.bfloat16: dict(out=6e-3, first=2**-7 + 3e-5, score=2.5e-6, H=8e-2, z=7e-6, rank=2.5e-6),
}
"""Of the fast path against the float64 reference fed with the same rounded bits; rank: by how much an evicted token
outranked a kept one. Frozen at about five times the largest errors of some thousand random cases:

    float32 (5,000)     out 5.5e-6   score 3.9e-7   H 2.2e-6   z 1.1e-6   rank 0
    bfloat16 (2,000)    out 1.1e-3   score 5.0e-7   H 1.1e-2   z 1.4e-6   rank 0

Keys and values are stored in the dtype and everything is computed in float32. So bfloat16 adds the rounding of the output,
which `error_before_rounding` takes off, and that of the state's mean, which is held in float16. But a first chunk that nobody
scores goes through scaled_dot_product_attention, as under a full cache, which rounds the weights of the values too: `first`,
the budget there of the error with all its rounding, allows 2^-8 of the largest twice. Of 1,500 random cases the largest errors
are 4.7e-3 in bfloat16 and 5.5e-4 in float16.

An output errs more than its terms, because the GELU of a negative number cancels: a small phi has few correct digits, and a
large z multiplies it."""

SHIFTED_BY_300 = {
    torch.float32: dict(out=2e-4, first=2e-4, score=5e-5, rank=5e-5),
    torch.bfloat16: dict(out=6e-3, first=2**-7 + 2e-4, score=5e-5, rank=5e-5),
}
"""In place of these three where all logits of a chunk were shifted by 300: float32 holds a logit of 300 to 1.5e-5, and its
exponential errs as much, relatively. Frozen at about five times the largest errors of 1,900 random histories each:

    float32     out 3.6e-5   score 1.0e-5   rank 2.5e-8
    bfloat16               score 9.3e-6   rank 2.5e-8     (out has its usual budget)

A near-tie may be decided wrongly by as much as its scores err, so rank has the budget of score."""

BUDGETS[torch.float16] = dict(out=6e-3, first=2**-10 + 3e-5, score=3e-6, H=8e-2, z=7.5e-6, rank=3e-6)
"""As the others, of 2,000 random cases: out 1.2e-3, score 6.1e-7, H 1.6e-2, z 1.4e-6, rank 0."""

LOGITS_OF_1E4 = dict(out=5e-3, first=5e-3, score=2e-3, H=2e-5, z=4e-6, rank=2e-3)
"""Float32, where logits of 1e4 and -1e4 are among the ordinary ones: float32 holds such a logit to 4.9e-4, and how two of them
share a query's attention errs as much, relatively. Frozen at about five times the largest errors of 6,000 random cases, rank
(0) as score: out 9.4e-4, score 3.6e-4, H 3.6e-6, z 7.7e-7."""

TURNED = {torch.float64: FLOAT64, torch.float32: 1e-6, torch.bfloat16: 2**-8 + 1e-6}
TURNED_IN_EIGHT_BITS = 1 / 254 + 1e-6
"""Of queries and keys that are turned to other positions in a dtype, and of keys that are held in eight bits and rounded again.
Of 200 to 300 random histories of each dtype the largest errors are 0 in float64, 1.1e-7 in float32, 3.7e-3 in bfloat16, which
rounds by at most 2^-8 of the largest, and 3.93e-3 in eight bits, which round by half of a 127th."""

DRIFT = {
    1_000: dict(out=2.5e-6, score=5e-6, H=5e-6, z=5e-6),
    10_000: dict(out=2e-5, score=1.5e-5, H=2e-5, z=1.5e-5),
    100_000: dict(out=3e-5, score=7e-5, H=5e-5, z=5e-5),
}
"""How far float32 may be from float64 after that many single tokens, of which all but 16 are folded, if both evict the same;
out: the largest error of all outputs so far. Frozen at about five times the largest errors of 11, 11 and 4 random streams of
H2O, and 6, 6 and none of a window, which has no scores:

      1,000     out 5.3e-7   score 1.1e-6   H 1.0e-6   z 1.1e-6
     10,000     out 3.6e-6   score 3.1e-6   H 3.8e-6   z 3.4e-6
    100,000     out 5.8e-6   score 1.4e-5   H 9.9e-6   z 1.1e-5

Each addition rounds by up to half a unit in the last place of the sum, so the relative error of n of them grows like the root
of n, three times for each decade. Outputs hardly drift, because they read a mean; the
largest error is that of a query whose phi is small."""
