"""Feature arrays [P, V] as they are given, in a file or by a caller: checked alike."""

from pathlib import Path

import ml_dtypes
import numpy as np

from ..errors import UserError


def read(file: Path) -> np.ndarray:
    """Return the array [P, V] of an .npy file; raises UserError when it is anything else, or not as `checked` wants."""
    try:
        # Mapped first: a header that declares more than the file holds is then refused, and no memory is asked for.
        array = np.array(np.lib.format.open_memmap(file, mode='r'), subok=False)
    except Exception as error:  # of bytes that anybody may have written
        raise UserError(f'{file}: not an .npy array of numbers; write it with numpy.save') from error
    return checked(array, str(file))


def checked(array: np.ndarray, name: str) -> np.ndarray:
    """Return features [P, V] in float32, of float16 as they are.

    Raises UserError (with `name`) for another number of axes, no values, numbers that are no floats, and values that
    are not finite in float32.
    """
    if array.ndim != 2 or 0 in array.shape or not (array.dtype.kind == 'f' or array.dtype == ml_dtypes.bfloat16):
        raise UserError(f'{name}: expected floats [P, V], found {array.dtype} {list(array.shape)}')
    with np.errstate(all='ignore'):  # what does not fit becomes infinite, and is refused below
        single = array if array.dtype == np.float16 else array.astype(np.float32)
    if not np.isfinite(single).all():
        raise UserError(f'{name}: holds values that are not finite in float32; encode this item again or leave it out')
    return single
