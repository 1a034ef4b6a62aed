"""Serves the files beside it: python run.py PICTURE ["TEXT" | --where "PHRASE"].

A model that writes describes the picture, or answers TEXT; one that finds prints how well TEXT fits (ITC's cosine); one
that has words for boxes prints those of PHRASE, a line each: left, top, right and bottom, as shares of the picture.
Where a model was trained on feature arrays, PICTURE is a .npy file; for one of videos, it is a folder of frames.

Needs jax, flatbuffers, numpy, safetensors, tokenizers and Pillow. Every size that comes for the first time is compiled;
JAX_COMPILATION_CACHE_DIR=FOLDER keeps that for the next start. A damaged file is named in one line, with exit code 2.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.export
import numpy as np
from PIL import Image, ImageOps
from safetensors.flax import load_file
from tokenizers import Tokenizer

FORMATS = ('AVIF', 'BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')  # of pictures, by Pillow's names


def clean(text, blank):
    """Return a text as training cleaned it: punctuation made a blank in captions, nothing in questions."""
    text = re.sub(r'[.!"()*#:;~]', blank, text.lower())
    text = re.sub(r'\s{2,}', ' ', text).rstrip('\n').strip(' ') if blank else text.rstrip(' ')
    return ' '.join(text.split(' ')[:50])


class Refused(ValueError):
    """A file that is damaged, or cannot be read as what it should be; the text is one line."""


def checked(folder):
    """Return what export.json says, once it and each file that it names are as they were written."""
    file, again = folder / 'export.json', 'export the run again'
    try:
        text = file.read_bytes()
        about = json.loads(text)
        whole = json.dumps(about, indent=1).encode() == text and about.pop('self') == digest(about)
    except OSError as error:
        raise Refused(f'{file}: {error.strerror.lower()}; {again}') from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise Refused(f'{file}: damaged, or not written by this version; {again}')
    here = {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith('.')}
    for name in sorted(here - about['sha256'].keys() - {file.name}):
        raise Refused(f'{folder / name}: not of this export; move it elsewhere')
    for name in sorted(about['sha256'].keys() - {'run.py'}):  # this file, which one may change
        try:
            with (folder / name).open('rb') as opened:
                same = hashlib.file_digest(opened, 'sha256').hexdigest() == about['sha256'][name]
        except OSError as error:
            raise Refused(f'{folder / name}: {error.strerror.lower()}; {again}') from error
        if not same:
            raise Refused(f'{folder / name}: damaged, its SHA-256 is not that in {file.name}; {again}')
    return about


def digest(about):
    """Return the SHA-256 of all that export.json says beside it."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def check_existing(file):
    """Raise Refused unless there is such a file: a pipe, say, could be waited for without end."""
    if not os.path.isfile(file):
        raise Refused(f'{file}: no such file')


def frames(folder):
    """Return the pictures of a folder, a video, with numbers in their order: 9.png before 10.png."""
    found = [file for file in Path(folder).iterdir() if not file.name.startswith('.')]
    for file in found:
        if file.is_dir():
            raise Refused(f"{folder}: holds the folder '{file.name}'; a video is a folder of its frames alone")
    if not found:
        raise Refused(f'{folder}: no picture in it; a video is a folder of its frames')
    parts = lambda file: re.split('([0-9]+)', file.name)  # noqa: E731
    numbers = lambda file: [int(part) if place % 2 else part for place, part in enumerate(parts(file))]  # noqa: E731
    return sorted(found, key=lambda file: (numbers(file), file.name))


def upright(file):
    """Return a picture in RGB as training read it: turned as its EXIF says, 16-bit grey scaled to 8 bits."""
    check_existing(file)
    try:
        Image.init()
        image = Image.open(
            io.BytesIO(Path(file).read_bytes()), formats=[kind for kind in FORMATS if kind in Image.OPEN]
        )
        image.load()
    except Exception as error:  # of bytes that anybody may have written
        raise Refused(f'{file}: not a picture that is read ({", ".join(FORMATS)}), or damaged') from error
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        grey, stored = (np.asarray(image, np.uint32) * 255 + 32767) // 65535, image
        image = Image.fromarray(grey.astype(np.uint8))
        image.info = stored.info
    if image.mode in ('I', 'F'):
        raise Refused(f'{file}: grey of 32 bits or floats, and nothing says which value is white: save it with 8 or 16')
    with contextlib.suppress(Exception):  # where EXIF cannot be read, the picture stays as it is stored
        image = ImageOps.exif_transpose(image)
    return (image.convert('RGBA') if image.mode == 'P' and 'transparency' in image.info else image).convert('RGB')


def features(file, width):
    """Return the array [P, V] of an .npy file in float32."""
    check_existing(file)
    try:
        array = np.lib.format.open_memmap(file, mode='r')  # a header that declares too much asks for no memory
        with np.errstate(all='ignore'):  # what float32 cannot hold becomes infinite
            single = np.array(array, np.float32, subok=False)
    except Exception as error:  # of bytes that anybody may have written
        raise Refused(f'{file}: not an .npy array of numbers; write it with numpy.save') from error
    if array.ndim != 2 or array.dtype.kind != 'f' or not len(array) or array.shape[1] != width:
        raise Refused(f'{file}: expected floats [P, {width}], found {array.dtype} {list(array.shape)}')
    if not np.isfinite(single).all():
        raise Refused(f'{file}: holds values that are not finite in float32')
    return single


class Served:
    """What export.json says, the functions by name with their weights, and the tokenizers."""

    def __init__(self, folder):
        folder = Path(folder)
        self.about = checked(folder)
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

    def load_picture(self, picture):
        """Return pixels [1, S, S, 3], of a video [1, F, S, S, 3], or features [1, P, V]; and which of these exist."""
        image = self.about['image']
        if not image:
            function = self.about['functions']['encode' if 'tokens' in self.about else 'image']
            width = int(function['inputs']['features'].split(', ')[-1].rstrip(']'))
            found = features(picture, width)[None]
            return found, np.ones(found.shape[:2], bool)
        is_video = os.path.isdir(picture)
        if is_video and not image['video']:
            raise Refused(f'{picture}: a folder, and this model reads one picture at a time: give a file')
        files, size = frames(picture) if is_video else [picture], (image['size'], image['size'])
        pixels = np.stack([np.asarray(upright(file).resize(size, Image.Resampling.BICUBIC)) for file in files])
        return (pixels[None], np.ones((1, len(pixels)), bool)) if image['video'] else (pixels,)

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
        if length + beside > marks.get('limit', length + beside):
            raise Refused(f'a text of {length} tokens is too long for this model: shorten it')
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
            raise Refused('this model has no words for boxes: ask it with a TEXT')
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

    def written(self, picture, task, prompt, question):
        """Return the ids that are written after a prompt, greedily; `question` is what the Q-Former reads of it."""
        reads = self.text(question) if 'text' in self.about else ()
        prefix, prefix_mask = self.functions['encode'](*self.load_picture(picture), *reads)
        prefix_length = prefix_mask.shape[1] if self.about['tokens']['in_front'] else 0
        ids, mask = self.prompt(prompt, prefix_length + task['max_new_tokens'])
        logits, state = self.functions['prefill'](prefix, prefix_mask, ids, mask, np.ones(task['max_new_tokens'], bool))
        written, end = [int(logits.argmax())], self.about['tokens']['end']
        while written[-1] != end and len(written) < task['max_new_tokens']:
            logits, state = self.functions['step'](np.array(written[-1:], np.int32), state)
            written.append(int(logits.argmax()))
        return [i for i in written if i != end]

    def fit(self, picture, text):
        """Return the cosine of a text and the query of a picture that fits it best."""
        queries, vector = (
            self.functions['image'](*self.load_picture(picture)),
            self.functions['text'](*self.text(clean(text, ' '))),
        )
        return float((queries[0] @ vector[0]).max())


def main(words):
    """Print what a model makes of a picture and a text; raises Refused."""
    served, (picture, *rest) = Served(Path(__file__).parent), words
    text = ' '.join(rest)
    if rest[:1] == ['--where']:
        for box in served.where(picture, ' '.join(rest[1:])):
            print(*(f'{edge:.3f}' for edge in box))
    elif 'tokens' in served.about:
        print(served.write(picture, text))
    elif text:
        print(served.fit(picture, text))
    else:
        raise Refused('this model compares: give a TEXT beside the picture')


if __name__ == '__main__':
    if not sys.argv[1:] or sys.argv[2:] == ['--where']:
        sys.exit(__doc__)
    warnings.simplefilter('ignore')  # Pillow's, about odd pictures
    try:
        main(sys.argv[1:])
    except Refused as refused:
        line = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in str(refused))
        print(f'error: {line}', file=sys.stderr)
        sys.exit(2)
