"""Runs the files beside it: python run.py PICTURE ["QUESTION"].

Needs jax, flatbuffers, numpy, safetensors, tokenizers and Pillow. The picture is described, or the question answered;
where the model was trained on feature arrays, PICTURE is a .npy file. Every size that comes for the first time is
compiled; JAX_COMPILATION_CACHE_DIR=FOLDER keeps that for the next start.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.export
import numpy as np
from PIL import Image
from safetensors.flax import load_file
from tokenizers import Tokenizer


def load(folder):
    """Return what export.json says, and the functions by name, their weights given."""
    about = json.loads((folder / 'export.json').read_text())
    weights, functions = load_file(folder / 'weights.safetensors'), {}
    for name, function in about['functions'].items():
        call = jax.export.deserialize(bytearray((folder / f'{name}.stablehlo').read_bytes())).call
        used = {path: array for path, array in weights.items() if path.split('/')[0] in function['weights']}
        functions[name] = partial(jax.jit(call, donate_argnums=2 if name == 'step' else ()), used)
    return about, functions


def see(about, picture):
    """Return pixels [1, S, S, 3], or a feature array [1, P, V] and which of its rows exist."""
    if about['image'] is None:
        features = np.load(picture)[None].astype(np.float32)
        return features, np.ones(features.shape[:2], bool)
    size = about['image']['size']
    return (np.asarray(Image.open(picture).convert('RGB').resize((size, size), Image.Resampling.BICUBIC))[None],)


def ids_of(folder, marks, text):
    """Return the ids of a text, and its tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / marks['file']))
    tokenizer.encode_special_tokens = True  # a "</s>" that somebody types is text
    return tokenizer.encode(text, add_special_tokens=False).ids, tokenizer


def instruction(folder, about, text):
    """Return ids and mask [1, T] of what the Q-Former reads, if it does."""
    if 'text' not in about:
        return ()
    marks = about['text']
    clean = re.sub(r'[.!"()*#:;~]', '', text.lower()).rstrip(' ').split(' ')[:50]
    ids = [marks['begin'], *ids_of(folder, marks, ' '.join(clean))[0][: marks['length'] - 2], marks['end']]
    padded = ids + [marks['pad']] * (marks['length'] - len(ids))
    return np.array([padded], np.int32), np.arange(marks['length'])[None] < len(ids)


def prompt_of(folder, about, text):
    """Return ids and mask [1, T] of a prompt, padded at the left (few lengths, few compilations), and the tokenizer."""
    marks = about['tokens']
    ids, tokenizer = ids_of(folder, marks, text.rstrip())
    ids = [*marks['begin'], *ids, *marks['close']]
    holes = -len(ids) % marks['multiple'] if ids else marks['multiple']
    return np.array([[marks['pad']] * holes + ids], np.int32), np.arange(holes + len(ids))[None] >= holes, tokenizer


def write(folder, picture, question=''):
    """Return the caption of a picture or the answer to a question, greedily."""
    about, functions = load(folder)
    task = about['question' if question else 'caption']
    prompt = task['prompt'].format(question=question.lower().strip()) if question else task['prompt']
    prefix = functions['encode'](*see(about, picture), *instruction(folder, about, question or prompt))
    ids, mask, tokenizer = prompt_of(folder, about, prompt)
    logits, state = functions['prefill'](prefix, ids, mask, np.ones(task['max_new_tokens'], bool))
    written, end = [int(logits.argmax())], about['tokens']['end']
    while written[-1] != end and len(written) < task['max_new_tokens']:
        logits, state = functions['step'](np.array(written[-1:], np.int32), state)
        written.append(int(logits.argmax()))
    return tokenizer.decode([i for i in written if i != end]).strip()


if __name__ == '__main__':
    print(write(Path(__file__).parent, *sys.argv[1:]) if sys.argv[1:] else __doc__)
