"""Strict settings: the CPU in float32, no silent broadcasting, and every annotated shape checked while tests run.

What is in the environment holds for the processes that tests start, too.
"""

import gc
import os
import re
import resource
from importlib.metadata import version
from pathlib import Path

import slow

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is slow, and put tests against torch first: one worker imports it for all of them."""
    used = set()
    for item in items:
        name = f'{item.path.stem}::{item.name}'
        rule, reason = next(pair for pair in slow.RULES if re.fullmatch(pair[0], name))
        used.add(rule)
        if reason:
            item.add_marker(pytest.mark.slow(reason=reason))
    whole = config.args == config.getini('testpaths') and not config.option.ignore
    if whole and (idle := {rule for rule, _ in slow.RULES} - used):
        raise pytest.UsageError(f'tests/slow.py: no test matches {sorted(idle)}')
    items.sort(key=lambda item: not item.path.stem.startswith(('test_huggingface_compare', 'test_bert', 'test_parity')))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported, and look less often: it took 3 to 8 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


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
