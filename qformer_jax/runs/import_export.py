"""Published checkpoints in, as finished runs, and finished runs out, as LAVIS or Hugging Face loads them.

A converted model is a finished run like any other: `caption`, `evaluate` and `--start.checkpoint` take it.
"""

import importlib.metadata
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.progress import Progress

from .. import config, json_file
from ..atomic import all_or_nothing
from ..convert import huggingface_config, published, safetensors_writer
from ..convert.assemble import assemble, check_repeats
from ..convert.families import published_family
from ..convert.files import files_of, open_checkpoint
from ..convert.lazy_tensors import FLOATS, State, Tensor
from ..convert.recognise import NOTHING
from ..convert.table import check_complete
from ..data.pack import BYTE_BPE, WORDPIECE
from ..data.tokenizers import LmTokenizer, TextTokenizer
from ..errors import UserError
from ..hashing import sha256
from ..models import blip2, query_count
from ..models.lora import Adapted
from ..models.vocab_extension import Extended
from ..prompts import INSTRUCTBLIP_CAPTIONS, INSTRUCTBLIP_QUESTIONS
from ..rules import flatten, unflatten
from . import run_dir, weight_store

DType = Literal['float32', 'bfloat16', 'float16']
PROVENANCE = 'provenance.json'
_TOKENIZER, _TEXT_TOKENIZER = 'tokenizer.json', 'qformer_tokenizer/tokenizer.json'
_LIBRARIES = ('qformer_jax', 'jax', 'flax', 'numpy', 'safetensors', 'torch', 'onnx', 'gguf')
_SHARD = 5 * 10**9  # bytes a file, where Hugging Face's own writer cuts too


@dataclass(frozen=True)
class Model:
    """A whole model between two formats: what it is, its tensors by path of ours, and how it came together."""

    run: config.Run
    tensors: State
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    lm_tokenizer: Path | None = None
    """Where the language model's tokenizer lies, if that is beside the weights: a file, a folder, or a GGUF file."""
    text_tokenizer: Path | None = None
    """Where the Q-Former's tokenizer lies, if that is beside the weights."""

    @property
    def reads(self) -> bool:
        """Whether the Q-Former reads the question (InstructBLIP)."""
        return self.run.objective.instruction_aware


def read(sources: Sequence[Path], like: config.Blip2Config = NOTHING, connector: type | None = None) -> Model:
    """Return the model in a finished run of ours, or in one or more published checkpoints, unread.

    `connector`: the class of a run's own. Raises UserError when something is missing, damaged, twice there or unknown.
    """
    if len(sources) == 1 and (sources[0] / run_dir.RUN).is_file():
        return _read_run(run_dir.finished(sources[0], connector))
    whole = assemble(sources, like)
    check_repeats(whole)
    notes = tuple(f'{source.path}: {source.family}' for source in whole.sources) + whole.notes
    files = tuple(file for source in sources for file in files_of(source))
    speaks = next(filter(None, map(_tokenizer_beside, files)), None) if whole.model.lm else None
    notes += (f"the language model's tokenizer: {speaks}",) if speaks else ()
    hears = next(filter(None, (_text_tokenizer_beside(file, whole.model) for file in files)), None)
    notes += (f"the Q-Former's tokenizer: {hears}",) if hears else ()
    return Model(run_of(whole.model), whole.tensors, files, notes, speaks, hears)


def _read_run(done: run_dir.Finished) -> Model:
    tensors, files = {}, []
    for part, digest in done.last.items():
        files.append(weight_store.path(done.store, digest))
        tensors |= {f'{part}/{path}': tensor for path, tensor in open_checkpoint(files[-1]).items()}
    if any(path.endswith('/values') for path in tensors):
        raise UserError(f"'{done.folder}' holds quantized weights: take the run that it was made from")
    check_complete(tensors, blip2.shapes(done.run.model))
    tokenizers = [path if (path := done.folder / name).is_file() else None for name in (BYTE_BPE, WORDPIECE)]
    notes = ('its LoRA is merged into the language model',) if done.run.model.lora else ()
    notes += ("its added words are in the language model's tables",) if 'grounding' in done.last else ()
    merged = run_dir.merged(done.run)
    return Model(merged, _merge(tensors, done.run.model, merged.model), tuple(files), notes, *tokenizers)


def _merge(tensors: State, m: config.Blip2Config, merged: config.Blip2Config) -> State:
    """Return the tensors without a LoRA and added rows, which join their kernels and tables as these are read."""
    flat, shapes = flatten(blip2.effective_params(unflatten(tensors), m)), flatten(blip2.shapes(merged))
    return {path: x if isinstance(x, Tensor) else _merged(x, shapes[path].shape) for path, x in flat.items()}


def _merged(leaf: Adapted | Extended, shape: tuple[int, ...]) -> Tensor:
    read = lambda: jax.tree.map(lambda tensor: tensor.read(), leaf).merged()  # noqa: E731
    return Tensor(shape, jax.tree.leaves(leaf)[0].dtype, read)


def run_of(m: config.Blip2Config) -> config.Run:
    """Return the run that ends with such a model, as far as use needs it: with the prompts that it was judged with.

    BLIP-2 (section 4.1) asks T5 for a short answer and OPT for an answer; InstructBLIP's Q-Former reads the prompt too,
    so there is room for it (LAVIS: 128 tokens).
    """
    reads = bool(m.qformer) and m.qformer.text_side == 'reads'
    stage = 'language' if m.lm else 'vision'
    if m.qformer or m.connector:
        stage = 'stage1' if not m.lm else 'instruct' if reads else 'stage2'
    data = config.Data()
    if reads:
        data = config.Data(max_text=128, question_prompt=INSTRUCTBLIP_QUESTIONS, caption_prompt=INSTRUCTBLIP_CAPTIONS)
    elif m.lm:
        data = config.Data(question_prompt=published_family(m.lm).question_prompt)
    return config.Run(stage=stage, model=m, data=data, objective=config.Objective(instruction_aware=reads))


def with_queries(model: Model, count: int, order: Path | None = None) -> Model:
    """Return the model with so many queries, the first ones in an order, and copies where there are not as many.

    `order` is what `qformer queries` wrote of it; default: their own. Raises UserError where the two do not fit.
    """
    run = replace(model.run, model=query_count.resized(model.run.model, count))
    table, rows = model.tensors[query_count.TABLE], None
    there = table.shape[0]
    if order:
        rows = query_count.read_order(order, there)
    held = replace(
        table,
        shape=(count, table.shape[1]),
        read=lambda: np.asarray(query_count.resize(table.read(), count, rows)),
    )
    chosen = f', most important first, as {order} says' if order else ''
    note = (
        f'queries: {count} of {there}{chosen}' if count <= there else f'queries: {there}, and copies of them to {count}'
    )
    return replace(model, run=run, tensors={**model.tensors, query_count.TABLE: held}, notes=(*model.notes, note))


def import_checkpoint(
    model: Model,
    dest: Path,
    dtype: DType | None = None,
    text: Path | None = None,
    lm: Path | None = None,
    allow_nonfinite: bool = False,
) -> list[Path]:
    """Write a finished run at `dest` and its weights into the store beside it; returns what was written.

    `text` and `lm` are the tokenizers' files; without them the run cannot be asked with texts. They are found in a run,
    the language model's in a GGUF file too, or beside the weights in their folder. Raises UserError for tensors that
    hold NaN or infinity, as they are written, unless they are allowed.
    """
    text, lm = text or model.text_tokenizer, lm or model.lm_tokenizer
    speaks = _read_lm_tokenizer(lm) if lm else None
    weights, digests, sources = dest.parent / 'weights', {}, _sources(model.files)
    inputs = {f'source {i}': source['sha256'] for i, source in enumerate(sources, 1)}
    with all_or_nothing(dest) as scratch, weight_store.taken_back_on_error(weights) as save:
        scratch.mkdir()
        if text:
            TextTokenizer.load(text).save(scratch / WORDPIECE)
        if speaks:
            speaks.save(scratch / BYTE_BPE)
        with _checked(model.tensors, dtype, allow_nonfinite) as (watched, nonfinite):
            for part in sorted({path.split('/', 1)[0] for path in watched}):
                mine = {path.removeprefix(f'{part}/'): t for path, t in watched.items() if path.startswith(f'{part}/')}
                digests[part] = save(mine, dtype)
        run_dir.write_identity(scratch, model.run, inputs)
        json_file.write(scratch / PROVENANCE, _provenance(model, sources, dtype) | {'nonfinite': nonfinite})
        tokenizers = [name for name in (WORDPIECE, BYTE_BPE) if (scratch / name).is_file()]
        run_dir.write_finished(scratch, digests, {}, None, tokenizers)
    return [dest, *(weight_store.path(weights, digest) for digest in digests.values())]


def _read_lm_tokenizer(path: Path) -> LmTokenizer:
    if path.suffix != '.gguf':
        return LmTokenizer.load(path)
    from ..convert import gguf

    return LmTokenizer(gguf.tokenizer_of(path))


def _tokenizer_beside(weights: Path) -> Path | None:
    """Return where a language model's tokenizer lies: in its GGUF file, or in the folder of its weights.

    Of a folder, `tokenizer.json` or OPT's two files are taken; Hugging Face keeps a Q-Former's in a folder of its own.
    """
    if weights.suffix == '.gguf':
        return weights
    there = {name for name in ('tokenizer.json', 'vocab.json', 'merges.txt') if (weights.parent / name).is_file()}
    return weights.parent if 'tokenizer.json' in there or {'vocab.json', 'merges.txt'} <= there else None


def _text_tokenizer_beside(weights: Path, m: config.Blip2Config) -> Path | None:
    """Return where the Q-Former's tokenizer lies in a Hugging Face folder; without a language model, it is the one."""
    file = weights.parent / (_TEXT_TOKENIZER if m.lm else _TOKENIZER)
    return file if m.qformer and file.is_file() and (weights.parent / 'config.json').is_file() else None


def _write_tokenizers(model: Model, folder: Path) -> None:
    """Write the tokenizers that the model has where Hugging Face looks for them, and `read` too."""
    if model.lm_tokenizer:
        _read_lm_tokenizer(model.lm_tokenizer).save(folder / _TOKENIZER)
    if model.text_tokenizer:
        file = folder / (_TEXT_TOKENIZER if model.run.model.lm else _TOKENIZER)
        file.parent.mkdir(exist_ok=True)
        TextTokenizer.load(model.text_tokenizer).save(file)


def export_checkpoint(
    model: Model,
    dest: Path,
    kind: Literal['lavis', 'huggingface'],
    dtype: DType | None = None,
    allow_nonfinite: bool = False,
) -> tuple[list[Path], list[str]]:
    """Write what their class loads with strict=True; returns what was written, and what has no place there.

    LAVIS: one file, `.pth` with the state dict under 'model', or `.safetensors`. Hugging Face: a folder of safetensors
    with `config.json` and the tokenizers. Raises UserError when they have no class for such a model, and as
    `import_checkpoint` for its tensors.
    """
    if kind == 'lavis' and dest.suffix not in ('.pth', '.safetensors'):
        raise UserError(f"'{dest}': LAVIS reads one file: name it .pth (or .safetensors)")
    choose = published.for_lavis if kind == 'lavis' else published.for_huggingface
    target = choose(model.run.model, model.reads)
    torch_state, left_out = published.state_dict(model.tensors, target)
    record = _provenance(model, _sources(model.files), dtype) | {'class': target.name, 'left_out': left_out}
    if kind == 'lavis':
        return _write_lavis(dest, torch_state, dtype, record, allow_nonfinite), left_out
    with all_or_nothing(dest) as scratch:
        scratch.mkdir()
        with _checked(torch_state, dtype, allow_nonfinite) as (watched, nonfinite):
            safetensors_writer.write_shards(scratch, watched, dtype, _SHARD)
        json_file.write(scratch / 'config.json', huggingface_config.of_model(target.model))
        _write_tokenizers(model, scratch)
        json_file.write(scratch / PROVENANCE, record | {'nonfinite': nonfinite})
    return [dest], left_out


def _write_lavis(dest: Path, state: State, dtype: DType | None, record: dict, allow_nonfinite: bool) -> list[Path]:
    """Write the file and its provenance beside it, both or neither."""
    beside = dest.with_name(f'{dest.stem}.{PROVENANCE}')
    with all_or_nothing(beside) as note, all_or_nothing(dest) as scratch:
        with _checked(state, dtype, allow_nonfinite) as (watched, nonfinite):
            (_write_pth if dest.suffix == '.pth' else safetensors_writer.write)(scratch, watched, dtype)
        json_file.write(note, record | {'nonfinite': nonfinite})
    return [dest, beside]


def _write_pth(path: Path, state: State, dtype: DType | None) -> None:
    """Write PyTorch's zip, through a memory-mapped safetensors file, so that the model need not fit in memory."""
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError:
        raise UserError("a .pth needs PyTorch: pip install 'qformer_jax[torch]', or name it .safetensors") from None
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix='.safetensors') as mapped:
        safetensors_writer.write(Path(mapped.name), state, dtype)
        torch.save({'model': load_file(mapped.name)}, path)


@contextmanager
def _checked(state: State, dtype: DType | None, allow_nonfinite: bool) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """Lend the tensors, and a list that gets the names of those read that hold NaN or infinity, as they are written.

    A bar shows the bytes of those that were read. At the end raises UserError if there are names and none is allowed.
    """
    nonfinite = []
    with Progress(transient=True) as bar:
        task = bar.add_task('converting', total=sum(map(_bytes, state.values())))

        def watched(name: str, tensor: Tensor) -> Tensor:
            def fetch() -> np.ndarray:
                array = tensor.read()
                bar.advance(task, _bytes(tensor))
                if not is_finite(array, dtype):
                    nonfinite.append(name)
                return array

            return replace(tensor, read=fetch)

        yield {name: watched(name, tensor) for name, tensor in state.items()}, nonfinite
    if nonfinite and not allow_nonfinite:
        raise UserError(f'{name_nonfinite(nonfinite, dtype)}: take an intact checkpoint, or say --allow-nonfinite')


def is_finite(array: np.ndarray, dtype: DType | None = None) -> bool:
    """Return whether an array holds neither NaN nor infinity, floats as `dtype` if that is given."""
    if array.dtype.name not in FLOATS:
        return True
    with np.errstate(over='ignore'):
        return bool(np.isfinite(array.astype(dtype or array.dtype, copy=False)).all())


def name_nonfinite(names: Sequence[str], dtype: DType | None = None) -> str:
    """Return a sentence about tensors that are not finite."""
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return f'NaN or infinity{f" (as {dtype})" if dtype else ""} in {", ".join(names[:4])}{more}'


def _bytes(tensor: Tensor) -> int:
    return tensor.size * tensor.dtype.itemsize


def _sources(files: Sequence[Path]) -> list[dict]:
    return [{'file': file.name, 'bytes': file.stat().st_size, 'sha256': sha256(file)} for file in files]


def _provenance(model: Model, sources: list[dict], dtype: DType | None) -> dict:
    kinds = sorted({tensor.dtype.name for tensor in model.tensors.values()})
    return {
        'dtype': dtype or f'as in the source ({", ".join(kinds)})',
        'sources': sources,
        'notes': list(model.notes),
        'versions': {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_finite(tensors: State) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tensors by path, one at a time; raises UserError at one that holds NaN or infinity."""
    for path, tensor in tensors.items():
        array = tensor.read()
        if not is_finite(array):
            raise UserError(f'{name_nonfinite([path])}: take an intact checkpoint')
        yield path, array
