"""Attention, MLP and the norms that every network here shares."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ..errors import UserError
from ..typing import Array, Bool, Float
from .lora import Adapted
from .quantized import Quantized, quantized_matmul, weight
from .vocab_extension import Extended

LECUN = nn.initializers.lecun_normal()  # keeps the variance


def at_least_float32(x: Array) -> Array:
    """Return `x` where precision matters (softmax, norms, losses): bfloat16 becomes float32, float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@struct.dataclass
class KeyValue:
    """Keys and values of one attention layer, split into heads; a cache and a picture's projection are this too."""

    key: Float['B M H K']
    value: Float['B M H K']

    def append(self, other: 'KeyValue') -> 'KeyValue':
        """Return these positions followed by the other's."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, other)


def quick_gelu(x: Array) -> Array:
    """CLIP's x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """Exact (erf) GELU; the tanh form is 5e-4 away, which parity would show."""
    return jax.nn.gelu(x, approximate=False)


def layer_norm(eps: float, dtype: DTypeLike) -> nn.LayerNorm:
    """LayerNorm with statistics in float32 or wider; the fast variance loses 1e-4 where the mean is large."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False)


def rms_norm(eps: float, dtype: DTypeLike) -> nn.RMSNorm:
    """RMSNorm (Zhang and Sennrich 2019): no mean, no bias; statistics in float32 or wider."""
    return nn.RMSNorm(epsilon=eps, dtype=dtype)


def matmul(x: Float['R I'], kernel: Array | Quantized | Adapted | Extended, out_dtype: DTypeLike) -> Float['R O']:
    """Return the products of each row of `x` with a kernel of any kind, computed in the precision of `x`.

    One row of bfloat16 goes through beside itself: XLA makes a sum down the columns of its product, which on an H100
    lets a step of OPT-2.7B take 5.1 ms, where two rows take 2.7 (experiments/quantization).
    """
    if isinstance(kernel, Extended):
        parts = (matmul(x, part, out_dtype) for part in (kernel.table, kernel.added.T))
        return jnp.concatenate(list(parts), axis=1)
    if isinstance(kernel, Adapted):
        step = matmul(matmul(x, kernel.down, x.dtype), kernel.up, out_dtype)
        return matmul(x, kernel.kernel, out_dtype) + kernel.scale * step
    if isinstance(kernel, Quantized):
        return quantized_matmul(x, kernel).astype(out_dtype)
    one = isinstance(x.shape[0], int) and x.shape[0] == 1  # an exported function has any number
    rows = jnp.concatenate([x, x]) if one and x.dtype.itemsize < 4 else x
    return jnp.matmul(rows, kernel.astype(x.dtype), preferred_element_type=out_dtype)[: x.shape[0]]


class Dense(nn.Module):
    """Dense layer over the last axis: a kernel of any kind, products in `dtype`."""

    width: int
    dtype: DTypeLike
    use_bias: bool = True
    kernel_init: Initializer = LECUN
    out_dtype: DTypeLike | None = None
    """Of the products; default: `dtype`."""

    @nn.compact
    def __call__(self, x: Float['*S I']) -> Float['*S O']:
        kernel = weight(self, 'kernel', self.kernel_init, (x.shape[-1], self.width))
        out_dtype = self.out_dtype or self.dtype
        # one product of [R, I]: on CPUs, XLA's gradient of the 3-d form takes four times as long
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = matmul(flat, kernel, out_dtype)
        if self.use_bias:
            y += self.param('bias', nn.initializers.zeros, (self.width,), jnp.float32).astype(out_dtype)[None]
        return y.reshape(*x.shape[:-1], y.shape[1])  # `width`, and any rows that were added


def dense(width: int, dtype: DTypeLike, use_bias: bool = True, kernel_init: Initializer = LECUN) -> Dense:
    """Dense layer over the last axis, products in `dtype`."""
    return Dense(width, dtype, use_bias, kernel_init)


def untied_head(vocab_size: int, dtype: DTypeLike) -> Dense:
    """Output table of its own, without bias: products in `dtype`, logits in float32 or wider."""
    return Dense(vocab_size, dtype, use_bias=False, out_dtype=jnp.promote_types(dtype, jnp.float32))


def tied_logits(x: Float['B T D'], table: Float['N D'] | Quantized | Extended) -> Float['B T M']:
    """Return the products of hidden states with a token table, in float32 or wider."""
    if isinstance(table, Extended):
        return jnp.concatenate([tied_logits(x, table.table), tied_logits(x, table.added)], axis=-1)
    flat = x.reshape(-1, x.shape[-1])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if isinstance(table, Quantized):
        logits = quantized_matmul(flat, table)
    else:
        logits = jnp.einsum('rd,nd->rn', flat, table.astype(x.dtype), preferred_element_type=wide)
    return logits.reshape(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be projected once and used by many queries.

    Raises UserError where the heads do not divide the width.
    """

    width: int
    heads: int
    key_bias: bool = True
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self):
        if self.width % self.heads:
            place = '/'.join(self.path)
            raise UserError(f'{place}: {self.heads} heads do not divide a width of {self.width}, change either')
        self.query = dense(self.width, self.dtype)
        self.key = dense(self.width, self.dtype, self.key_bias)
        self.value = dense(self.width, self.dtype)
        self.output = dense(self.width, self.dtype)

    def _heads(self, x: Float['B M D']) -> Float['B M H K']:
        return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)

    def project(self, x: Float['B M V']) -> KeyValue:
        """Return the keys and values of `x`."""
        return KeyValue(self._heads(self.key(x)), self._heads(self.value(x)))

    def __call__(
        self, x: Float['B S D'], kv: KeyValue, mask: Bool['b 1 s M'] | None, *, train: bool = False
    ) -> Float['B S D']:
        """Return what each position of `x` reads from `kv`; softmax in float32 or wider.

        Variables `nudges/.../weights` [B, H, S, M], where a caller gives any, are added to the weights: the gradient by
        a nudge of zero is that by the weights.
        """
        read = nn.dot_product_attention(
            self._heads(self.query(x)),
            kv.key,
            kv.value,
            mask=mask,
            dropout_rng=self.make_rng('dropout') if train and self.dropout else None,
            dropout_rate=self.dropout,
            broadcast_dropout=False,
            deterministic=not train,
            dtype=self.dtype,
            force_fp32_for_softmax=jnp.dtype(self.dtype).itemsize < 4,  # it would also narrow float64
        )
        if self.has_variable('attention_perturbation', 'weights'):
            read += jnp.einsum(
                'bhsm,bmhk->bshk', self.get_variable('attention_perturbation', 'weights').astype(read.dtype), kv.value
            )
        return self.output(read.reshape(x.shape))

    def weights(self, x: Float['B S D'], kv: KeyValue, mask: Bool['b 1 s M'] | None) -> Float['B H S M']:
        """Return how much of its reading each position of `x` takes from where; they sum to 1 over `kv`."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return nn.dot_product_attention_weights(
            self._heads(self.query(x)).astype(wide), kv.key.astype(wide), mask=mask, dtype=wide
        )


def attend(
    query: Float['B S H K'],
    kv: KeyValue,
    mask: Bool['B 1 s M'],
    bias: Float['B H S M'] | None = None,
    *,
    scale: float,
) -> Float['B S H K']:
    """Return what each query reads from `kv`, whose heads are the queries' or fewer, each then read by several.

    Softmax in float32 or wider; `jax.nn.dot_product_attention` would narrow float64.
    """
    batch, length, heads, width = query.shape
    groups = kv.key.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, width)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = scale * jnp.einsum('bsgrk,bmgk->bgrsm', grouped, kv.key, preferred_element_type=wide)
    if bias is not None:
        scores += bias.reshape(batch, groups, heads // groups, length, -1)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, jnp.finfo(wide).min)).astype(query.dtype)
    return jnp.einsum('bgrsm,bmgk->bsgrk', weights, kv.value).reshape(query.shape)


NONLINEARITIES = {
    'gelu': gelu,
    'gelu_tanh': partial(jax.nn.gelu, approximate=True),
    'quick_gelu': quick_gelu,
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}


class Mlp(nn.Module):
    """Two dense layers with a nonlinearity between them."""

    hidden: int
    width: int
    activation: str = 'gelu'
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.up = dense(self.hidden, self.dtype)
        self.down = dense(self.width, self.dtype)

    def __call__(self, x: Float['B S D']) -> Float['B S O']:
        return self.down(NONLINEARITIES[self.activation](self.up(x)))


class GatedMlp(nn.Module):
    """down(nonlinearity(gate(x)) * up(x)), without biases (Shazeer 2020)."""

    hidden: int
    width: int
    activation: str
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.gate = dense(self.hidden, self.dtype, use_bias=False)
        self.up = dense(self.hidden, self.dtype, use_bias=False)
        self.down = dense(self.width, self.dtype, use_bias=False)

    def __call__(self, x: Float['B S D']) -> Float['B S D']:
        return self.down(NONLINEARITIES[self.activation](self.gate(x)) * self.up(x))
