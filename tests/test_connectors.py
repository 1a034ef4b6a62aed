"""Connectors without a text side: what each may see, what it says when it is wrong, and all of them through a line."""

import contextlib
import dataclasses
import io
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from qformer_jax import cli, config
from qformer_jax.data.dataset import Dataset
from qformer_jax.errors import UserError
from qformer_jax.export.functions import functions
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.models import blip2, connectors
from qformer_jax.models.quantized import to_flat
from qformer_jax.rules import flatten
from qformer_jax.training import loop

SMALL = config.ConnectorConfig(feature_width=6, tokens=4, width=16, depth=2, heads=2, mlp_width=32)
LM = dataclasses.replace(small.OPT, vocab_size=50)
KINDS = connectors.names()
NUMBERS = np.random.default_rng(0)
FEATURES = NUMBERS.standard_normal((2, 10, 6), dtype=np.float32)  # a class token and 3 x 3 patches
MASK = np.arange(10)[None] < np.array([[10], [7]])


def of_kind(kind: str, qformer: config.QformerConfig | None = None) -> tuple[blip2.Blip2Module, dict]:
    """Return a model of features, with random parameters (norms and biases too)."""
    c = config.Blip2Config(vit=None, qformer=qformer, connector=dataclasses.replace(SMALL, kind=kind), lm=LM)
    draw = np.random.default_rng(1)
    shapes = jax.tree.map(lambda x: (draw.standard_normal(x.shape) / 4).astype(np.float32), blip2.shapes(c))
    return blip2.Blip2Module(c), shapes


def prefix(model: blip2.Blip2Module, params: dict, features, mask=MASK):
    return model.apply({'params': params}, features, mask, method='soft_prefix')


@pytest.mark.parametrize('kind', KINDS)
def test_shapes_and_masks(kind):
    """Nothing that is masked reaches any token; what exists reaches some."""
    model, params = of_kind(kind)
    made = prefix(model, params, FEATURES)
    per_feature = kind in ('linear', 'mlp')
    assert made.vectors.shape == (2, 10 if per_feature else 4, LM.width)
    assert made.mask.sum(axis=1).tolist() == ([10, 7] if per_feature else [4, 4])
    assert made.mask[:, -1].all(), 'the text follows a token that exists'

    def read(features):
        return jnp.where(made.mask[..., None], jnp.sin(prefix(model, params, features).vectors), 0).sum()

    reached = jnp.abs(jax.grad(read)(FEATURES)).sum(axis=-1) > 0
    assert not (reached & ~MASK).any() and reached[:, 1:].sum() == MASK[:, 1:].sum(), 'but a class token'


@pytest.mark.parametrize('kind', KINDS)
def test_every_parameter_learns(kind):
    model, params = of_kind(kind)
    loss = lambda params: jnp.sin(prefix(model, params, FEATURES).vectors).sum()  # noqa: E731
    gradients = flatten(jax.grad(loss)({k: v for k, v in params.items() if k != 'lm'}))
    assert not [path for path, g in gradients.items() if not np.abs(g).max() > 0]


@pytest.mark.parametrize('kind', KINDS)
def test_rows_do_not_meet(kind):
    model, params = of_kind(kind)
    both = prefix(model, params, FEATURES)
    for row in (0, 1):
        alone = prefix(model, params, FEATURES[row : row + 1], MASK[row : row + 1])
        np.testing.assert_allclose(alone.vectors[0], both.vectors[row], atol=1e-5)


def test_holes_come_first():
    model, params = of_kind('linear')
    made = prefix(model, params, FEATURES)
    norm, projection = params['connector_norm'], params['connector_projection']
    x = FEATURES[1, :7]
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * norm['scale'] + norm['bias']
    np.testing.assert_allclose(made.vectors[1, 3:], normed @ projection['kernel'] + projection['bias'], atol=1e-5)
    assert made.mask[1].tolist() == [False] * 3 + [True] * 7


def test_padding_of_features_does_not_move_the_text():
    """Seven features, alone or padded to ten: the language model's loss is the same."""
    model, params = of_kind('mlp')
    text, text_mask = np.arange(3, 9)[None], np.ones((1, 6), bool)

    def hidden(features, mask):
        def run(model):
            return model.target_hidden_states(model.soft_prefix(features, mask), text, text_mask, text_mask)

        return model.apply({'params': params}, method=run)

    padded = hidden(FEATURES[1:], MASK[1:])
    alone = hidden(FEATURES[1:, :7], MASK[1:, :7])
    np.testing.assert_allclose(padded, alone, atol=1e-5)


def test_a_connector_beside_the_queries_follows_them():
    """BLIVA: the prefix is the Q-Former's, and then the connector's."""
    qformer = dataclasses.replace(small.QFORMER, feature_width=6, vocab_size=50, text_side='none')
    model, params = of_kind('mlp', qformer)
    both = prefix(model, params, FEATURES, MASK[:1].repeat(2, axis=0))
    without = blip2.Blip2Module(dataclasses.replace(model.config, connector=None))
    alone = blip2.Blip2Module(dataclasses.replace(model.config, qformer=None))
    queries, patches = (prefix(m, params, FEATURES, MASK[:1].repeat(2, axis=0)).vectors for m in (without, alone))
    np.testing.assert_allclose(both.vectors, np.concatenate([queries, patches], axis=1), atol=1e-6)


@pytest.mark.parametrize(
    'kind, says',
    [
        ('resempler', r"no connector 'resempler' \(nearest: 'resampler'\): .* one of .*linear, mlp, "),
        ('nowhere.at_all', r"no connector 'nowhere.at_all': .* a recipe gives the class .*module=YourClass"),
        ('json', r"no connector 'json': .* whoever uses the run names its file \(--connector FILE\)"),
    ],
)
def test_an_unknown_kind_is_refused(kind, says):
    with pytest.raises(UserError, match=says):
        connectors.make(dataclasses.replace(SMALL, kind=kind), jnp.float32)


def test_a_connector_learns_and_answers(arrays, tmp_path):
    """On arrays of 2 to 4 rows that tell the colour, through a language model that learns too."""
    run = small.without_tower(small.recipe('stage2', arrays, steps=80))
    run = small.change(run, 'model', qformer=None, connector=dataclasses.replace(SMALL, feature_width=0))
    run = small.change(run, 'optimizer', rate_rules=(('.*', 1.0),))
    loop.train(run, tmp_path / 'run')
    model = Blip2.load(tmp_path / 'run')
    records = list(Dataset.open(arrays).source('test'))
    image_features = model.encode_images([record.features for record in records])
    assert len(set(image_features.mask.sum(axis=1))) > 1
    captions = model.caption(image_features)
    assert captions == [record.captions[0].lower() for record in records]
    assert [model.caption(image_features.take([row]))[0] for row in range(8)] == captions


@pytest.mark.parametrize(
    'stage, changes, says',
    [
        ('stage1', {}, r"model.connector has no text side and learns in 'stage2' and 'instruct', not in 'stage1'"),
        ('stage2', {'connector': None}, 'needs model.qformer or model.connector, and both are None'),
    ],
)
def test_what_a_stage_cannot_do_is_refused(stage, changes, says):
    run = small.recipe(stage, 'nowhere')
    qformer = run.model.qformer if stage == 'stage1' else None
    run = small.change(run, 'model', **{'qformer': qformer, 'connector': SMALL} | changes)
    with pytest.raises(UserError, match=says):
        loop.check(run)


@pytest.mark.parametrize('kind', KINDS)
def test_published_sizes_have_shapes(kind):
    c = config.Blip2Config(qformer=None, connector=config.ConnectorConfig(kind=kind, feature_width=1408), lm=None)
    c = dataclasses.replace(c, vit=None, lm=config.OptConfig())
    shapes = jax.eval_shape(partial(blip2.init, blip2.Blip2Module(c)), jax.random.key(0))
    assert shapes['connector_projection']['kernel'].shape[1] == 2560


RECIPE = """'A recipe that imports what lies beside it.'
import dataclasses
from soft_pool import Connector as SoftPool
from qformer_jax.config import from_json

def config():
    run = from_json({run!r})
    connector = dataclasses.replace(run.model.connector, kind='soft_pool', module=SoftPool)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, connector=connector))
"""


@pytest.fixture(scope='module')
def newcomer(arrays, tmp_path_factory):
    """The file of docs/variants.md, and a run of a recipe beside it that imports it."""
    folder = tmp_path_factory.mktemp('newcomer')
    page = (small.ROOT / 'docs' / 'variants.md').read_text()
    (code,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    assert len(code.splitlines()) < 40
    (folder / 'soft_pool.py').write_text(code)
    run = small.without_tower(small.recipe('stage2', arrays, steps=6))
    run = small.change(run, 'model', qformer=None, connector=dataclasses.replace(SMALL, feature_width=0))
    (folder / 'mine.py').write_text(RECIPE.format(run=config.to_json(run)))
    cli.run(['train', str(folder / 'mine.py'), '--run', str(folder / 'run')])
    np.save(folder / 'a.npy', FEATURES[0])
    return folder


def test_a_newcomer_adds_one_as_the_page_says(newcomer):
    """The file of docs/variants.md, below 40 lines, and one line of configuration: it trains, answers and exports."""
    with pytest.raises(UserError, match=r"no connector 'soft_pool': .*--connector FILE"):
        Blip2.load(newcomer / 'run')
    model = Blip2.load(newcomer / 'run', connector=newcomer / 'soft_pool.py')
    assert len(model.caption([FEATURES[0]])) == 1
    names = [function.name for function in functions(model.run, to_flat(flatten(model.params)))]
    assert names == ['encode', 'prefill', 'step']


COMMANDS = (
    ('caption', 'RUN', 'PICTURE'),
    ('ask', 'RUN', 'PICTURE', 'what?'),
    ('rank', 'RUN', 'PICTURE', 'what?', 'red', 'blue'),
    ('chat', 'RUN', 'PICTURE'),
    ('evaluate', 'RUN', '--task', 'caption'),
    ('queries', 'RUN', '--out', 'OUT'),
    ('quantize', 'RUN', 'OUT', '--weights', 'int8'),
    ('export', 'RUN', 'OUT'),
    ('convert', 'RUN', 'OUT'),
    ('attention', 'RUN', 'PICTURE', '--out', 'OUT'),
    ('ground', 'RUN', 'PICTURE', 'red', '--out', 'OUT'),
)


@pytest.mark.parametrize('words', COMMANDS, ids=lambda words: words[0])
def test_a_command_takes_the_file_of_a_runs_own_connector(words, newcomer, tmp_path, monkeypatch):
    """Without it, the command says what is missing; with it, it does its work, or says what this run has not."""
    places = {'RUN': newcomer / 'run', 'PICTURE': newcomer / 'a.npy', 'OUT': tmp_path / 'out'}
    words = [str(places.get(word, word)) for word in words]
    monkeypatch.setattr('sys.stdin', io.StringIO('what?\n'))
    with pytest.raises(UserError, match=r"no connector 'soft_pool': .*--connector FILE"):
        cli.run(words)
    assert not (tmp_path / 'out').exists()
    lacks = {'queries': 'has no qformer', 'attention': 'has no qformer', 'ground': 'no words for boxes'}
    expected = pytest.raises(UserError, match=lacks[words[0]]) if words[0] in lacks else contextlib.nullcontext()
    with expected:
        cli.run([*words, '--connector', str(newcomer / 'soft_pool.py')])


def test_what_a_file_of_ones_own_lacks_is_not_mistaken_for_the_file(tmp_path):
    (tmp_path / 'soft_pool_too.py').write_text('import soft_pool_to\n')
    with pytest.raises(ModuleNotFoundError, match="'soft_pool_to'"):
        connectors.from_file(tmp_path / 'soft_pool_too.py')
    (tmp_path / 'empty.py').write_text('')
    with pytest.raises(UserError, match='defines no class Connector'):
        connectors.from_file(tmp_path / 'empty.py')
    with pytest.raises(UserError, match=r'is no \.py file'):
        connectors.from_file(tmp_path)
