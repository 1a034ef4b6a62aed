"""`qformer verify --against huggingface`: tiny models with random weights agree, and a changed layer is named."""

import dataclasses
import re
import sys

import numpy as np
import pytest
import test_parity_huggingface as tiny
from safetensors.numpy import save

from qformer_jax import cli
from qformer_jax.convert.lazy_tensors import in_memory
from qformer_jax.errors import UserError
from qformer_jax.runs import import_export
from qformer_jax.verify.huggingface import compare

torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
transformers = pytest.importorskip('transformers', reason='the oracle is Hugging Face')


def language_model(name: str):
    """Return a language model alone with every weight random."""
    c = {'opt': tiny.opt_config, 't5': tiny.t5_config, 'llama': tiny.llama_config}[name]()
    kind = {'opt': 'OPTForCausalLM', 't5': 'T5ForConditionalGeneration', 'llama': 'LlamaForCausalLM'}[name]
    if name == 't5':
        c.num_decoder_layers = 3  # one more than the encoder has
    model = getattr(transformers, kind)(c)
    if name == 't5':  # they tie its output table, which Flan-T5 does not
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(c.vocab_size, c.d_model))
    return randomised(model)


def opt_350m():
    """Return an OPT with narrow token vectors and its norms behind the branches."""
    c = tiny.opt_config()
    c.word_embed_proj_dim, c.do_layer_norm_before = 16, False
    return randomised(transformers.OPTForCausalLM(c))


def bert():
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
        )
    )


def dinov2():
    return transformers.Dinov2Model(
        transformers.Dinov2Config(
            image_size=28, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, layerscale_value=1.0
        )
    )


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model.eval()


MODELS = {
    **{name: (lambda name=name: tiny.case(name)[1]) for name in tiny.CASES},
    'opt alone': lambda: language_model('opt'),
    'opt-350m alone': opt_350m,
    't5 alone': lambda: language_model('t5'),
    'llama alone': lambda: language_model('llama'),
    'bert': lambda: randomised(bert()),
    'dinov2': lambda: randomised(dinov2()),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return the function that gives the folder of a model, saved once."""
    root = tmp_path_factory.mktemp('models')

    def get(name: str):
        if not (root / name).exists():
            MODELS[name]().save_pretrained(root / name)
        return root / name

    return get


def exit_code(*arguments, capsys):
    """Return the exit code of `qformer verify --against huggingface` and what it printed."""
    try:
        cli.run(['verify', '--against', 'huggingface', *map(str, arguments)])
    except SystemExit as stop:
        return stop.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


@pytest.mark.parametrize('name', MODELS)
def test_every_layer_agrees(name, folder, capsys):
    code, out = exit_code(folder(name), capsys=capsys)
    assert code == 0, out
    assert re.search(r'all \d+ layers agree\n$', out)
    assert ('post_layernorm has eps 1e-06, LAVIS and we 1e-05: theirs was set to ours' in out) == (name in tiny.CASES)


def changed(monkeypatch, path: str, change) -> None:
    """Let our side load one tensor changed."""
    read = import_export.read

    def spoilt(sources, like):
        model = read(sources, like)
        tensor = change(model.tensors[path].read())
        return dataclasses.replace(model, tensors={**model.tensors, **in_memory({path: tensor})})

    monkeypatch.setattr(import_export, 'read', spoilt)


FAULTS = [
    ('opt', 'vit/position_embedding', 'vit/embedding'),
    ('opt', 'qformer/feature_norm/scale', 'qformer/feature_norm'),
    ('opt', 'lm/layer_1/attention/value/kernel', 'lm/layer_1'),
    ('instruct_t5', 'qformer/layer_2/text_mlp/up/kernel', 'qformer/layer_2'),
    ('instruct_t5', 'lm/encoder/layer_1/mlp/gate/kernel', 'lm/encoder/layer_1'),
    ('instruct_t5', 'lm/decoder/relative_bias', 'lm/decoder/layer_0'),
    ('instruct_t5', 'lm/lm_head/kernel', 'logits'),
    ('itm', 'qformer/itm_head/bias', 'itm_logits'),
    ('itm', 'qformer/text_projection/kernel', 'itc_similarity'),
]


@pytest.mark.parametrize('name, path, first', FAULTS, ids=[path for _, path, _ in FAULTS])
def test_the_first_layer_that_differs_is_named(name, path, first, folder, monkeypatch, capsys):
    def nudge(x):
        return x + 1e-3 * np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype)

    changed(monkeypatch, path, nudge)
    code, out = exit_code(folder(name), capsys=capsys)
    assert code == 1
    assert out.endswith(f'in the order in which data flows: {first}\n')


def test_only_float32_and_one_folder(folder):
    for arguments in (['a', 'b'], ['a', '--dtype', 'bfloat16']):
        with pytest.raises(UserError, match='takes one folder, and compares in float32'):
            cli.run(['verify', '--against', 'huggingface', *arguments])


def test_no_folder_of_theirs_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r'is no Hugging Face folder: it has no config\.json$'):
        compare.check(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    (tmp_path / 'model.safetensors').write_bytes(save({'wte.weight': np.zeros((2, 2), np.float32)}))
    with pytest.raises(UserError, match=r"no table for models of type 'gpt2'"):
        compare.check(tmp_path)


def test_without_transformers_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match=r"pip install 'qformer_jax\[torch\]'$"):
        compare.check(folder('opt alone'))
