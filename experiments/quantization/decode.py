"""Speed and memory of decoding with weights in 16, 8 and 4 bits: BLIP-2's OPT-2.7B after its soft prefix.

    python -m experiments.quantization.decode                  (one GPU, minutes)
    python -m experiments.quantization.decode --size tiny      (anywhere, to see that it runs)

Weights are random, at the published sizes, the whole BLIP-2 with its ViT-g: they are made on the device one at a time
and quantized at once, as `Blip2.load(..., weights=...)` does. Every variant has a process of its own, so its peak is
its own. A step is one new token of every row; reading prefix and prompt is not counted. `int8, matrix product` widens
the weights for a product also where there are few rows. `--what products` compares the products alone, whose crossing
point is `FEW_ROWS` of `models/quantized.py`. One JSON line a variant on standard output, also into --out.
"""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from qformer_jax import config, presets
from qformer_jax.errors import command
from qformer_jax.inference import decode, quantize
from qformer_jax.inference.generate import GenerationConfig, generate
from qformer_jax.models import blip2, quantized
from qformer_jax.rules import flatten
from qformer_jax.typing import Array, Params

SIZES = {
    'published': config.Blip2Config(qformer=config.QformerConfig(text_side='none')),
    'tiny': config.Blip2Config(
        dataclasses.replace(presets.TINY_VIT, depth=1),
        dataclasses.replace(presets.TINY_QFORMER, text_side='none', feature_width=64, vocab_size=100),
        dataclasses.replace(presets.TINY_OPT, vocab_size=100, max_positions=256),
    ),
}
VARIANTS = ('bfloat16', 'int8', 'int8, matrix product', 'int4')
PROMPT = 8  # tokens, beside 32 of the soft prefix


@dataclass(frozen=True)
class Options:
    """Measure decoding."""

    size: Literal['published', 'tiny'] = 'published'
    """Sizes of the networks."""
    what: Literal['steps', 'products'] = 'steps'
    """Whole steps, or products of single layers."""
    variant: Literal['', *VARIANTS] = ''
    """One variant, in this process; default: each in a process of its own."""
    batch: tuple[int, ...] = (1, 16)
    """Rows that decode together."""
    tokens: int = 65
    """New tokens a row: one of the prefix, the others a step each."""
    repeats: int = 7
    """Timed runs, after one that compiles; the median counts."""
    out: Path | None = None
    """File that the lines are appended to."""


def main(options: Options) -> None:
    """Print a JSON line for each variant and batch size."""
    if options.what == 'products':
        return products(options)
    if options.variant:
        return steps(options, options.variant)
    for variant in VARIANTS:
        words = [f'--{name}={getattr(options, name)}' for name in ('size', 'tokens', 'repeats')]
        words += ['--batch', *map(str, options.batch)] + ([f'--out={options.out}'] if options.out else [])
        command = [sys.executable, '-m', 'experiments.quantization.decode', f'--variant={variant}', *words]
        if subprocess.run(command).returncode:  # the others may still run
            say(options, {'variant': variant, 'failed': True})


def say(options: Options, row: dict) -> None:
    """Print a result, and append it to the file."""
    line = json.dumps(row)
    print(line, flush=True)
    if options.out:
        with options.out.open('a') as file:
            file.write(f'{line}\n')


def steps(options: Options, variant: str) -> None:
    """Measure one variant with every batch size."""
    if variant == 'int8, matrix product':
        quantized.FEW_ROWS = 0
    model = blip2.Blip2Module(SIZES[options.size], jnp.bfloat16)
    params = quantize.on_device(random_weights(model.config), None if variant == 'bfloat16' else variant.split(',')[0])
    jax.block_until_ready(params)
    held, loading = quantize.size(params), peak()
    for batch in options.batch:
        seconds = step_seconds(model, params, batch, options)
        say(
            options,
            {
                'variant': variant,
                'batch': batch,
                'ms a step': round(seconds * 1e3, 4),
                'tokens/s': round(batch / seconds, 1),
                'weights, GiB': round(held / 2**30, 3),
                'peak while loading, GiB': loading,
                'peak so far, GiB': peak(),
                'device': jax.devices()[0].device_kind,
                'jax': jax.__version__,
            },
        )


def random_weights(c: config.Blip2Config) -> Iterator[tuple[str, Array]]:
    """Yield parameters by path, one at a time: towers in bfloat16, the Q-Former in float32."""
    for count, (path, shape) in enumerate(flatten(blip2.shapes(c)).items()):
        dtype = jnp.bfloat16 if path.startswith(('vit/', 'lm/')) else jnp.float32
        yield path, draw(jax.random.key(count), shape.shape, dtype, path.endswith('scale'))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw(key: Array, shape: tuple[int, ...], dtype, gain: bool) -> Array:
    """Return normal numbers that keep the variance of a product."""
    return (jax.random.normal(key, shape, dtype) * (shape[0] ** -0.5 if shape else 1) + gain).astype(dtype)


def peak() -> float | None:
    """Return the largest number of bytes in use on the device so far, in GiB; None where the device does not say."""
    stats = jax.devices()[0].memory_stats()
    return round(stats['peak_bytes_in_use'] / 2**30, 3) if stats else None


def step_seconds(model: blip2.Blip2Module, params: Params, batch: int, options: Options) -> float:
    """Return the median time of a step."""
    c, settings = model.config, GenerationConfig(max_new_tokens=options.tokens)
    prefix = jax.random.normal(jax.random.key(0), (batch, c.qformer.num_queries, c.lm.width), model.dtype)
    prompt = jnp.full((batch, PROMPT), 7)
    given = blip2.Prefix.whole(prefix), prompt, jnp.ones(prompt.shape, bool)

    @jax.jit
    def read(params):
        return decode.prefill_lm(model, params, *given, options.tokens)[1]

    @jax.jit
    def write(params, start):
        step, _ = decode.prefill_lm(model, params, *given, options.tokens)  # its start is not used: not computed
        return generate(step, start, settings)

    start = read(params)
    return median_seconds(lambda: write(params, start), options.repeats) / (options.tokens - 1)


def median_seconds(run: Callable, repeats: int) -> float:
    """Return the median time of `run()`, after a call that compiles and one that warms up."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))


def products(options: Options) -> None:
    """Measure the products of the MLP's first layer, by form and rows; each reads other weights than the one before."""
    lm, layers = SIZES[options.size].lm, 24
    shape = (lm.mlp_width, lm.width)
    wide = [draw(jax.random.key(i), shape, jnp.bfloat16, False) for i in range(layers)]
    eight, four = ([jax.jit(quantized.quantize, static_argnums=1)(w, bits) for w in wide] for bits in (8, 4))
    for name, weights, few in (
        ('bfloat16', wide, 0),
        ('int8, matrix product', eight, 0),
        ('int8, multiply and add', eight, 10**6),
        ('int4, matrix product', four, 0),
        ('int4, multiply and add', four, 10**6),
    ):
        for rows in (1, 2, 4, 5, 8, 16, 32):
            quantized.FEW_ROWS = few
            x = jax.random.normal(jax.random.key(9), (rows, lm.width), jnp.bfloat16)
            chain = jax.jit(
                functools.partial(through, multiply_wide if weights is wide else quantized.quantized_matmul)
            )
            seconds = median_seconds(lambda: chain(x, weights), options.repeats) / layers  # noqa: B023, used at once
            say(options, {'product': name, 'rows': rows, 'shape': shape, 'us': round(seconds * 1e6, 2)})


def multiply_wide(x: Array, rows: Array) -> Array:
    """Return the product with weights in bfloat16."""
    return jnp.einsum('ri,oi->ro', x, rows)


def through(product: Callable, x: Array, weights: list) -> Array:
    """Return `x` after all products, each of which waits for the one before."""
    for rows in weights:
        x = x + 1e-3 * product(x, rows)[:, : x.shape[1]].astype(x.dtype)
    return x


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
