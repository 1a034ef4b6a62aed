"""Feature arrays that lie on the device: a batch says which it wants, and none is copied there step by step.

A row of ViT-g's features is 1.4 MB in float32, and a step of 128 rows 185 MB, which the host would have to find, pad
and send; of small networks that is most of a step's time. What is taken on the device is the same to the bit.
"""

import functools

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from .. import config
from ..data import pipeline
from ..data.dataset import Dataset
from ..data.preprocess import padded
from ..data.record_cache import MACHINE
from ..parallel.mesh import replicated
from ..typing import Array, Bool, Float
from .stages import STAGES

_SHARE = 4  # a quarter of a device's memory at most


@struct.dataclass
class DeviceFeatures:
    """The features of all records of a split, and which of them exist; a whole copy on each device."""

    features: Float['N P V']
    mask: Bool['N P']

    def join(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Return a batch with the features of its records, which `image_id` tells."""
        return batch | _take(self, batch['image_id'])


@jax.jit
def _take(resident: DeviceFeatures, rows: Array) -> dict[str, Array]:
    return {'features': resident.features[rows], 'feature_mask': resident.mask[rows]}


def fits(run: config.Run, dataset: Dataset) -> bool:
    """Return whether a run reads features of the training split, and all of them fit a quarter of a device's memory."""
    if not (STAGES[run.stage].row_format.pictures and dataset.feature_shape):
        return False
    records = sum(len(part.source(run.data.train_split)) for part in dataset.parts)
    rows = pipeline.patches(run, dataset)
    return records * rows * dataset.feature_shape[1] * 4 <= _memory() // _SHARE


def load(run: config.Run, dataset: Dataset, mesh: Mesh) -> DeviceFeatures:
    """Return all features of the training split on the devices, reading them with progress.

    The next run of this process finds them there, where it reads the same: in a sweep over small networks reading is
    no small part of a run.
    """
    return _read(dataset, dataset.fingerprint, run.data.train_split, pipeline.patches(run, dataset), mesh)


@functools.lru_cache(maxsize=1)
def _read(dataset: Dataset, fingerprint: str, split: str, rows: int, mesh: Mesh) -> DeviceFeatures:
    """Read them; `fingerprint` tells records from others that lay at the same path before."""
    sources = [part.source(split) for part in dataset.parts]
    shape = sum(map(len, sources)), rows, dataset.feature_shape[1]
    features, mask = np.zeros(shape, np.float32), np.zeros(shape[:2], bool)
    console = Console(stderr=True)
    every = (record for source in sources for record in source)
    shown = track(every, 'features to the device', shape[0], console=console, disable=not console.is_terminal)
    for number, record in enumerate(shown):
        features[number], mask[number] = padded(record.features, shape[1])
    return jax.device_put(DeviceFeatures(features, mask), replicated(mesh))


def _memory() -> int:
    """Return the bytes of one device; simulated devices of a CPU share its memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and 'bytes_limit' in stats:
        return stats['bytes_limit']
    return MACHINE // jax.local_device_count()
