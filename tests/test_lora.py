"""LoRA: the model it begins as, the step it adds, what is saved of it, and the one base that it fits."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import change, recipe
from test_quantize import LMS

from qformer_jax import cli, config
from qformer_jax.errors import UserError
from qformer_jax.inference import quantize
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.models import blip2, lora, quantized
from qformer_jax.models.layers import matmul
from qformer_jax.models.lora import Adapted
from qformer_jax.rules import flatten, split, unflatten
from qformer_jax.runs import import_export, run_dir, weight_store
from qformer_jax.training import logs, loop

LORA = config.LoraConfig(rank=4, alpha=6.0)
RULES = (('lora/.*', 1.0), ('.*', None))
ALONE = {'vit': None, 'qformer': None}
ASKED = 'what color is it?'


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def drawn(shapes: dict, size: float = 1.0) -> dict:
    """Return parameters that keep about the variance of their input, or `size` times as much."""
    flat = {path: draw(*x.shape, seed=i) * size / x.shape[0] ** 0.5 for i, (path, x) in enumerate(shapes.items())}
    return unflatten(flat)


def test_a_product_is_that_of_the_kernel_and_the_scaled_step():
    kernel, down, up, x = draw(32, 24), draw(32, 4, seed=1), draw(4, 24, seed=2), draw(5, 32, seed=3)
    wide = [a.astype(np.float64) for a in (x, kernel, down, up)]
    want = wide[0] @ wide[1] + 1.5 * (wide[0] @ wide[2]) @ wide[3]
    adapted = Adapted(kernel, down, up, 1.5)
    np.testing.assert_allclose(matmul(x, adapted, jnp.float32), want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(x @ adapted.merged(), want, rtol=1e-5, atol=1e-4)
    rows = quantized.quantize(kernel.T, 8)
    coarse = wide[0] @ np.asarray(rows.dequantize(jnp.float32), np.float64).T + want - wide[0] @ wide[1]
    assert np.abs(coarse - want).max() > 1e-3
    np.testing.assert_allclose(matmul(x, Adapted(rows, down, up, 1.5), jnp.float32), coarse, rtol=1e-5, atol=1e-4)


def test_the_product_and_its_gradient_make_no_second_kernel():
    """Of the size of the kernel, [64, 48], is nothing that is computed: neither a merged one nor a gradient."""
    kernel, x = draw(64, 48), draw(5, 64)

    def loss(step: tuple, kernel):
        return (matmul(x, Adapted(kernel, *step, 1.5), jnp.float32) ** 2).sum()

    made = jax.make_jaxpr(jax.grad(loss))((draw(64, 4), draw(4, 48)), kernel)
    shapes = [v.aval.shape for equation in made.jaxpr.eqns for v in equation.outvars]
    assert (5, 4) in shapes and not {(64, 48), (48, 64)} & set(shapes)


@partial(jax.jit, static_argnums=0)
def logits(model: blip2.Blip2Module, params: dict) -> jax.Array:
    """Return the logits of 7 tokens after 3 vectors."""
    ids, text_mask = jnp.arange(14).reshape(2, 7) + 3, jnp.ones((2, 7), bool)
    target = text_mask.at[:, :4].set(False)

    def run(network):
        return network.lm.word_logits(network.target_hidden_states(prefix, ids, text_mask, target))[:, 4:]

    prefix = blip2.Prefix.whole(jax.random.normal(jax.random.key(2), (2, 3, 32)))
    return model.apply({'params': params}, method=run)


@pytest.fixture(scope='module', params=LMS)
def voice(request) -> tuple[blip2.Blip2Module, dict]:
    """A language model of each family with LoRA on everything that it may lie on, and parameters without zeros."""
    lm = dataclasses.replace(LMS[request.param], depth=1)
    model = blip2.Blip2Module(config.Blip2Config(lm=lm, lora=dataclasses.replace(LORA, targets='.*'), **ALONE))
    shapes = blip2.shapes(model.config)
    return model, {name: drawn(flatten(tree)) for name, tree in shapes.items()}


def test_a_fresh_lora_changes_nothing(voice):
    """To the last bit as products and as merged weights; a compiler that fuses otherwise may round otherwise."""
    model, params = voice
    c, lm = model.config.lora, {'lm': params['lm']}
    begun = lm | {'lora': lora.init(c, params['lm'], jax.random.key(0))}
    for path, leaf in flatten(begun['lora']).items():
        assert not leaf.any() if path.endswith('/up') else 0.6 < leaf.std() * len(leaf) ** 0.5 < 1.4, path
    assert jax.tree.all(jax.tree.map(np.array_equal, lora.merge(begun, c), lm))
    for leaf in flatten(lora.adapt(begun, c)).values():
        if isinstance(leaf, Adapted):
            x = draw(5, len(leaf.kernel))
            np.testing.assert_array_equal(matmul(x, leaf, x.dtype), matmul(x, leaf.kernel, x.dtype))
    np.testing.assert_allclose(logits(model, lora.adapt(begun, c)), logits(model, lm), rtol=1e-5, atol=1e-5)


def test_merged_is_adapted(voice):
    model, params = voice
    adapted, merged = (logits(model, make(params, model.config.lora)) for make in (lora.adapt, lora.merge))
    scale = np.abs(adapted).max()
    np.testing.assert_allclose(merged, adapted, atol=1e-5 * scale)
    assert np.abs(logits(model, {'lm': params['lm']}) - adapted).max() > 0.1 * scale


def test_every_chosen_kernel_and_no_other_is_merged(voice):
    """As PEFT merges, in PyTorch's layout [out, in]: weight + alpha / rank * (B @ A), with B = up.T and A = down.T."""
    model, params = voice
    merged, steps = flatten(lora.merge(params, model.config.lora)), flatten(params['lora'])
    kernels = {path for path in merged if path.endswith('/kernel')}
    assert {f'lm/{path.removesuffix("/down")}/kernel' for path in steps if path.endswith('/down')} == kernels
    for path, before in flatten(params).items():
        if path in kernels:
            a, b = (np.float64(steps[f'{path[3:-7]}/{name}'].T) for name in ('down', 'up'))
            want = (np.float64(before.T) + 6.0 / 4 * (b @ a)).T
            np.testing.assert_allclose(merged[path], want, rtol=1e-5, atol=1e-5)
        elif path.startswith('lm/'):
            np.testing.assert_array_equal(merged[path], before)
    assert merged.keys() == flatten({'lm': params['lm']}).keys()


def test_a_merged_kernel_keeps_its_type_and_is_rounded_once():
    kernel, down, up = draw(6, 5).astype(jnp.bfloat16), draw(6, 4) / 100, draw(4, 5, seed=1)
    found = Adapted(kernel, down, up, 1.0).merged()
    np.testing.assert_array_equal(found, (kernel.astype(np.float32) + down @ up).astype(jnp.bfloat16))


def test_queries_and_values_are_the_default():
    shapes = {
        name: blip2.shapes(config.Blip2Config(lm=lm, lora=config.LoraConfig(), **ALONE)) for name, lm in LMS.items()
    }
    paths = {name: {path.rpartition('/')[0] for path in flatten(tree['lora'])} for name, tree in shapes.items()}
    each = {f'layer_{i}/attention/{part}' for i in range(2) for part in ('query', 'value')}
    assert paths['opt'] == paths['llama'] == each
    towers = {'encoder': ('self',), 'decoder': ('self', 'cross')}
    places = {f'{tower}/layer_{i}/{kind}_attention' for tower in towers for i in range(2) for kind in towers[tower]}
    assert paths['t5'] == {f'{place}/{part}' for place in places for part in ('query', 'value')}
    grouped = flatten(shapes['llama']['lora']['layer_0'])
    assert grouped['attention/value/up'].shape == (8, 16) and grouped['attention/query/up'].shape == (8, 32)


def test_a_choice_of_nothing_is_refused():
    for targets, said in {'layer_0/ear': 'fits no dense layer .*layer_0/attention/key', '(': 'not a regular'}.items():
        with pytest.raises(UserError, match=said):
            blip2.shapes(config.Blip2Config(lm=LMS['opt'], lora=config.LoraConfig(targets=targets), **ALONE))


def lora_run(data: Path, checkpoint: Path, steps: int = 40, c: config.LoraConfig | None = LORA) -> config.Run:
    """Return a run in which LoRA alone learns."""
    run = change(recipe('instruct', data, steps=steps), 'model', lora=c)
    run = change(change(run, 'optimizer', rate_rules=RULES), 'training', checkpoint_every=20)
    return dataclasses.replace(run, start=config.Start(checkpoint=str(checkpoint)))


@pytest.fixture(scope='module')
def tuned(pictures, line, tmp_path_factory) -> Path:
    """A folder with the run that the LoRA began from, its store, and a finished run that trained nothing else."""
    runs = tmp_path_factory.mktemp('lora')
    for name in ('stage2', 'language', 'weights'):
        shutil.copytree(line / name, runs / name)
    before = set((runs / 'weights').iterdir())
    loop.train(lora_run(pictures, runs / 'stage2'), runs / 'tuned')
    (runs / 'new.json').write_text(json.dumps([path.name for path in set((runs / 'weights').iterdir()) - before]))
    return runs


def test_it_learns_alone_and_only_its_own_weights_are_saved(tuned):
    done, began = (run_dir.finished(tuned / name) for name in ('tuned', 'stage2'))
    assert {name: done.last[name] for name in began.last} == began.last and done.last.keys() - began.last == {'lora'}
    assert json.loads((tuned / 'new.json').read_text()) == [f'{done.last["lora"]}.safetensors']
    size = 2 * 2 * (16 * 4 + 4 * 16) * 4  # 2 layers, query and value, down and up, float32
    file = weight_store.path(done.store, done.last['lora'])
    assert size < file.stat().st_size < size + 1200 < weight_store.path(done.store, done.last['lm']).stat().st_size
    losses = [r['loss'] for r in logs.records(done.folder) if r['kind'] == 'train']
    assert np.mean(losses[-10:]) < 0.8 * losses[0]
    frozen = json.loads((done.folder / run_dir.FINISHED).read_text())['frozen']
    assert frozen['before'] == frozen['after']


def test_gradients_exist_for_the_lora_alone(tuned):
    done = run_dir.finished(tuned / 'tuned')
    trainable, frozen = split(run_dir.load_components(done), RULES)
    assert set(trainable) == {'lora'} and set(frozen) == {'vit', 'qformer', 'lm', 'lm_projection'}


def test_a_run_in_use_is_the_model_that_was_trained(tuned):
    """Losses of answers through the merged model, against the step beside the frozen kernel as in training."""
    model, done = Blip2.load(tuned / 'tuned'), run_dir.finished(tuned / 'tuned')
    assert model.run.model.lora is None and set(model.params) == {'vit', 'qformer', 'lm', 'lm_projection'}
    adapted = dataclasses.replace(model, params=lora.adapt(run_dir.load_components(done), LORA))
    base = Blip2.load(tuned / 'stage2')
    pictures = model.encode_images([small.draw_picture(colour, 'circle') for colour in small.COLOURS])
    found, want, before = (m.losses(pictures, [ASKED] * 4, list(small.COLOURS))[0] for m in (model, adapted, base))
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert np.abs(before - want).max() > 0.1
    assert model.ask(pictures, [ASKED] * 4) == adapted.ask(pictures, [ASKED] * 4)
    assert len(set(model.caption(pictures))) > 1


@pytest.fixture(scope='module')
def whole(tuned) -> Path:
    """The tuned run, merged by the command."""
    cli.run(['convert', str(tuned / 'tuned'), str(tuned / 'merged')])
    return tuned / 'merged'


def test_a_merged_run_is_a_run_like_any_other(tuned, whole, pictures, tmp_path):
    model, want = Blip2.load(whole), Blip2.load(tuned / 'tuned')
    last, before = (run_dir.finished(folder).last for folder in (whole, tuned / 'stage2'))
    assert last.keys() == before.keys() and {name for name in last if last[name] != before[name]} == {'lm'}
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, want.params))
    picture = [small.draw_picture('red', 'square')]
    assert model.ask(picture, [ASKED]) == want.ask(picture, [ASKED])
    loop.train(lora_run(pictures, whole, steps=6), tmp_path / 'further')


def test_other_frameworks_get_the_merged_weights(tuned, tmp_path):
    written, _ = import_export.export_checkpoint(
        import_export.read([tuned / 'tuned']), tmp_path / 'theirs', 'huggingface'
    )
    model = import_export.read(written)
    assert not [path for path in model.tensors if path.startswith('lora/')]
    want = flatten(Blip2.load(tuned / 'tuned').params)
    for part in ('query', 'key', 'value'):
        path = f'lm/layer_1/attention/{part}/kernel'
        np.testing.assert_array_equal(model.tensors[path].read(), want[path])


def test_a_quantized_run_is_merged_first(tuned, tmp_path, capsys):
    cli.run(['quantize', str(tuned / 'tuned'), str(tmp_path / 'small'), '--weights', 'int8'])
    found, want = Blip2.load(tmp_path / 'small').params, Blip2.load(tuned / 'tuned', weights='int8').params
    assert jax.tree.all(jax.tree.map(np.array_equal, found, want))
    query = want['lm']['layer_0']['attention']['query']['kernel']
    merged = Blip2.load(tuned / 'tuned').params['lm']['layer_0']['attention']['query']['kernel']
    assert quantize.error('lm/query/kernel', merged, query) < 0.02
    assert 'vqa on test' in capsys.readouterr().out


def test_a_run_that_was_cut_short_ends_where_the_whole_one_ends(tuned, pictures):
    done = run_dir.finished(tuned / 'tuned')
    torn = shutil.copytree(done.folder, tuned / 'torn')
    (torn / run_dir.FINISHED).unlink()
    for path in sorted((torn / 'checkpoints').glob('40*'), key=Path.is_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert loop.train(lora_run(pictures, tuned / 'stage2'), torn).last == done.last
    assert logs.records(torn)[30]['loss'] == logs.records(done.folder)[30]['loss']


def test_a_further_stage_goes_on_with_the_lora(tuned, pictures, tmp_path, capsys):
    done = loop.train(lora_run(pictures, tuned / 'tuned', steps=6), tmp_path / 'further')
    assert f'  lora           from checkpoint {tuned / "tuned"}\n' in capsys.readouterr().err
    began = run_dir.finished(tuned / 'tuned')
    assert done.last['lm'] == began.last['lm'] and done.last['lora'] != began.last['lora']


@pytest.fixture(scope='module')
def other(tuned, whole) -> tuple[str, str]:
    """The digests of the LoRA's base and of a language model of the same shape."""
    return run_dir.finished(tuned / 'tuned').last['lm'], run_dir.finished(whole).last['lm']


def test_beside_another_base_of_the_same_shape_it_does_not_load(tuned, other, pictures, tmp_path):
    base, stranger = other
    moved = shutil.copytree(tuned / 'tuned', tuned / 'moved')
    run_dir.write_finished(moved, run_dir.finished(moved).last | {'lm': stranger}, {}, None, [])
    for load in (Blip2.load, run_dir.finished, lambda folder: import_export.read([folder])):
        with pytest.raises(UserError, match=f'trained on the language model {base}, beside another one, {stranger}'):
            load(moved)
    with pytest.raises(UserError, match=base):
        loop.train(lora_run(pictures, moved), tmp_path / 'run')


def starting(run: config.Run, **starts: Path) -> config.Run:
    return dataclasses.replace(run, start=config.Start(**{name: str(path) for name, path in starts.items()}))


def test_a_run_over_another_base_is_refused_before_it_begins(tuned, other, whole, pictures, line, tmp_path):
    run, folder = lora_run(pictures, tuned / 'tuned'), tuned / 'tuned'
    named = starting(run, checkpoint=folder, lm=tuned / 'language')
    wrong = {
        f'trained on the language model {other[0]}, and start.lm .* is another one, {other[1]}': starting(
            run, checkpoint=folder, lm=whole
        ),
        'holds a language model with a LoRA, .*it is None.*qformer convert': change(run, 'model', lora=None),
        r'LoRA, LoraConfig\(rank=4, alpha=6.0, .*it is LoraConfig\(rank=4, alpha=7.0': change(
            run, 'model', lora=dataclasses.replace(LORA, alpha=7.0)
        ),
        'make it start.checkpoint': starting(run, checkpoint=line / 'stage1', lm=folder),
        'model.lora adapts a trained language model: name its run': starting(run, checkpoint=line / 'stage1'),
    }
    for said, mistaken in wrong.items():
        with pytest.raises(UserError, match=said):
            loop.train(mistaken, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    loop.train(change(named, 'training', steps=6), tmp_path / 'run')  # the same base, named twice


def test_a_configuration_that_cannot_be_is_refused(pictures, line, tmp_path):
    run = lora_run(pictures, line / 'stage2')
    wrong = {
        "in 'stage2' and 'instruct', not in 'stage1'": dataclasses.replace(
            change(recipe('stage1', pictures), 'model', lora=LORA), start=config.Start(vit=str(line / 'vision'))
        ),
        'model.lora.rank is 0, it must be at least 1': change(run, 'model', lora=config.LoraConfig(rank=0)),
        r"needs a frozen language model.*add \('lm/.\*', None\)": change(run, 'optimizer', rate_rules=(('.*', 1.0),)),
        "no rule matches parameter 'lora/": change(
            run, 'optimizer', rate_rules=(('(vit|lm|qformer|lm_projection)/.*', None),)
        ),
    }
    for number, (said, mistaken) in enumerate(wrong.items()):
        with pytest.raises(UserError, match=said):
            loop.train(mistaken, tmp_path / f'{number}')


def test_runs_from_before_lora_are_read(line):
    tree = json.loads((line / 'instruct' / 'run.json').read_text())['config']
    del tree['model']['lora']
    assert config.from_json(json.dumps(tree)) == run_dir.finished(line / 'instruct').run
