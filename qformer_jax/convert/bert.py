"""BERT as the beginning of a Q-Former (BLIP-2, section 3.1), and the rows of its modules that a Q-Former shares.

As LAVIS starts its Q-Former: BERT's feed-forward network becomes both the text's and the queries', cross-attention,
queries and heads keep their first values, and the row of `[DEC]`, which BERT does not have, is a fresh one.
"""

from dataclasses import replace

import numpy as np

from .lazy_tensors import State
from .table import Derived, Ignored, NewlyInitialized, Row, Table, Transform, linear, norm

WORDS = 30522
"""Rows of BERT's vocabulary; with `[DEC]` the Q-Former has one more."""


WORD_PATHS = ('qformer/word_embedding', 'qformer/added_embedding')
"""Where the rows of a Q-Former's token table go: BERT's, and that of `[DEC]`."""


def attention(key: str, path: str, projections: str = 'self') -> Table:
    """Return the rows of a BERT attention with its norm; Hugging Face's Q-Former says `attention` for `self`."""
    return (
        *linear(f'{key}.{projections}.query', f'{path}/query'),
        *linear(f'{key}.{projections}.key', f'{path}/key'),
        *linear(f'{key}.{projections}.value', f'{path}/value'),
        *linear(f'{key}.output.dense', f'{path}/output'),
        *norm(f'{key}.output.LayerNorm', f'{path}_norm'),
    )


def feed_forward(key: str, path: str, kind: str = '') -> Table:
    """Return the rows of a BERT feed-forward network with its norm; the queries' own has the kind `_query`."""
    return (
        *linear(f'{key}.intermediate{kind}.dense', f'{path}/up'),
        *linear(f'{key}.output{kind}.dense', f'{path}/down'),
        *norm(f'{key}.output{kind}.LayerNorm', f'{path}_norm'),
    )


def _for_queries_too(row: Row) -> Row:
    (path,), one = row.paths, row.transform
    twice = Transform(lambda x: one.forward(x) * 2, lambda text, query: one.backward(text))
    return replace(row, paths=(path, path.replace('text_mlp', 'query_mlp')), transform=twice)


def fresh(why: str, *paths: str) -> Table:
    """Return the rows of parameters that keep their first values, all for the same reason."""
    return tuple(NewlyInitialized(path, why) for path in paths)


def _dense(*paths: str) -> list[str]:
    return [f'{path}/{name}' for path in paths for name in ('kernel', 'bias')]


_LAYER = 'encoder.layer.{i}'
_CROSS = 'qformer/layer_{i}/cross_attention'
_READS_FEATURES = (
    *('qformer/feature_norm/scale', 'qformer/feature_norm/bias'),
    *_dense(*(f'{_CROSS}/{name}' for name in ('query', 'key', 'value', 'output'))),
    *(f'{_CROSS}_norm/scale', f'{_CROSS}_norm/bias'),
)
_HEADS = _dense('qformer/vision_projection', 'qformer/text_projection', 'qformer/itm_head')
LM_HEAD = (
    *_dense('qformer/lm_head/transform'),
    *('qformer/lm_head/norm/scale', 'qformer/lm_head/norm/bias', 'qformer/lm_head/bias'),
)
"""Paths of the language-model head."""
_ENCODER: Table = (
    Row('embeddings.word_embeddings.weight', ('qformer/word_embedding',)),
    NewlyInitialized('qformer/added_embedding', 'BERT has no [DEC]: the vocabulary grows by one row, 30522 -> 30523'),
    Row('embeddings.position_embeddings.weight', ('qformer/position_embedding',)),
    Ignored('embeddings.token_type_embeddings.weight', 'the Q-Former has no token types, and LAVIS drops them'),
    Ignored('embeddings.position_ids', 'a buffer: 0, 1, 2, ...'),
    *norm('embeddings.LayerNorm', 'qformer/embedding_norm'),
    *attention(_LAYER + '.attention', 'qformer/layer_{i}/self_attention'),
    *map(_for_queries_too, feed_forward(_LAYER, 'qformer/layer_{i}/text_mlp')),
    Ignored('pooler.dense.weight', 'the Q-Former has no pooler'),
    Ignored('pooler.dense.bias', 'the Q-Former has no pooler'),
    *fresh('BERT reads no features', *_READS_FEATURES),
    *fresh('BERT has no queries', 'qformer/query_token', *_dense('qformer/query_mixer/up', 'qformer/query_mixer/down')),
    *fresh('BERT reads no features', 'qformer/residual_projection/kernel', 'qformer/residual_gate'),
    *fresh('a head that stage 1 trains', *_HEADS, 'qformer/temperature'),
)

_HEAD = 'cls.predictions.'
_WITH_DEC = Transform(lambda bias: (np.concatenate([bias, np.zeros_like(bias[:1])]),), lambda bias: bias[:-1])
"""The bias of every word <-> the same and a zero for `[DEC]`."""
MASKED_LM: Table = (
    *_ENCODER,
    *linear(_HEAD + 'transform.dense', 'qformer/lm_head/transform'),
    *norm(_HEAD + 'transform.LayerNorm', 'qformer/lm_head/norm'),
    Row(_HEAD + 'bias', ('qformer/lm_head/bias',), _WITH_DEC),
    Derived(_HEAD + 'decoder.weight', ('qformer/word_embedding',), lambda table: table),
    Derived(_HEAD + 'decoder.bias', ('qformer/lm_head/bias',), lambda bias: bias[:-1]),
    Ignored('cls.seq_relationship.weight', 'the Q-Former does not predict the next sentence'),
    Ignored('cls.seq_relationship.bias', 'the Q-Former does not predict the next sentence'),
)
"""BERT with its language-model head, as `bert-base-uncased` is published."""

ENCODER: Table = (*_ENCODER, *fresh('this BERT has no language-model head', *LM_HEAD))
"""BERT without a head, such as MiniLM."""


def table(state: State) -> Table:
    """Return the rows for a state dict that `plain` has named."""
    return MASKED_LM if _HEAD + 'bias' in state else ENCODER


def plain(state: State) -> State:
    """Return a BERT's tensors as `BertModel` names them: without `bert.`, and norms without the names of TensorFlow."""

    def name(key: str) -> str:
        key = key.removeprefix('bert.')
        return key.replace('LayerNorm.gamma', 'LayerNorm.weight').replace('LayerNorm.beta', 'LayerNorm.bias')

    return {name(key): tensor for key, tensor in state.items()}
