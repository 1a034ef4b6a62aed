"""Strict settings: the CPU in float32, no silent broadcasting, and every annotated shape checked while tests run."""

import os
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jaxtyping

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_disable_most_optimizations', True)  # tests compile much and compute little: half the time
jax.config.update('jax_compilation_cache_dir', str(Path(__file__).parents[1] / '.jax_cache'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)

jaxtyping.install_import_hook('qformer_jax', 'beartype.beartype')

pytest_plugins = ['small']  # fixtures of the tests of use: data sets and finished runs, made once
