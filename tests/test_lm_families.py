"""Stages 2 and 3 over pretrained language models of the Llama and T5 kind, from their files to answers."""

import dataclasses
import json
from typing import get_args

import jax
import lm_tokenizers
import numpy as np
import pytest
import test_gguf
from small import change, recipe, without_tower

from qformer_jax import cli, config
from qformer_jax.convert import families as published_families
from qformer_jax.convert import huggingface_config, safetensors_writer, t5
from qformer_jax.convert.lazy_tensors import in_memory
from qformer_jax.convert.table import to_torch
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.pack import BYTE_BPE
from qformer_jax.data.tokenizers import lm_row, pad
from qformer_jax.errors import UserError
from qformer_jax.inference import decode
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.models import blip2, families
from qformer_jax.rules import flatten
from qformer_jax.runs import import_export, run_dir
from qformer_jax.training import language_model, loop

LLAMA = config.LlamaConfig(
    vocab_size=len(test_gguf.WORDS),
    width=16,
    depth=1,
    heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=32,
    max_positions=64,
    tied=True,
)
T5 = config.T5Config(
    vocab_size=lm_tokenizers.t5().get_vocab_size(),
    width=16,
    depth=1,
    decoder_depth=1,
    heads=2,
    head_width=8,
    mlp_width=32,
    buckets=8,
    max_distance=20,
)
FAMILIES = {'llama': LLAMA, 't5': T5}
QUESTIONS = ['what color is it?', 'is it red?', 'what color is it?']


def test_every_family_has_an_entry_for_each_of_its_sides():
    configs = {kind.family: kind for kind in get_args(config.LmConfig)}
    assert configs.keys() == families.FAMILIES.keys() == published_families.FAMILIES.keys()
    for name, kind in configs.items():
        entry = published_families.FAMILIES[name]
        assert entry.read_config(entry.write_config(kind())) == kind()
        assert families.family_of(kind()) is families.FAMILIES[name]
        assert published_families.published_family(kind()) is entry


@pytest.fixture(scope='module')
def voices(tmp_path_factory):
    """Finished runs of a Llama out of a GGUF file and of a T5 out of a folder, as the command writes them."""
    folder = tmp_path_factory.mktemp('voices')
    file = test_gguf.write(
        folder / 'm.gguf', test_gguf.stored(LLAMA, test_gguf.random_model(LLAMA)), test_gguf.header(LLAMA)
    )
    cli.run(['convert', str(file), str(folder / 'llama')])
    hugging_face(folder / 'flan')
    cli.run(['convert', str(folder / 'flan'), str(folder / 't5')])
    return folder


def hugging_face(folder) -> None:
    """Write a T5 as `save_pretrained` does."""
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(huggingface_config.of_language_model(T5)))
    safetensors_writer.write(folder / 'model.safetensors', to_torch(t5.T5, random_run(T5).tensors), None)
    lm_tokenizers.t5().save(str(folder / 'tokenizer.json'))


def random_run(lm) -> import_export.Model:
    model = config.Blip2Config(vit=None, qformer=None, lm=lm)
    numbers = np.random.default_rng(0)
    arrays = {
        path: (numbers.normal(size=x.shape) / 4).astype(np.float32) for path, x in flatten(blip2.shapes(model)).items()
    }
    return import_export.Model(config.Run('language', model), in_memory(arrays), (), ())


def over(voices, arrays, family: str, stage: str = 'stage2', **starts) -> config.Run:
    """Return a tiny run over a voice; its texts are longer, for there are few words in its vocabulary."""
    run = change(without_tower(recipe(stage, arrays, steps=8)), 'model', lm=FAMILIES[family])
    run = change(run, 'data', max_lm_text=48)
    return dataclasses.replace(run, start=config.Start(**(starts or {'lm': str(voices / family)})))


@pytest.fixture(scope='module', params=FAMILIES)
def taught(request, voices, arrays, tmp_path_factory):
    """A run of stage 3 after one of stage 2 over a pretrained voice, and the voice's run."""
    runs = tmp_path_factory.mktemp('runs')
    loop.train(over(voices, arrays, request.param), runs / 'stage2')
    instruct = over(voices, arrays, request.param, 'instruct', checkpoint=str(runs / 'stage2'))
    loop.train(instruct, runs / 'instruct')
    return Blip2.load(runs / 'instruct'), voices / request.param


def test_the_tokenizer_is_the_language_models_and_so_are_its_weights(taught, arrays):
    model, voice = taught
    assert (model.folder / BYTE_BPE).read_bytes() == (voice / BYTE_BPE).read_bytes()
    assert (model.folder / BYTE_BPE).read_bytes() != (arrays / BYTE_BPE).read_bytes()
    assert run_dir.finished(model.folder).last['lm'] == run_dir.finished(voice).last['lm']
    assert model.lm_tokenizer.vocab_size == model.run.model.lm.vocab_size


def test_both_stages_learn(taught):
    model, _ = taught
    for stage in ('stage2', 'instruct'):
        lines = (model.folder.parent / stage / 'log.jsonl').read_text().splitlines()
        losses = [record['loss'] for record in map(json.loads, lines) if record['kind'] == 'train']
        assert losses[-1] < losses[0] and np.isfinite(losses).all()


def test_what_it_writes_is_what_its_losses_find_likeliest(taught, arrays):
    """Search with a cache, left padding and (T5) an encoder of its own, against the one pass that training makes."""
    model, _ = taught
    image_features = model.encode_images([record.features for record in Dataset.open(arrays).source('test')][:3])
    ids, mask = model.padded_prompts(QUESTIONS, 0)
    prefix = model.soft_prefix(image_features, QUESTIONS)
    settings = GenerationConfig(max_new_tokens=4)
    tokens = decode.with_lm(model.model, model.params, prefix, ids, mask, settings=settings).tokens[:, 0]

    count = mask.sum(axis=1)[:, None]
    rows = [pad([*i[m].tolist(), *t.tolist()], 40, 0)[0] for i, m, t in zip(ids, mask, tokens, strict=True)]
    place = np.arange(40)[None]
    text_mask, target = place < count + 4, (place >= count) & (place < count + 4)

    def run(network):
        return network.lm.word_logits(network.target_hidden_states(prefix, np.stack(rows), text_mask, target)).argmax(
            -1
        )

    likeliest = jax.jit(lambda params: model.model.apply({'params': params}, method=run))(model.params)
    assert np.asarray(likeliest)[target].reshape(3, 4).tolist() == tokens.tolist()


def test_it_answers_and_counts_losses(taught, arrays):
    model, _ = taught
    pictures = [record.features for record in Dataset.open(arrays).source('test')][:3]
    assert all(isinstance(answer, str) for answer in model.ask(pictures, QUESTIONS))
    losses, target = model.losses(pictures, [*QUESTIONS[:2], ''], ['red', 'no', 'yes'])
    rows = [lm_row(model.lm_tokenizer, *pair) for pair in zip([*QUESTIONS[:2], ''], ['red', 'no', 'yes'], strict=True)]
    assert target.sum(axis=1).tolist() == [len(row) - begin for row, begin in rows]
    assert np.isfinite(losses).all() and (losses[target] > 0).all() and not losses[~target].any()


def test_a_recipe_for_another_language_model_is_refused(voices, arrays):
    run = over(voices, arrays, 'llama')
    with pytest.raises(UserError, match=r"of the kind 'llama', the recipe states 't5': set .* to LlamaConfig\("):
        language_model.open_dataset(change(run, 'model', lm=T5))
    other = dataclasses.replace(LLAMA, rope_base=5e4, max_positions=32)
    with pytest.raises(UserError, match=r'than model.lm states: rope_base 10000.0 there, 50000.0 here$'):
        language_model.open_dataset(change(run, 'model', lm=other))
    spare = dataclasses.replace(LLAMA, max_positions=32, vocab_size=0)
    assert language_model.open_dataset(change(run, 'model', lm=spare)).lm_tokenizer.vocab_size == LLAMA.vocab_size


def test_a_language_model_without_its_tokenizer_is_refused(voices, arrays, tmp_path):
    import_export.import_checkpoint(random_run(T5), tmp_path / 'mute')
    run = over(voices, arrays, 't5', lm=str(tmp_path / 'mute'))
    with pytest.raises(UserError, match="mute' has a language model without its tokenizer: qformer convert it with"):
        loop.train(run, tmp_path / 'run')


def test_the_tokenizer_decides_the_fingerprint(voices, arrays):
    """The same records in other ids are another input; with the data set's own tokenizer nothing changes."""
    own = Dataset.open(arrays)
    assert language_model.open_dataset(over(voices, arrays, 'llama')).fingerprint != own.fingerprint
    assert dataclasses.replace(own, lm_file=arrays / BYTE_BPE).fingerprint == own.fingerprint


def test_a_gguf_file_of_another_tokenizer_asks_for_one(tmp_path):
    tensors = test_gguf.stored(LLAMA, test_gguf.random_model(LLAMA))
    file = test_gguf.write(tmp_path / 'm.gguf', tensors, test_gguf.header(LLAMA), model='llama')
    with pytest.raises(UserError, match=r"a tokenizer of the kind 'llama', .* with --lm-tokenizer"):
        cli.run(['convert', str(file), str(tmp_path / 'run')])
    assert not (tmp_path / 'run').exists()
    lm_tokenizers.smollm().save(str(tmp_path / 'tokenizer.json'))
    cli.run(['convert', str(file), str(tmp_path / 'run'), '--lm-tokenizer', str(tmp_path / 'tokenizer.json')])
    assert Blip2.load(tmp_path / 'run').lm_tokenizer.special_tokens.begin == ()
