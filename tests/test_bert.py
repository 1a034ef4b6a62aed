"""A Q-Former that begins as BERT: its text branch reads as BERT does, the queries get a copy, the rest is fresh."""

import dataclasses

import jax
import numpy as np
import pytest
from reference import assert_close

from qformer_jax import config
from qformer_jax.convert import bert
from qformer_jax.convert.lazy_tensors import in_memory, read_all
from qformer_jax.convert.table import check_complete, check_derived, to_jax, to_torch
from qformer_jax.models import blip2, masks
from qformer_jax.models.qformer import Qformer
from qformer_jax.rules import flatten, unflatten

torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
transformers = pytest.importorskip('transformers', reason='the oracle is Hugging Face')

C = config.QformerConfig(
    feature_width=8,
    num_queries=2,
    width=24,
    depth=3,
    heads=3,
    mlp_width=40,
    vocab_size=50,
    max_positions=12,
    embed_width=4,
)
ONLY_QFORMER = config.Blip2Config(None, C, None)
NUMBERS = np.random.default_rng(0)
TEXT = NUMBERS.integers(0, 50, size=(2, 6)).astype(np.int32)
SEEN = np.arange(6)[None] < np.array([[6], [4]])


def random_bert(family: str):
    c = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=12,
    )
    model = getattr(transformers, family)(c).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


def state_of(model) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.state_dict().items()}


def begin(state: dict[str, np.ndarray], c: config.Blip2Config = ONLY_QFORMER) -> tuple[dict, list[str]]:
    """Return the Q-Former's parameters, and the paths of those that BERT did not give."""
    torch_state = bert.plain(in_memory(state))
    table = bert.table(torch_state)
    jax_state = to_jax(table, torch_state)
    fresh = check_complete(jax_state, blip2.shapes(c), table)
    check_derived(table, torch_state, jax_state)
    first = flatten(blip2.init(blip2.Blip2Module(c), jax.random.key(0)))
    return unflatten(first | read_all(jax_state))['qformer'], fresh


def read(params, with_logits: bool = False):
    def run(model):
        text = model(masks.unimodal(0, SEEN), text=TEXT).text
        return model.word_logits(text) if with_logits else text

    return jax.jit(lambda p: Qformer(C).apply({'params': p}, method=run))(params)


def with_first_type(params, state):
    """BERT adds a token type to every position, and LAVIS leaves it out: put it back for the comparison."""
    kind = state['embeddings.token_type_embeddings.weight'][:1]
    return params | {'position_embedding': params['position_embedding'] + kind}


def test_text_branch_reads_as_bert_does():
    hf_model = random_bert('BertModel')
    params, fresh = begin(state_of(hf_model))
    with torch.no_grad():
        want = hf_model(torch.tensor(TEXT).long(), attention_mask=torch.tensor(SEEN).long()).last_hidden_state.numpy()
    assert_close(read(with_first_type(params, state_of(hf_model)))[SEEN], want[SEEN])
    assert np.abs(read(params)[SEEN] - want[SEEN]).max() > 0.01  # the type that is left out is not zero
    assert 'qformer/lm_head/bias' in fresh


def test_queries_get_a_copy_of_the_feed_forward_network():
    params, _ = begin(state_of(random_bert('BertModel')))
    for i in range(C.depth):
        layer = params[f'layer_{i}']
        for part in ('mlp', 'mlp_norm'):
            same = jax.tree.map(np.array_equal, layer[f'query_{part}'], layer[f'text_{part}'])
            assert jax.tree.all(same)


def test_language_model_head_comes_along():
    hf_model = random_bert('BertForMaskedLM')
    state = state_of(hf_model)
    params, fresh = begin(state)
    with torch.no_grad():
        want = hf_model(torch.tensor(TEXT).long(), attention_mask=torch.tensor(SEEN).long()).logits.numpy()
    types = bert.plain(in_memory(state))['embeddings.token_type_embeddings.weight'].read()
    params = with_first_type(params, {'embeddings.token_type_embeddings.weight': types})
    assert_close(read(params, with_logits=True)[SEEN][:, :50], want[SEEN])
    assert params['lm_head']['bias'][50] == 0  # the word that was added
    assert not any('lm_head' in path for path in fresh)


def test_what_stays_fresh_is_what_bert_does_not_have():
    _, fresh = begin(state_of(random_bert('BertForMaskedLM')))
    parts = {path.split('/')[2] if '/layer_' in path else path.split('/')[1] for path in fresh}
    assert parts == {
        *('query_token', 'added_embedding', 'feature_norm', 'cross_attention', 'cross_attention_norm'),
        *('vision_projection', 'text_projection', 'itm_head', 'temperature'),
    }


@pytest.mark.parametrize(
    'fields', [{'cross_attention_freq': 3}, {'cross_attention_freq': 7}, {'num_queries': 1}, {'num_queries': 64}]
)
def test_a_bert_begins_a_qformer_of_any_frequency_and_number_of_queries(fields):
    c = config.Blip2Config(None, dataclasses.replace(C, **fields), lm=None)
    params, fresh = begin(state_of(random_bert('BertModel')), c)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, blip2.shapes(c)['qformer'])
    reads = {path.split('/')[1] for path in fresh if 'cross_attention/' in path}
    assert reads == {f'layer_{i}' for i in range(C.depth) if i % c.qformer.cross_attention_freq == 0}


def test_names_of_the_first_release_are_read():
    """`bert-base-uncased` still has the norms' names of TensorFlow, and a head for the next sentence."""
    state = state_of(random_bert('BertForPreTraining'))
    old = {
        key.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): value
        for key, value in state.items()
    }
    assert any(key.endswith('gamma') for key in old)
    for new, want in zip(begin(old), begin(state), strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, new, want))


def test_a_text_branch_is_a_bert_again():
    torch_state = bert.plain(in_memory(state_of(random_bert('BertForMaskedLM'))))
    table = bert.table(torch_state)
    back = to_torch(table, to_jax(table, torch_state))
    assert torch_state.keys() - back.keys() == {'embeddings.token_type_embeddings.weight'}
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor.read(), torch_state[key].read(), err_msg=key)
