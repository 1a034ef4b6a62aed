"""Strict settings: the CPU in float32, no silent broadcasting, and every annotated shape checked while tests run.

What is in the environment holds for the processes that tests start, too.
"""

import os
import resource
from pathlib import Path

# Tests compile much and compute little: without its slowest passes the compiler takes less than half the time.
os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_use_fusion_emitters=false',
    'JAX_COMPILATION_CACHE_DIR': str(Path(__file__).parents[1] / '.jax_cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}

import jax
import jaxtyping
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')

jaxtyping.install_import_hook('qformer_jax', 'beartype.beartype')

pytest_plugins = ['small']  # fixtures of the tests of use: data sets and finished runs, made once


@pytest.fixture(autouse=True, scope='module')
def forgetting():
    """Let go of compiled functions once a worker has held 3 GiB: they alone would take 8 by the end."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 3 * 2**20:  # KiB
        jax.clear_caches()
