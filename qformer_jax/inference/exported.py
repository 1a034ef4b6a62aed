"""Serves the files beside it: python run.py PICTURE ["TEXT"].

A model that writes describes the picture, or answers TEXT; one that finds prints how well TEXT fits (ITC's cosine).
Where a model was trained on feature arrays, PICTURE is a .npy file; for one of videos, it is a folder of frames.

Needs jax, flatbuffers, numpy, safetensors, tokenizers and Pillow. Every size that comes for the first time is compiled;
JAX_COMPILATION_CACHE_DIR=FOLDER keeps that for the next start.
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


def clean(text, blank):
    """Return a text as training cleaned it: punctuation made a blank in captions, nothing in questions."""
    text = re.sub(r'[.!"()*#:;~]', blank, text.lower())
    text = re.sub(r'\s{2,}', ' ', text).rstrip('\n').strip(' ') if blank else text.rstrip(' ')
    return ' '.join(text.split(' ')[:50])


class Served:
    """What export.json says, the functions by name with their weights, and the tokenizers."""

    def __init__(self, folder):
        self.about = json.loads((folder / 'export.json').read_text())
        self.functions, self.tokenizers = {}, {}
        weights = load_file(folder / 'weights.safetensors')
        for name, function in self.about['functions'].items():
            call = jax.export.deserialize(bytearray((folder / f'{name}.stablehlo').read_bytes())).call
            used = {path: array for path, array in weights.items() if path.split('/')[0] in function['weights']}
            self.functions[name] = partial(jax.jit(call, donate_argnums=2 if name == 'step' else ()), used)
        for kind in {'tokens', 'text'} & self.about.keys():
            self.tokenizers[kind] = Tokenizer.from_file(str(folder / self.about[kind]['file']))
            self.tokenizers[kind].encode_special_tokens = True  # a "</s>" that somebody types is text

    def ids(self, kind, text):
        """Return the ids of a text, no special token added."""
        return self.tokenizers[kind].encode(text, add_special_tokens=False).ids

    def see(self, picture):
        """Return pixels [1, S, S, 3], of a video [1, F, S, S, 3], or features [1, P, V]; and which of these exist."""
        if not self.about['image']:
            features = np.load(picture)[None].astype(np.float32)
            return features, np.ones(features.shape[:2], bool)
        size = self.about['image']['size'], self.about['image']['size']
        files = sorted(Path(picture).iterdir()) if Path(picture).is_dir() else [picture]
        seen = [np.asarray(Image.open(file).convert('RGB').resize(size, Image.Resampling.BICUBIC)) for file in files]
        return (np.stack([seen]), np.ones((1, len(seen)), bool)) if self.about['image']['video'] else (seen[0][None],)

    def text(self, text):
        """Return ids and mask [1, T] of what the Q-Former reads."""
        marks = self.about['text']
        ids = self.ids('text', text)[: marks['length'] - 2]
        ids = [marks['begin'], *ids, marks['end']]
        padded = ids + [marks['pad']] * (marks['length'] - len(ids))
        return np.array([padded], np.int32), np.arange(marks['length'])[None] < len(ids)

    def prompt(self, text, beside):
        """Return ids and mask [1, T] of a prompt, padded at the left to few lengths that leave room beside it."""
        marks = self.about['tokens']
        ids = [*marks['begin'], *self.ids('tokens', text.rstrip()), *marks['close']]
        multiple = -(-len(ids) // marks['multiple']) * marks['multiple']
        length = max(1, len(ids), min(multiple, marks.get('limit', multiple + beside) - beside))
        holes = length - len(ids)
        return np.array([[marks['pad']] * holes + ids], np.int32), np.arange(length)[None] >= holes

    def write(self, picture, question=''):
        """Return the caption of a picture or the answer to a question, greedily."""
        task = self.about['question' if question else 'caption']
        prompt = task['prompt'].format(question=clean(question.strip(), '')) if question else task['prompt']
        reads = self.text(prompt) if 'text' in self.about else ()
        prefix, exists = self.functions['encode'](*self.see(picture), *reads)
        in_front = exists.shape[1] if self.about['tokens']['in_front'] else 0
        ids, mask = self.prompt(prompt, in_front + task['max_new_tokens'])
        logits, state = self.functions['prefill'](prefix, exists, ids, mask, np.ones(task['max_new_tokens'], bool))
        written, end = [int(logits.argmax())], self.about['tokens']['end']
        while written[-1] != end and len(written) < task['max_new_tokens']:
            logits, state = self.functions['step'](np.array(written[-1:], np.int32), state)
            written.append(int(logits.argmax()))
        return self.tokenizers['tokens'].decode([i for i in written if i != end]).strip()

    def fit(self, picture, text):
        """Return the cosine of a text and the query of a picture that fits it best."""
        queries, vector = (
            self.functions['image'](*self.see(picture)),
            self.functions['text'](*self.text(clean(text, ' '))),
        )
        return float((queries[0] @ vector[0]).max())


if __name__ == '__main__':
    if not sys.argv[1:]:
        sys.exit(__doc__)
    served = Served(Path(__file__).parent)
    print((served.write if 'tokens' in served.about else served.fit)(*sys.argv[1:]))
