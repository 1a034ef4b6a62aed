"""A run as a folder that another box runs without this package, with JAX alone.

NAME.stablehlo        each function of the run, as `jax.export` serializes it, for every platform and size
weights.safetensors   their first arguments: the weights by parameter path, once for all
export.json           names, shapes and types; marks and prompts of texts; what the files were made from; the SHA-256 of
                      each file, and as `self` that of the rest of this one
*.json                the tokenizers
run.py                reads all this (`runner.py`)
"""

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.export import Exported

from .. import config
from ..atomic import all_or_nothing
from ..convert import safetensors_writer
from ..convert.lazy_tensors import in_memory
from ..data.pack import BYTE_BPE, WORDPIECE
from ..data.special_tokens import SpecialTokens
from ..hashing import sha256
from ..inference import locate
from ..inference.blip2 import ANSWER, CAPTION, Blip2
from ..inference.prompts import PROMPT_BUCKET
from ..models.quantized import to_flat
from ..models.vit import PIXEL_MEAN, PIXEL_STD
from ..rules import flatten
from . import runner
from .functions import SIZES, Function, functions

PLATFORMS = 'cpu', 'cuda', 'tpu'


def artefact(function: Function, platforms: Sequence[str] = PLATFORMS) -> Exported:
    """Return a function for all sizes and platforms; only shapes are looked at, and nothing runs."""
    return jax.export.export(jax.jit(function.call), platforms=platforms)(function.weights, *function.inputs.values())


def write(model: Blip2, dest: Path, fingerprint: str) -> dict[str, int]:
    """Write the folder `dest` and return the bytes of its files, given the run's fingerprint.

    The weights are those that the model uses: a LoRA is merged since it was loaded, small ones stay small. Raises
    UserError when `dest` exists, the model is a tower alone, or a tokenizer is missing.
    """
    held = to_flat(flatten(model.params))
    parts = functions(model.run, held)
    used = {path: held[path] for path in sorted(set().union(*(part.weights for part in parts)))}
    with all_or_nothing(dest) as folder:
        folder.mkdir()
        about = _about(model) | {'fingerprint': fingerprint, 'functions': {}}
        for part in parts:
            made = artefact(part)
            (folder / f'{part.name}.stablehlo').write_bytes(made.serialize())
            about['functions'][part.name] = _signature(part, made)
        safetensors_writer.write(folder / 'weights.safetensors', in_memory(used))
        if 'tokens' in about:
            model.lm_tokenizer.save(folder / BYTE_BPE)
        if 'text' in about:
            model.text_tokenizer.save(folder / WORDPIECE)
        shutil.copy(runner.__file__, folder / 'run.py')
        about['sha256'] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        about['self'] = runner.digest(about)
        (folder / 'export.json').write_text(json.dumps(about, indent=1))
    return {path.name: path.stat().st_size for path in sorted(dest.iterdir())}


def _signature(part: Function, made: Exported) -> dict[str, Any]:
    """Return the inputs and outputs of a function by name; before the inputs come its weights, sorted by path."""
    given = jax.tree.unflatten(made.out_tree, made.out_avals)
    outputs = dict(zip(part.outputs, given if len(part.outputs) > 1 else [given], strict=True))
    components = sorted({path.split('/')[0] for path in part.weights})
    arrays = {'inputs': part.inputs, 'outputs': outputs}
    return {'weights': components} | jax.tree.map(lambda x: f'{x.dtype.name}[{", ".join(map(str, x.shape))}]', arrays)


def _about(model: Blip2) -> dict[str, Any]:
    """Return what a caller must know beside the functions."""
    run = model.run
    about = {
        'stage': run.stage,
        'platforms': PLATFORMS,
        'versions': {name: version(name) for name in ('qformer_jax', 'jax')},
        'sizes': SIZES,
        'image': _image(run.model),
    }
    if run.model.lm:
        about['tokens'] = _tokens(model.lm_tokenizer.special_tokens, run.model)
        about['caption'] = {'prompt': run.data.caption_prompt[0], 'max_new_tokens': CAPTION.max_new_tokens}
        about['question'] = {'prompt': run.data.question_prompt[0], 'max_new_tokens': ANSWER.max_new_tokens}
    if words := run.model.grounding:
        about['phrase'] = {'prompt': run.data.phrase_prompt[0], 'max_new_tokens': locate.ANSWER.max_new_tokens}
        about['phrase']['grid'] = words.grid
    if run.objective.instruction_aware or not run.model.lm:
        text = model.text_tokenizer
        ids = {'begin': text.cls_id, 'end': text.sep_id, 'pad': text.pad_id, 'length': run.data.max_text}
        about['text'] = {'file': WORDPIECE, **ids}
    return about


def _image(c: config.Blip2Config) -> dict[str, Any] | None:
    if not c.vit:
        return None
    inside = {'mean': PIXEL_MEAN, 'std': PIXEL_STD}
    resize = 'bicubic, the whole picture'
    return {'size': c.vit.image_size, 'video': bool(c.time), 'resize': resize, 'normalised inside': inside}


def _tokens(marks: SpecialTokens, c: config.Blip2Config) -> dict[str, Any]:
    """Return which ids stand around a prompt, and what its length `t` may be.

    `limit` is the largest t + g, and + q where the picture is `in_front` of the text.
    """
    ids = {name: getattr(marks, name) for name in ('begin', 'close', 'end', 'pad')}
    limit = {} if c.lm.position_limit is None else {'limit': c.lm.position_limit + 1}
    return {'file': BYTE_BPE, **ids, 'multiple': PROMPT_BUCKET, 'in_front': not c.gates, **limit}
