"""Devices as a mesh with one axis, `data`: batches are split over it, parameters are copied to each device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..errors import UserError


def data_mesh(devices: int = 0) -> Mesh:
    """Return the mesh of the first `devices` devices; 0: of all devices of all processes."""
    count = devices or jax.device_count()
    return jax.make_mesh((count,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Raise UserError when a batch does not divide over devices and micro-batches."""
    parts = mesh.size * accumulate
    if batch_size % parts:
        raise UserError(
            f'batch size {batch_size} does not divide over {mesh.size} device(s) x {accumulate} micro-batch(es): '
            f'use a multiple of {parts}, such as {max(parts, batch_size // parts * parts)}'
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of parameters: a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], rows_split: bool = True) -> dict[str, jax.Array]:
    """Return this process's rows as arrays of the global batch: split over `data`, or the same rows on each device."""
    sharding = NamedSharding(mesh, PartitionSpec('data' if rows_split else None))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
