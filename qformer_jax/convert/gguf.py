"""Llama models out of a GGUF file (llama.cpp's format): weights, configuration, tokenizer.

The weights keep llama.cpp's names and row order, which the table `llama.gguf` undoes. A quantized tensor is read as the
float32 values that its blocks stand for.
"""

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .. import config
from ..errors import UserError
from .lazy_tensors import State, Tensor
from .sizes import shape_of

try:
    from gguf import GGUFReader, GGUFValueType, TokenType
    from gguf.gguf_reader import ReaderTensor
    from gguf.quants import dequantize, quant_shape_to_byte_shape
except ImportError:
    raise UserError("GGUF files need a package more: pip install 'qformer_jax[gguf]'") from None

_LONGEST = 10_000_000  # entries of a list in a header; the largest vocabularies have 300 thousand
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_PRE_TOKENIZERS = {
    'gpt-2': _BYTES,
    'smollm': pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
}


def read(path: Path) -> dict[str, Tensor]:
    """Return the weights of a GGUF file by llama.cpp's names, float32; raises UserError when it is none, or cut off."""
    return {x.name: _tensor(x, path) for x in _open(path).tensors}


def config_of(path: Path, tensors: State) -> config.LlamaConfig:
    """Return the configuration of the model with these tensors, which a GGUF file (the first of several) states.

    Raises UserError for another architecture than Llama, and for variants that have no place here.
    """
    file = _open(path)
    of = partial(_field, path, file)
    _require(path, file, 'general.architecture', 'llama')
    width, heads = of('llama.embedding_length', kind=int), of('llama.attention.head_count', kind=int)
    head_width = of('llama.attention.key_length', width // max(heads, 1), int)
    _require(path, file, 'llama.rope.dimension_count', head_width)
    _require(path, file, 'llama.rope.scaling.type', 'none')
    if 'token_embd.weight' not in tensors:
        raise UserError(f"{path} holds no 'token_embd.weight': is it a whole model?")
    return config.LlamaConfig(
        vocab_size=shape_of(tensors, 'token_embd.weight', 2)[0],
        width=width,
        depth=of('llama.block_count', kind=int),
        heads=heads,
        kv_heads=of('llama.attention.head_count_kv', heads, int),
        head_width=head_width,
        mlp_width=of('llama.feed_forward_length', kind=int),
        max_positions=of('llama.context_length', kind=int),
        rope_base=_decimal(of('llama.rope.freq_base', 10000.0, float)),
        norm_eps=_decimal(of('llama.attention.layer_norm_rms_epsilon', kind=float)),
        tied='output.weight' not in tensors,
    )


def tokenizer_of(path: Path) -> Tokenizer:
    """Return the tokenizer of a GGUF file, which adds nothing at either end of a text.

    Raises UserError when it is no byte BPE of GPT-2's kind, or splits texts in a way unknown here.
    """
    file = _open(path)
    of = partial(_field, path, file)
    if of('tokenizer.ggml.model') != 'gpt2':
        kind = of('tokenizer.ggml.model')
        raise UserError(f"{path} has a tokenizer of the kind '{kind}', which is not read from here: name the model's "
                        'tokenizer.json with --lm-tokenizer')  # fmt: skip
    split = of('tokenizer.ggml.pre', 'gpt-2')
    if split not in _PRE_TOKENIZERS:
        raise UserError(f"{path} splits texts as '{split}', but known are {', '.join(_PRE_TOKENIZERS)} only")
    words = of('tokenizer.ggml.tokens', kind=list[str])
    merges = [tuple(pair.split(' ')) for pair in of('tokenizer.ggml.merges', kind=list[str])]
    kinds = of('tokenizer.ggml.token_type', [TokenType.NORMAL] * len(words), list[int])
    if len(kinds) != len(words):
        raise UserError(f'{path} has {len(words)} tokens, and kinds of {len(kinds)}: fetch it again')
    try:
        tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f'{path} has a damaged tokenizer ({error}): fetch it again') from None
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[split]
    tokenizer.decoder = decoders.ByteLevel()
    specials = [word for word, kind in zip(words, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in specials])
    return tokenizer


class _Reader(GGUFReader):
    """The package's reader, which alone believes every length that a file states, and counts to it."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f'{end} bytes')
        return super()._get(int(offset), dtype, count, override_order)

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> tuple:
        if raw_type == GGUFValueType.ARRAY:
            kind, count = self._get(orig_offs, np.uint32)[0], int(self._get(orig_offs + 4, np.uint64)[0])
            if kind == GGUFValueType.ARRAY or count > min(_LONGEST, len(self.data)):
                raise ValueError(f'{count} entries')
        return super()._get_field_parts(orig_offs, raw_type)


def _open(path: Path) -> GGUFReader:
    if not path.is_file():
        raise UserError(f'{path} does not exist: name a GGUF file')
    try:
        with np.errstate(over='raise'):
            file = _Reader(path)
    except (ValueError, IndexError, KeyError, ArithmeticError):
        raise UserError(f'{path} is no GGUF file, or only a part of one: fetch it again') from None
    if file.byte_order == 'S':
        raise UserError(f"{path} is in the other byte order: convert it with the gguf package's gguf-convert-endian")
    return file


def _field(path: Path, file: GGUFReader, name: str, default: Any = None, kind: Any = str) -> Any:
    """Return a field of the header; raises UserError where there is none, or one of another kind."""
    if name in file.fields:
        try:
            return msgspec.convert(file.fields[name].contents(), kind)
        except (msgspec.ValidationError, UnicodeDecodeError, ValueError) as error:
            raise UserError(f'{path}: {name} is damaged: {error}') from None
    if default is None:
        raise UserError(f"{path} does not state '{name}': it is of another kind, or was written by a broken tool")
    return default


def _require(path: Path, file: GGUFReader, name: str, value: Any) -> None:
    """Raise UserError when a field has another value than the one that we have a place for."""
    found = _field(path, file, name, value, type(value))
    if found != value:
        raise UserError(f'{path} has {name} {found!r}, but only {value!r} has a place here')


def _decimal(value: float) -> float:
    """Return the number that was meant by a float32, as 1e-5 by 9.9999997e-06."""
    return float(str(np.float32(value)))


def _tensor(x: ReaderTensor, path: Path) -> Tensor:
    shape = tuple(reversed(x.shape.tolist()))

    def read() -> np.ndarray:
        raw = np.fromfile(path, np.uint8, x.n_bytes, offset=x.data_offset)  # a mapped file counts as memory in use
        try:
            return dequantize(raw.reshape(quant_shape_to_byte_shape(shape, x.tensor_type)), x.tensor_type)
        except NotImplementedError:
            raise UserError(f"{path}: '{x.name}' is {x.tensor_type.name}, which the gguf package cannot read") from None

    return Tensor(shape, np.dtype(np.float32), read)
