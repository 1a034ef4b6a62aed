"""Serves the files beside it: python run.py PICTURE ["TEXT" | --where "PHRASE"].

A model that writes describes the picture, or answers TEXT; one that finds prints how well TEXT fits (ITC's cosine); one
that has words for boxes prints those of PHRASE, a line each: left, top, right and bottom, as shares of the picture.
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
        return self.tokenizers['tokens'].decode(self.written(picture, task, prompt, prompt)).strip()

    def where(self, picture, phrase):
        """Return the boxes of a phrase, each from the middle of one cell of a grid to that of another."""
        if 'phrase' not in self.about:
            sys.exit('this model has no words for boxes: ask it with a TEXT')
        task, boxes = self.about['phrase'], []
        prompt = task['prompt'].format(phrase=clean(phrase, ' '))
        ids = self.written(picture, task, prompt, re.sub('<[^>]*>', '', prompt))
        words = ''.join(map(self.tokenizers['tokens'].id_to_token, ids))
        for said in re.findall('<object>(.*?)</object>', words):
            for part in said.split('</delimiter_of_multi_objects/>'):
                cells = [divmod(int(cell), task['grid']) for cell in re.findall(r'<patch_index_(\d+)>', part)]
                if len(cells) == 2 and cells[0][0] <= cells[1][0] and cells[0][1] <= cells[1][1]:
                    (top, left), (bottom, right) = cells
                    before, after = (0, 1) if top == bottom or left == right else (0.5, 0.5)  # a line: all around it
                    edges = left + before, top + before, right + after, bottom + after
                    boxes.append(tuple(edge / task['grid'] for edge in edges))
        return boxes

    def written(self, picture, task, prompt, asked):
        """Return the ids that are written after a prompt, greedily; `asked` is what the Q-Former reads of it."""
        reads = self.text(asked) if 'text' in self.about else ()
        prefix, exists = self.functions['encode'](*self.see(picture), *reads)
        in_front = exists.shape[1] if self.about['tokens']['in_front'] else 0
        ids, mask = self.prompt(prompt, in_front + task['max_new_tokens'])
        logits, state = self.functions['prefill'](prefix, exists, ids, mask, np.ones(task['max_new_tokens'], bool))
        written, end = [int(logits.argmax())], self.about['tokens']['end']
        while written[-1] != end and len(written) < task['max_new_tokens']:
            logits, state = self.functions['step'](np.array(written[-1:], np.int32), state)
            written.append(int(logits.argmax()))
        return [i for i in written if i != end]

    def fit(self, picture, text):
        """Return the cosine of a text and the query of a picture that fits it best."""
        queries, vector = (
            self.functions['image'](*self.see(picture)),
            self.functions['text'](*self.text(clean(text, ' '))),
        )
        return float((queries[0] @ vector[0]).max())


if __name__ == '__main__':
    if not sys.argv[1:] or sys.argv[2:] == ['--where']:
        sys.exit(__doc__)
    served = Served(Path(__file__).parent)
    if sys.argv[2:3] == ['--where']:
        for box in served.where(sys.argv[1], ' '.join(sys.argv[3:])):
            print(*(f'{edge:.3f}' for edge in box))
    else:
        print((served.write if 'tokens' in served.about else served.fit)(*sys.argv[1:]))
