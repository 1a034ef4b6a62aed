"""Peak memory of converting a checkpoint of 7.7 billion parameters: BLIP-2 OPT-6.7B in Hugging Face's layout, float16.

    python -m experiments.numerics.memory --folder big

The shards have the published keys and shapes and are sparse files (all zeros, 15.5 GB that take no room on the disk);
the result does (15.5 GB, removed at the end). Each conversion runs in a process of its own; the figure is the largest
resident set that the system saw, and it must stay under 1.3 times the largest shard.
"""

import json
import math
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tyro

from qformer_jax import config, presets
from qformer_jax.convert import huggingface, huggingface_config, safetensors_writer
from qformer_jax.convert.lazy_tensors import State, Tensor
from qformer_jax.convert.table import to_torch
from qformer_jax.errors import command
from qformer_jax.models import blip2
from qformer_jax.rules import flatten

from .results import record

COMMAND = 'python -m experiments.numerics.memory --folder big'
MODEL = config.Blip2Config(
    qformer=replace(presets.QFORMER_G, text_side='none'), lm=replace(presets.OPT_6_7B, vocab_size=50304)
)
SHARD = 5 * 10**9


@dataclass(frozen=True)
class Options:
    """Convert a large checkpoint and watch the memory."""

    folder: Path
    """Where to write; 16 GB must be free."""


def main(options: Options) -> None:
    """Measure both directions; raises SystemExit when one needs too much."""
    options.folder.mkdir(parents=True)
    state = sparse_state()
    largest = write_sparse(options.folder / 'theirs', state)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(blip2.shapes(MODEL)))
    print(f'{count:,} parameters, largest shard {largest / 1e9:.2f} GB')
    figures = {'parameters': count, 'largest shard, bytes': largest}
    for name, source, dest, to in (('in', 'theirs', 'runs/ours', 'ours'), ('out', 'runs/ours', 'again', 'huggingface')):
        began = time.monotonic()
        convert(options.folder / source, options.folder / dest, to)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # the larger of all so far
        figures |= {f'{name}: peak, bytes': peak, f'{name}: seconds': round(time.monotonic() - began)}
        print(f'{name}: peak {peak / 1e9:.2f} GB, {peak / largest:.2f} of the largest shard')
    shutil.rmtree(options.folder)
    what = 'conversion of 7.7 billion parameters (BLIP-2 OPT-6.7B, float16, sparse)'
    record(what, COMMAND, figures, ('numpy', 'safetensors'))
    if peak > 1.3 * largest:
        raise SystemExit('peak memory is above 1.3 times the largest shard')


def sparse_state() -> State:
    """Return the keys and shapes that Hugging Face publishes, in float16."""
    jax_state = {
        path: Tensor(x.shape, np.dtype('float16'), _unread) for path, x in flatten(blip2.shapes(MODEL)).items()
    }
    return to_torch(huggingface.blip2(MODEL), jax_state)


def _unread() -> np.ndarray:
    raise AssertionError('only the shape is known')


def write_sparse(folder: Path, state: State) -> int:
    """Write shards of zeros that take no room, their index and config.json; returns the size of the largest."""
    folder.mkdir()
    shards = safetensors_writer.shards(state, None, SHARD)
    for name, shard in shards.items():
        start = safetensors_writer.header(shard)
        with (folder / name).open('wb') as file:
            file.write(start)
            file.truncate(len(start) + sum(x.size * x.dtype.itemsize for x in shard.values()))
    where = {key: name for name, shard in shards.items() for key in shard}
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': where}))
    (folder / 'config.json').write_text(json.dumps(huggingface_config.of_model(MODEL)))
    return max((folder / name).stat().st_size for name in shards)


def convert(source: Path, dest: Path, to: str) -> None:
    """Run the command in a process of its own."""
    command = [sys.executable, '-m', 'qformer_jax', 'convert', str(source), str(dest), '--to', to]
    subprocess.run(command, check=True)


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
