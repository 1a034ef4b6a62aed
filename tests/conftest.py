"""Strict settings: the CPU in float32, no silent broadcasting, and every annotated shape checked while tests run.

What is in the environment holds for the processes that tests start, too.
"""

import os
import resource
from importlib.metadata import version
from pathlib import Path

# Tests compile much and compute little: without its slowest passes the compiler takes less than half the time.
# jaxlib 0.11 knows the last of these flags no longer, and ends a process that gives it one.
os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'XLA_FLAGS': os.environ.get('XLA_FLAGS', '')
    + (' --xla_cpu_use_fusion_emitters=false' if tuple(map(int, version('jaxlib').split('.')[:2])) < (0, 11) else ''),
    'JAX_COMPILATION_CACHE_DIR': str(Path(__file__).parents[1] / '.jax_cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}

import jax
import jaxtyping
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_num_cpu_devices', 8)  # of this process alone: what tests start has one device

jaxtyping.install_import_hook('qformer_jax', 'beartype.beartype')

pytest_plugins = ['small']  # fixtures of the tests of use: data sets and finished runs, made once


@pytest.fixture(autouse=True, scope='session')
def one_device():
    """Train on one device where a test names no mesh."""
    from qformer_jax.parallel.mesh import data_mesh
    from qformer_jax.training import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'data_mesh', lambda: data_mesh(1))
        yield


@pytest.fixture(autouse=True, scope='module')
def forgetting():
    """Let go of compiled functions once a worker has held 3 GiB: they alone would take 8 by the end."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 3 * 2**20:  # KiB
        jax.clear_caches()
