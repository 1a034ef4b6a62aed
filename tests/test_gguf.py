"""GGUF files: llama.cpp's names, order of rows and blocks undone, configuration and tokenizer out of the header."""

import dataclasses
import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
from tokenizers import pre_tokenizers

from qformer_jax import config
from qformer_jax.convert import llama
from qformer_jax.convert.assemble import assemble
from qformer_jax.convert.lazy_tensors import in_memory, read_all
from qformer_jax.convert.table import check_complete, to_jax, to_torch
from qformer_jax.errors import UserError
from qformer_jax.models import blip2
from qformer_jax.rules import flatten

gguf = pytest.importorskip('gguf', reason='the files are written with it')
reader = importlib.import_module('qformer_jax.convert.gguf')

C = dataclasses.replace(reference.LLAMA, rope_base=5e4, norm_eps=1e-5)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ['h i', 'Ġ hi', '1 2']
WORDS = ['<|end|>', *ALPHABET, 'hi', 'Ġhi', '12']
KINDS = [gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(WORDS) - 1)]


def random_model(c: config.LlamaConfig) -> dict[str, np.ndarray]:
    """Return random parameters by path of ours."""
    numbers = np.random.default_rng(0)
    shapes = flatten(blip2.shapes(config.Blip2Config(vit=None, qformer=None, lm=c)))
    return {path: numbers.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}


def stored(c: config.LlamaConfig, jax_state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a model as llama.cpp's converter stores it: its names by the package's own list, q and k reordered."""
    names, found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.depth), {}
    for key, value in read_all(to_torch(llama.llama(c), in_memory(jax_state))).items():
        for part, heads in (('q_proj', c.heads), ('k_proj', c.kv_heads)):
            if part in key:  # row 2 j + s of a head is Hugging Face's row s K / 2 + j
                half = len(value) // heads // 2
                order = [h * 2 * half + s * half + j for h in range(heads) for j in range(half) for s in (0, 1)]
                value = value[order]
        if key != 'lm_head.weight' or not c.tied:
            found[names.get_name(key, try_suffixes=('.weight',))] = value
    return found


def header(c: config.LlamaConfig) -> dict[str, int | float]:
    """Return what llama.cpp's converter says of a model."""
    return {
        'llama.block_count': c.depth,
        'llama.context_length': c.max_positions,
        'llama.embedding_length': c.width,
        'llama.feed_forward_length': c.mlp_width,
        'llama.attention.head_count': c.heads,
        'llama.attention.head_count_kv': c.kv_heads,
        'llama.attention.key_length': c.head_width,
        'llama.rope.dimension_count': c.head_width,
        'llama.rope.freq_base': c.rope_base,
        'llama.attention.layer_norm_rms_epsilon': c.norm_eps,
    }


def write(path: Path, tensors: dict, fields: dict | None = None, architecture: str = 'llama', **words) -> Path:
    """Write a GGUF file with these tensors, numbers and texts, and a tokenizer (`words`: other fields of it)."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (fields or {}).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](name, value)
    words = {'model': 'gpt2', 'pre': 'smollm'} | words
    writer.add_tokenizer_model(words['model'])
    writer.add_tokenizer_pre(words['pre'])
    writer.add_token_list(WORDS)
    writer.add_token_types(KINDS)
    writer.add_token_merges(MERGES)
    for name, value in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if value.dtype == np.uint8 else None
        writer.add_tensor(name, np.ascontiguousarray(value), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / 'model.gguf', stored(C, random_model(C)), header(C))


@pytest.mark.parametrize('tied', [False, True])
def test_a_file_as_llama_cpp_writes_it_is_read_back_equal(tied, tmp_path):
    c = dataclasses.replace(C, tied=tied)
    jax_state = random_model(c)
    path = write(tmp_path / 'model.gguf', stored(c, jax_state), header(c))
    assert reader.config_of(path, reader.read(path)) == c
    found = to_jax(llama.gguf(c), reader.read(path))
    assert not check_complete(found, blip2.shapes(config.Blip2Config(vit=None, qformer=None, lm=c)))
    assert jax.tree.all(jax.tree.map(np.array_equal, read_all(found), jax_state))


def test_the_table_writes_what_llama_cpp_writes():
    jax_state = random_model(C)
    want, found = stored(C, jax_state), read_all(to_torch(llama.gguf(C), in_memory(jax_state)))
    assert found.keys() == want.keys()
    assert jax.tree.all(jax.tree.map(np.array_equal, found, want))


def test_it_is_a_checkpoint_like_any_other(path):
    found = assemble([path])
    assert found.model == config.Blip2Config(vit=None, qformer=None, lm=C)
    assert jax.tree.all(jax.tree.map(np.array_equal, read_all(found.tensors), random_model(C)))
    assert assemble([path.parent]).model == found.model


def test_a_model_in_two_files_is_one(path):
    """The first has the header; the second, here, the output table."""
    tensors = stored(C, random_model(C))
    last = {'output.weight': tensors.pop('output.weight')}
    path.unlink()
    write(path.parent / 'model-00001-of-00002.gguf', tensors, header(C))
    write(path.parent / 'model-00002-of-00002.gguf', last)
    assert assemble([path.parent]).model.lm == C


def test_what_a_short_header_leaves_out(tmp_path):
    optional = ('head_count_kv', 'key_length', 'dimension_count', 'freq_base')
    fields = {name: value for name, value in header(C).items() if not name.endswith(optional)}
    path = write(tmp_path / 'model.gguf', stored(C, random_model(C)), fields)
    want = dataclasses.replace(C, kv_heads=C.heads, head_width=C.width // C.heads, rope_base=10000.0)
    assert reader.config_of(path, reader.read(path)) == want


def test_blocks_are_read_as_what_they_stand_for(tmp_path):
    """Q8_0: 32 weights share one float16 scale."""
    numbers = np.random.default_rng(0)
    scales, steps = np.array([[0.5], [-0.25]], np.float16), numbers.integers(-127, 128, (2, 32)).astype(np.int8)
    blocks = np.concatenate([scales.view(np.uint8), steps.view(np.uint8)], axis=1)
    tensor = reader.read(write(tmp_path / 'model.gguf', {'x': blocks}))['x']
    assert (tensor.shape, tensor.dtype) == ((2, 32), np.float32)
    np.testing.assert_array_equal(tensor.read(), scales.astype(np.float32) * steps)


def test_the_tokenizer_splits_digits_and_keeps_special_tokens_whole(path):
    tokenizer = reader.tokenizer_of(path)
    text = 'hi hi12 é<|end|>'
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ['hi', 'Ġhi', '1', '2', 'Ġ', 'Ã', '©', '<|end|>']
    assert encoded.ids[-1] == 0
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoded.ids) == 'hi hi12 é'


def test_gpt2_itself_joins_digits(tmp_path):
    tokenizer = reader.tokenizer_of(write(tmp_path / 'model.gguf', {'x': np.ones(1, np.float32)}, pre='gpt-2'))
    assert tokenizer.encode('12').tokens == ['12']


def test_tokenizers_of_other_kinds_are_refused(tmp_path):
    x = {'x': np.ones(1, np.float32)}
    with pytest.raises(UserError, match=r"model\.gguf has a tokenizer of the kind 'llama', .* with --lm-tokenizer"):
        reader.tokenizer_of(write(tmp_path / 'model.gguf', x, model='llama'))
    with pytest.raises(UserError, match=r"splits texts as 'qwen2', but known are gpt-2, smollm only"):
        reader.tokenizer_of(write(tmp_path / 'model.gguf', x, pre='qwen2'))


@pytest.mark.parametrize(
    'change, message',
    [
        ({'llama.rope.scaling.type': 'yarn'}, r"llama\.rope\.scaling\.type 'yarn', but only 'none'"),
        ({'llama.rope.dimension_count': 6}, r'llama\.rope\.dimension_count 6, but only 12'),
    ],
)
def test_variants_that_have_no_place_are_refused(change, message, tmp_path):
    path = write(tmp_path / 'model.gguf', stored(C, random_model(C)), header(C) | change)
    with pytest.raises(UserError, match=message):
        reader.config_of(path, reader.read(path))


def test_other_models_are_refused(tmp_path):
    x = {'x': np.ones(1, np.float32)}
    with pytest.raises(UserError, match=r"has general\.architecture 'qwen2', but only 'llama' has a place here"):
        assemble([write(tmp_path / 'model.gguf', x, architecture='qwen2')])
    with pytest.raises(UserError, match=r"does not state 'llama\.embedding_length'"):
        assemble([write(tmp_path / 'model.gguf', x)])
    with pytest.raises(UserError, match=r"holds no 'token_embd\.weight'"):
        assemble([write(tmp_path / 'model.gguf', x, header(C))])
    with pytest.raises(UserError, match=r"no row of the table has the key 'rope_freqs\.weight'"):  # Llama 3.1's
        assemble(
            [write(tmp_path / 'model.gguf', stored(C, random_model(C)) | {'rope_freqs.weight': x['x']}, header(C))]
        )


def test_a_file_that_is_cut_off_or_foreign_is_refused(path):
    whole, message = path.read_bytes(), r'model\.gguf is no GGUF file, or only a part of one: fetch it again'
    for size in (0, 3, 10, 25, 700, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=message):
            reader.read(path)
    path.write_bytes(b'{"weights": 1}' * 100)
    with pytest.raises(UserError, match=message):
        reader.read(path)
    with pytest.raises(UserError, match=r'other\.gguf does not exist'):
        reader.read(path.parent / 'other.gguf')


def test_lengths_that_a_file_only_states_are_not_believed(path):
    """Each bit of the lengths of the header's lists and texts: refused at once, where the package's reader counts."""
    whole, message = path.read_bytes(), r'model\.gguf is no GGUF file, or only a part of one|is damaged|does not state'
    at = whole.index(b'tokenizer.ggml.tokens') + len(b'tokenizer.ggml.tokens') + 8
    assert int.from_bytes(whole[at : at + 8], 'little') == len(WORDS)
    for bit in range(10, 64, 6):
        data = bytearray(whole)
        data[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            reader.config_of(path, reader.read(path))


def test_numbers_of_another_kind_are_refused(tmp_path):
    fields = header(C) | {'llama.attention.head_count': 'two'}
    path = write(tmp_path / 'model.gguf', stored(C, random_model(C)), fields)
    with pytest.raises(UserError, match=r'llama\.attention\.head_count is damaged: Expected `int`'):
        assemble([path])
    path.unlink()
    write(path, stored(C, random_model(C)), header(C) | {'llama.attention.head_count': 0})
    with pytest.raises(UserError, match=r'model\.gguf: lm\.heads is 0, it must be at least 1'):
        assemble([path])


def test_without_the_package_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gguf', None)
    with pytest.raises(UserError, match=r"pip install 'qformer_jax\[gguf\]'"):
        importlib.reload(reader)
