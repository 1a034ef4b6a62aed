"""BLIP-2 and InstructBLIP against Hugging Face's classes, tiny and with every weight random; and the way back."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import EVA, QFORMER, assert_close, nhwc
from safetensors.numpy import load_file

from qformer_jax import config
from qformer_jax.convert import huggingface
from qformer_jax.convert.lazy_tensors import in_memory, read_all
from qformer_jax.convert.table import check_complete, convert, to_jax, to_torch
from qformer_jax.errors import UserError
from qformer_jax.models import blip2, masks
from qformer_jax.rules import flatten

torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
transformers = pytest.importorskip('transformers', reason='the oracle is Hugging Face')

Q, IMAGE_TOKEN = QFORMER.num_queries, 55
OPT = config.OptConfig(vocab_size=56, width=24, depth=2, heads=3, mlp_width=40, max_positions=40)
LLAMA = config.LlamaConfig(
    vocab_size=56, width=24, depth=2, heads=3, kv_heads=3, head_width=8, mlp_width=40, max_positions=40
)
T5 = config.T5Config(
    vocab_size=56, width=24, depth=2, decoder_depth=2, heads=3, head_width=10, mlp_width=40, buckets=8, max_distance=20
)
NUMBERS = np.random.default_rng(0)
PIXELS = NUMBERS.normal(size=(2, 3, 56, 56)).astype(np.float32)
WORDS = NUMBERS.integers(3, QFORMER.vocab_size, size=(2, 5)).astype(np.int32)
SEEN = np.arange(5)[None] < np.array([[5], [3]])  # the second text has 3 words, padding on the right
PROMPT = NUMBERS.integers(3, 50, size=(2, 6)).astype(np.int32)
ANSWER = NUMBERS.integers(3, 50, size=(2, 4)).astype(np.int32)  # what T5's decoder reads


def opt_config():
    return transformers.OPTConfig(
        vocab_size=OPT.vocab_size,
        hidden_size=OPT.width,
        word_embed_proj_dim=OPT.width,
        num_hidden_layers=OPT.depth,
        num_attention_heads=OPT.heads,
        ffn_dim=OPT.mlp_width,
        max_position_embeddings=OPT.max_positions,
    )


def t5_config():
    c = transformers.T5Config(
        vocab_size=T5.vocab_size,
        d_model=T5.width,
        d_kv=T5.head_width,
        d_ff=T5.mlp_width,
        num_layers=T5.depth,
        num_heads=T5.heads,
        relative_attention_num_buckets=T5.buckets,
        relative_attention_max_distance=T5.max_distance,
        feed_forward_proj='gated-gelu',
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    c.dense_act_fn = 'gelu'
    return c


def llama_config():
    return transformers.LlamaConfig(
        vocab_size=LLAMA.vocab_size,
        hidden_size=LLAMA.width,
        num_hidden_layers=LLAMA.depth,
        num_attention_heads=LLAMA.heads,
        num_key_value_heads=LLAMA.kv_heads,
        intermediate_size=LLAMA.mlp_width,
        max_position_embeddings=LLAMA.max_positions,
        rms_norm_eps=LLAMA.norm_eps,
        tie_word_embeddings=LLAMA.tied,
    )


def their_config(family: str, text_config):
    """Return the configuration of a `Blip2` or `InstructBlip` class at the sizes of the recorded cases."""
    vision = {
        'hidden_size': EVA.width,
        'intermediate_size': EVA.mlp_width,
        'num_hidden_layers': EVA.depth,
        'num_attention_heads': EVA.heads,
        'image_size': EVA.image_size,
        'patch_size': EVA.patch_size,
    }
    connector = {
        'vocab_size': QFORMER.vocab_size + 1,
        'hidden_size': QFORMER.width,
        'num_hidden_layers': QFORMER.depth,
        'num_attention_heads': QFORMER.heads,
        'intermediate_size': QFORMER.mlp_width,
        'max_position_embeddings': QFORMER.max_positions,
        'encoder_hidden_size': EVA.width,
    }
    if family == 'Blip2ForImageTextRetrieval':
        connector['use_qformer_text_input'] = True
    prefix = family.partition('For')[0]
    c = getattr(transformers, f'{prefix}Config')(
        vision_config=vision,
        qformer_config=connector,
        text_config=text_config,
        num_query_tokens=Q,
        image_token_index=IMAGE_TOKEN if text_config else None,
    )
    if prefix == 'Blip2':
        c.image_text_hidden_size = QFORMER.embed_width
    return c


def random_model(family: str, text_config=None):
    """Return their model with every weight random: ones and zeros would hide a wrong norm or bias."""
    model = getattr(transformers, family)(their_config(family, text_config)).eval()
    if text_config and text_config.model_type == 't5':  # they tie its output table, which Flan-T5 does not
        model.language_model.lm_head.weight = torch.nn.Parameter(torch.zeros(T5.vocab_size, T5.width))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
            if name.endswith('qkv.bias'):
                parameter[EVA.width : 2 * EVA.width] = 0  # EVA has no bias of keys
    model.vision_model.post_layernorm.eps = 1e-5  # as LAVIS has it; theirs is the tower's
    return model


def state_of(model) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.state_dict().items()}


def model_of(side: str, lm) -> config.Blip2Config:
    return config.Blip2Config(EVA, dataclasses.replace(QFORMER, text_side=side), lm)


CASES = {
    'opt': ('Blip2ForConditionalGeneration', model_of('none', OPT), opt_config),
    't5': ('Blip2ForConditionalGeneration', model_of('none', T5), t5_config),
    'instruct_t5': ('InstructBlipForConditionalGeneration', model_of('reads', T5), t5_config),
    'instruct_llama': ('InstructBlipForConditionalGeneration', model_of('reads', LLAMA), llama_config),
    'itm': ('Blip2ForImageTextRetrieval', model_of('retrieval', None), lambda: None),
}


@functools.cache
def case(name: str):
    """Return our configuration, their model, and its parameters as ours."""
    family, c, text_config = CASES[name]
    model = random_model(family, text_config())
    return c, model, convert(huggingface.blip2(c), state_of(model), blip2.shapes(c))


def apply(c: config.Blip2Config, params, method):
    return jax.jit(lambda p: blip2.Blip2Module(c).apply({'params': p}, method=method))(params)


GENERATE = [name for name in CASES if name != 'itm']


def steps(model):
    """Return our normalised features, query output and soft prefix, and the logits of all that is read after it.

    A decoder reads [prefix, prompt]; T5's encoder reads that, and its decoder the answer.
    """
    features = model.vit(nhwc(PIXELS)).features
    feature_mask = jnp.ones(features.shape[:2], bool)
    text = (WORDS, SEEN) if model.config.qformer.text_side == 'reads' else (None, None)
    queries = model.query_features(features, feature_mask, *text).queries
    prefix = model.lm_projection(queries)
    x = jnp.concatenate([prefix, model.lm.embed(PROMPT)], axis=1)
    feature_mask = jnp.ones(x.shape[:2], bool)
    if model.config.lm.family == 't5':
        memory = model.lm.encode(x, feature_mask)
        hidden = model.lm.decode(model.lm.embed(ANSWER), np.ones(ANSWER.shape, bool), memory).hidden
    else:
        hidden = model.lm(x, feature_mask).hidden
    return model.qformer.feature_norm(features), queries, prefix, model.lm.word_logits(hidden)


def words(name: str) -> dict:
    """Return what InstructBLIP's Q-Former reads."""
    if 'instruct' not in name:
        return {}
    return {'qformer_input_ids': torch.tensor(WORDS).long(), 'qformer_attention_mask': torch.tensor(SEEN).long()}


@pytest.mark.parametrize('name', GENERATE)
def test_every_step_from_pixels_to_logits_equals_theirs(name):
    c, expected, params = case(name)
    ids = np.concatenate([np.full((2, Q), IMAGE_TOKEN), PROMPT], axis=1)
    answer = {'decoder_input_ids': torch.tensor(ANSWER).long()} if c.lm.family == 't5' else {}
    with torch.no_grad():
        want = expected(pixel_values=torch.tensor(PIXELS), input_ids=torch.tensor(ids), **words(name), **answer)
        want_queries = want.qformer_outputs.last_hidden_state[:, :Q]
        want_prefix = expected.language_projection(want_queries)
    features, queries, prefix, logits = apply(c, params, steps)
    assert_close(features, want.vision_outputs.last_hidden_state)
    assert_close(queries, want_queries)
    assert_close(prefix, want_prefix)
    assert_close(logits, want.logits)


def test_where_the_queries_look_equals_theirs():
    c, expected, params = case('opt')

    def run(model):
        features = model.vit(nhwc(PIXELS)).features
        out = model.query_features(features, jnp.ones(features.shape[:2], bool), keep_attention=True)
        return out.attention, out.self_attention

    expected.qformer.set_attn_implementation('eager')
    with torch.no_grad():
        features = expected.vision_model(torch.tensor(PIXELS)).last_hidden_state
        queries = expected.query_tokens.expand(len(PIXELS), -1, -1)
        out = expected.qformer(query_embeds=queries, encoder_hidden_states=features, output_attentions=True)
    reads, self_attention_weights = apply(c, params, run)
    want = [x for x in out.attentions if x.shape[-1] == features.shape[1]]
    want += [x for x in out.attentions if x.shape[-1] == Q]
    assert len(want) == len(out.attentions) > len(self_attention_weights)
    for x, y in zip((*reads, *self_attention_weights), want, strict=True):
        assert_close(x, y)


def test_retrieval_scores_equal_theirs():
    c, expected, params = case('itm')

    def run(model):
        features = model.vit(nhwc(PIXELS)).features
        feature_mask = jnp.ones(features.shape[:2], bool)
        batched = model.query_features(features, feature_mask, WORDS, SEEN).queries
        text = model.qformer(masks.unimodal(0, jnp.asarray(SEEN)), text=WORDS).text
        image = model.qformer.embed_image(model.query_features(features, feature_mask).queries)
        cosines = jnp.einsum('bqe,ce->bcq', image, model.qformer.embed_text(text)).max(axis=-1)
        return model.qformer.match(batched), cosines

    inputs = {
        'pixel_values': torch.tensor(PIXELS),
        'input_ids': torch.tensor(WORDS).long(),
        'attention_mask': torch.tensor(SEEN).long(),
    }
    matched, cosines = apply(c, params, run)
    with torch.no_grad():
        assert_close(matched, expected(**inputs, use_image_text_matching_head=True).logits_per_image)
        assert_close(cosines, expected(**inputs).logits_per_image)


@pytest.mark.parametrize('name', CASES)
def test_the_way_back_is_theirs_to_the_last_bit(name):
    c, expected, params = case(name)
    back, want = theirs_of(c, params), state_of(expected)
    assert back.keys() == want.keys()
    for key in want:
        np.testing.assert_array_equal(back[key], want[key], err_msg=key)
        assert back[key].dtype == want[key].dtype
    copies = {key: torch.tensor(value) for key, value in back.items()}
    type(expected)(expected.config).load_state_dict(copies, strict=True)


def theirs_of(c: config.Blip2Config, params) -> dict[str, np.ndarray]:
    return read_all(to_torch(huggingface.blip2(c), in_memory(flatten(params))))


@pytest.mark.parametrize('name', CASES)
def test_a_file_that_they_saved_is_read(name, tmp_path):
    """Saving leaves tied tensors out."""
    c, expected, params = case(name)
    expected.save_pretrained(tmp_path)
    saved = load_file(tmp_path / 'model.safetensors')
    again = convert(huggingface.blip2(c), saved, blip2.shapes(c))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_stage1_begins_from_their_retrieval_model():
    _, expected, _ = case('itm')
    c = model_of('full', None)
    table = huggingface.blip2(c)
    computed = to_jax(table, in_memory(state_of(expected)))
    fresh = check_complete(computed, blip2.shapes(c), table)
    assert fresh and all(re.fullmatch('qformer/(temperature|lm_head/.*)', path) for path in fresh)
    with pytest.raises(UserError, match="no row of the table has the parameter 'qformer/temperature'"):
        to_torch(table, computed | in_memory({'qformer/temperature': np.ones(())}))


@pytest.mark.parametrize('name, embeddings', [('itm', 'embeddings.'), ('instruct_llama', 'qformer.embeddings.')])
def test_old_files_with_counting_buffers_are_read(name, embeddings):
    c, expected, params = case(name)
    state = state_of(expected) | {embeddings + 'position_ids': np.arange(40)[None]}
    again = convert(huggingface.blip2(c), state, blip2.shapes(c))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


KEY_BIAS = 'vision_model.encoder.layers.1.self_attn.qkv.bias'


def with_key_bias() -> dict[str, np.ndarray]:
    bias = state_of(case('itm')[1])[KEY_BIAS].copy()
    bias[EVA.width] = 1e-6
    return state_of(case('itm')[1]) | {KEY_BIAS: bias}


def test_a_bias_of_keys_has_no_place_in_eva():
    c = CASES['itm'][1]
    with pytest.raises(
        UserError, match=rf"^'{KEY_BIAS}' \[144\] cannot be .*/value/bias': its middle third.*must be zero"
    ):
        convert(huggingface.blip2(c), with_key_bias(), blip2.shapes(c))


def test_a_tower_with_all_biases_keeps_the_bias_of_keys():
    c = dataclasses.replace(CASES['itm'][1], vit=dataclasses.replace(EVA, attention_bias='all'))
    params = convert(huggingface.blip2(c), with_key_bias(), blip2.shapes(c))
    assert params['vit']['layer_1']['attention']['key']['bias'][0] == np.float32(1e-6)
    np.testing.assert_array_equal(theirs_of(c, params)[KEY_BIAS], with_key_bias()[KEY_BIAS])


def test_a_key_of_another_model_is_named():
    c, expected, _ = case('itm')
    state = state_of(expected)
    state['qformer.encoder.layers.0.output.dense.weight'] = state.pop('qformer.encoder.layer.0.output.dense.weight')
    with pytest.raises(UserError, match=r"key 'qformer\.encoder\.layers\.0.*nearest: 'qformer\.encoder\.layer\.0"):
        convert(huggingface.blip2(c), state, blip2.shapes(c))


def test_a_missing_tensor_is_named():
    c, expected, _ = case('itm')
    state = state_of(expected)
    del state['qformer.encoder.layer.1.output.dense.bias']
    with pytest.raises(
        UserError, match=r"no tensor for 1 of the model's .* first 'qformer/layer_1/text_mlp/down/bias'"
    ):
        convert(huggingface.blip2(c), state, blip2.shapes(c))
