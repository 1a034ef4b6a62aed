"""How far an array may be from what was recorded.

**float32.** Ten times what float32 itself does to it, and never more than 1e-5 of its scale (its largest entry). What
float32 does is measured: the same code on the same inputs in float64; the largest difference is the noise (stored in
CASE/noise.json where that was done before). It counts as
at least one float32 epsilon of the scale, for a sum that happens to round well here rounds otherwise there. Gradients:
1e-5 of the tensor's largest entry. Ids: equal.

**bfloat16.** The same code with bfloat16 products against the recorded float32, in epsilons (2**-7) of the scale,
chosen by measurement on a CPU and an H100. Arrays: at most 9.4 % (the gap between the two best logits, itself a
difference). Gradients: at most 16 % (29 % in the ViT), but 43 % where ITC's maximum over the queries goes to another
query: two of 36 do on the H100, whose similarities float32 puts 1.0e-3 and 2.8e-3 apart while bfloat16 moves them by
1e-2. What decides something must be float32 all the same.
"""

import re

import numpy as np

from .report import scale

LIMIT = 1e-5
NOISE_FACTOR = 10
EPSILON = float(np.finfo(np.float32).eps)
BFLOAT16_EPSILON = 2.0**-7
BFLOAT16_FACTOR = 16  # 12.5 %
BFLOAT16_GRADIENT_FACTOR = 64  # 50 %


def is_ids(array: np.ndarray) -> bool:
    """Whether an array counts or names things: it must then be equal."""
    return not np.issubdtype(array.dtype, np.floating)


def float32(expected: np.ndarray, noise: float) -> float:
    """Return the tolerance of an array from the largest difference between our own float32 and float64 results."""
    if is_ids(expected):
        return 0.0
    size = scale(expected)
    return min(NOISE_FACTOR * max(noise, EPSILON * size), LIMIT * size)


def gradient(expected: np.ndarray) -> float:
    """Return the tolerance of a gradient in float32."""
    return LIMIT * scale(expected)


def bfloat16(expected: np.ndarray, is_gradient: bool) -> float:
    """Return the tolerance of an array in bfloat16."""
    factor = BFLOAT16_GRADIENT_FACTOR if is_gradient else BFLOAT16_FACTOR
    return 0.0 if is_ids(expected) else factor * BFLOAT16_EPSILON * scale(expected)


_DECIDES = re.compile(
    r'(.*[. ])?(loss(_\w+)?|\w*logits|\w*scores?|sims?(_\w+)?|weights_\w+|it[mc]_(each|batch)|\w+_proj|\w+_feats?)'
)


def decides(name: str) -> bool:
    """Whether an array must be float32 in any precision: losses, logits, scores, similarities, and what they are of."""
    return _DECIDES.fullmatch(name) is not None
