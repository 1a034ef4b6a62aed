"""Stage 2 with T5, through the same recipe, data and loop as with OPT; and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from small import change, recipe

from qformer_jax import cli, config
from qformer_jax.errors import UserError
from qformer_jax.models import blip2
from qformer_jax.runs import run_dir
from qformer_jax.training import logs, loop

T5 = config.T5Config(
    vocab_size=0, width=16, depth=1, decoder_depth=1, heads=2, head_width=8, mlp_width=32, buckets=8, max_distance=20
)


def test_stage2_trains_on_the_same_rows_and_keeps_its_configuration(pictures, tmp_path):
    run = change(recipe('stage2', pictures, steps=30), 'model', lm=T5)
    loop.train(run, tmp_path / 'run')
    found = [record['loss'] for record in logs.records(tmp_path / 'run') if record['kind'] == 'train']
    assert len(found) == 30 and np.mean(found[-5:]) < 0.9 * found[0]
    done = run_dir.finished(tmp_path / 'run')
    assert done.run.model.lm == dataclasses.replace(T5, vocab_size=done.run.model.lm.vocab_size)
    assert set(run_dir.load_components(done)['lm']) == {'word_embedding', 'encoder', 'decoder', 'lm_head'}


def test_the_language_stage_refuses_t5(pictures, tmp_path):
    with pytest.raises(UserError, match="'language' trains a decoder-only language model, not T5"):
        loop.train(change(recipe('language', pictures), 'model', lm=T5), tmp_path / 'run')


def test_a_run_with_t5_is_read_back_from_its_json():
    run = config.Run('stage2', model=config.Blip2Config(lm=config.T5Config(activation='gelu_tanh')))
    assert config.from_json(config.to_json(run)) == run
    assert json.loads(config.to_json(run))['model']['lm']['family'] == 't5'


def test_a_recipe_with_t5_offers_its_options(tmp_path, capsys):
    code = (
        "from qformer_jax.config import T5, Blip2, Run\n\n\ndef config():\n    return Run('stage2', Blip2(lm=T5()))\n"
    )
    (tmp_path / 'mine.py').write_text(f'"""Stage 2 with T5."""\n\n{code}')
    with pytest.raises(SystemExit) as end:
        cli.run(['train', str(tmp_path / 'mine.py'), '--help'])
    assert end.value.code in (0, None)
    assert '--model.lm.head-width' in capsys.readouterr().out


def test_bfloat16_logits_are_float32():
    c = config.Blip2Config(None, None, reference.T5)
    model = blip2.Blip2Module(c, jnp.bfloat16)

    def run(model):
        text, text_mask = jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3), bool)
        hidden = model.target_hidden_states(blip2.Prefix.whole(model.lm.embed(text)), text, text_mask, text_mask)
        return hidden, model.lm.word_logits(hidden)

    (hidden, logits), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), method=run))
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
