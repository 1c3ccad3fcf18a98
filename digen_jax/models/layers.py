"""Layers shared by the model families.

Modules here are definitions only: `split` turns one into a graph definition
and a plain nested dict of arrays, and everything after that is pure functions
of that dict. Parameters may be kept in any float dtype; each layer casts them
to its compute dtype where it uses them. Every parameter names its dimensions
in the metadata `logical_axes`, which the sharding rules read.

Rounding is explicit (`round_to`): left alone, XLA may skip a float32 ->
bfloat16 -> float32 round trip in one program and not in another, and the same
policy would then score its own samples differently in rollout and training.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

Params = dict[str, Any]
Axes = tuple[str | None, ...]

# Leaves that are data, not weights: loaded, saved, sharded, but never trained.
CONSTANTS = ("pos_embed",)

xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()


def round_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Casts `x` to `dtype` with a rounding that the compiler cannot skip."""
  info = jnp.finfo(dtype)
  if info.bits < 32:
    x = jax.lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)
  return x.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Bound:
  """`function(graphdef, ...)` with its graphdef given.

  Unlike a partial or a closure, equal ones hash and compare equal.
  """

  function: Callable[..., Any]
  graphdef: nnx.GraphDef

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """`function(graphdef, *args, **kwargs)`."""
    return self.function(self.graphdef, *args, **kwargs)


class Linear(nnx.Module):
  """Affine map `x W + b`, with an optional low-rank path.

  Attributes:
    kernel: [in, out].
    bias: [out], or None.
    lora_a: [in, rank] or None; with `lora_b` [rank, out] it adds
      `(x A) B * lora_scale` (Hu et al. 2021, eq. 3). See `models/lora.py`.
    dtype: of the products' inputs.
    out_dtype: of the products' outputs; they are summed in float32.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    axes: Axes,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
    out_dtype: DTypeLike | None = None,
    kernel_init: Callable = xavier,
  ):
    self.kernel = nnx.Param(
      kernel_init(rngs.params(), (in_features, out_features), jnp.float32),
      logical_axes=axes,
      read_as=jnp.dtype(dtype),
    )
    self.bias = (
      nnx.Param(jnp.zeros(out_features), logical_axes=axes[-1:])
      if use_bias
      else None
    )
    self.lora_a = None
    self.lora_b = None
    self.lora_scale = 1.0
    self.dtype = jnp.dtype(dtype)
    self.out_dtype = jnp.dtype(out_dtype or dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [..., in] -> [..., out] `out_dtype`."""
    x = round_to(x, self.dtype)
    y = self._product(x, self.kernel[...], self.out_dtype)
    if self.lora_a is not None:
      low = self._product(x, self.lora_a[...], self.dtype)
      low = self._product(low, self.lora_b[...], self.out_dtype)
      y += low * self.lora_scale
    if self.bias is not None:
      bias = self.bias[...].astype(jnp.float32)
      y += bias.reshape((1,) * (y.ndim - 1) + bias.shape)
    return round_to(y, self.out_dtype)

  def _product(
    self, x: jax.Array, kernel: jax.Array, dtype: DTypeLike
  ) -> jax.Array:
    """`x @ kernel` from `self.dtype`, rounded to `dtype`, as float32."""
    y = jax.lax.dot_general(
      round_to(x, self.dtype),
      round_to(kernel, self.dtype),
      (((x.ndim - 1,), (0,)), ((), ())),
      preferred_element_type=dtype,
    )
    return round_to(y, dtype).astype(jnp.float32)


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis, in float32.

  Attributes:
    scale: [dim].
  """

  def __init__(self, dim: int, *, eps: float = 1e-6):
    self.scale = nnx.Param(jnp.ones(dim), logical_axes=(None,))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [..., dim] any float dtype -> [..., dim] float32."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    scale = self.scale[...].astype(jnp.float32)
    return (
      x
      * jax.lax.rsqrt(mean_square + self.eps)
      * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    )


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """LayerNorm over the last axis without learned scale: [..., d] float32."""
  x = x.astype(jnp.float32)
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + eps)


class LayerNorm(nnx.Module):
  """LayerNorm over the last axis with scale and bias, in float32.

  Attributes:
    scale: [dim].
    bias: [dim].
  """

  def __init__(self, dim: int, *, eps: float = 1e-6):
    self.scale = nnx.Param(jnp.ones(dim), logical_axes=(None,))
    self.bias = nnx.Param(jnp.zeros(dim), logical_axes=(None,))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, S, dim] any float dtype -> [B, S, dim] float32."""
    scale = self.scale[...].astype(jnp.float32)
    bias = self.bias[...].astype(jnp.float32)
    return layer_norm(x, self.eps) * scale[None, None] + bias[None, None]


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """AdaLN: `layer_norm(x) * (1 + scale) + shift`, float32.

  Args:
    x: [B, S, d].
    shift: [B, d] float32.
    scale: [B, d] float32.

  Source: Peebles & Xie 2022 (DiT), section 3.2.
  """
  return layer_norm(x) * (1.0 + scale[:, None]) + shift[:, None]


def gated(x: jax.Array, gate: jax.Array, update: jax.Array) -> jax.Array:
  """Residual `x + gate * update`, summed in float32, in x's dtype.

  Args:
    x: [B, S, d].
    gate: [B, d] float32.
    update: [B, S, d].
  """
  y = x.astype(jnp.float32) + gate[:, None] * update.astype(jnp.float32)
  return round_to(y, x.dtype)


class Modulation(nnx.Module):
  """`linear(silu(embedding))` cut into `count` [B, dim] float32 vectors."""

  def __init__(self, dim: int, count: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.linear = Linear(
      dim,
      count * dim,
      axes=("embed", "modulation"),
      dtype=dtype,
      out_dtype=jnp.float32,
      kernel_init=zeros,
      rngs=rngs,
    )
    self.count = count

  def __call__(self, embedding: jax.Array) -> list[jax.Array]:
    """embedding: [B, dim] float32 -> `count` arrays [B, dim] float32."""
    return jnp.split(self.linear(jax.nn.silu(embedding)), self.count, axis=-1)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """Tanh-approximated GELU, computed in float32, in x's dtype."""
  y = jax.nn.gelu(x.astype(jnp.float32), approximate=True)
  return round_to(y, x.dtype)


def silu(x: jax.Array) -> jax.Array:
  """SiLU, computed in float32, in x's dtype."""
  return round_to(jax.nn.silu(x.astype(jnp.float32)), x.dtype)


class FeedForward(nnx.Module):
  """Linear, activation (tanh-approximated GELU if not given), linear."""

  def __init__(
    self,
    dim: int,
    hidden: int,
    *,
    activation: Callable[[jax.Array], jax.Array] = gelu_tanh,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.linear_1 = Linear(
      dim, hidden, axes=("embed", "mlp"), dtype=dtype, rngs=rngs
    )
    self.linear_2 = Linear(
      hidden, dim, axes=("mlp", "embed"), dtype=dtype, rngs=rngs
    )
    self.activation = activation

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [..., dim] -> [..., dim] compute dtype."""
    return self.linear_2(self.activation(self.linear_1(x)))


class EmbeddingMLP(nnx.Module):
  """Linear, SiLU, linear in float32: time, guidance and pooled embeddings."""

  def __init__(
    self,
    in_features: int,
    dim: int,
    *,
    in_axis: str = "time",
    rngs: nnx.Rngs,
  ):
    self.linear_1 = Linear(in_features, dim, axes=(in_axis, "embed"), rngs=rngs)
    self.linear_2 = Linear(dim, dim, axes=("time", "embed"), rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, in_features] -> [B, dim] float32."""
    return self.linear_2(jax.nn.silu(self.linear_1(x)))


def timestep_embedding(
  t: jax.Array, dim: int = 256, scale: float = 1.0
) -> jax.Array:
  """Sinusoidal embedding, cosines first, longest period 10000.

  The frequency table is a constant: float32 exponents, exponentiated in
  float64. With arguments up to 30000 one unit in the last place of a
  frequency is 1e-3 rad, so how the table is rounded can be seen in outputs.

  Args:
    t: [B] float32 timesteps; t x scale is in [0, 1000] (or a guidance scale
      x 1000).
    dim: even size of the embedding.
    scale: of the angles, applied last.

  Returns:
    [B, dim] float32.
  """
  half = dim // 2
  exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
  exponent = exponent / np.float32(half)
  table = np.exp(exponent.astype(np.float64)).astype(np.float32)
  angles = scale * (t.astype(jnp.float32)[:, None] * table[None])
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope_table(
  ids: np.ndarray,
  axes_dims: tuple[int, ...],
  theta: float = 10000.0,
  dtype: DTypeLike = np.float64,
) -> np.ndarray:
  """Rotation angles' cosines and sines.

  Args:
    ids: [S, A] position of each token along each axis.
    axes_dims: A even sizes; how much of the head each axis rotates.
    theta: longest period over 2 pi.
    dtype: that the angles are rounded to. At position 1000 float32 is 3e-5
      rad off, so it has to be that of the model's authors.

  Returns:
    [2, S, sum(axes_dims) / 2] float32: cosines, sines.

  Source: Su et al. 2021 (RoFormer), eq. 15; one block per axis.
  """
  ids, one = np.asarray(ids, dtype), np.ones((), dtype)
  angles = []
  for axis, dim in enumerate(axes_dims):
    exponent = np.arange(0, dim, 2, dtype=dtype) / (one * dim)
    period = np.power(theta, exponent, dtype=np.float64).astype(dtype)
    angles.append(ids[:, axis, None] * (one / period))
  angles = np.concatenate(angles, axis=-1).astype(np.float64)
  return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def apply_rope(x: jax.Array, table: jax.Array | np.ndarray) -> jax.Array:
  """Rotates the pairs (2k, 2k+1) of the last axis, in float32.

  Args:
    x: [B, S, H, D].
    table: [2, S, D / 2] from `rope_table`.

  Returns:
    [B, S, H, D] float32.
  """
  cos, sin = table[0][None, :, None], table[1][None, :, None]
  even, odd = x[..., 0::2], x[..., 1::2]
  rotated = [even * cos - odd * sin, even * sin + odd * cos]
  return jnp.stack(rotated, axis=-1).reshape(x.shape)


def stack(
  make_block: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs
) -> nnx.Module:
  """`count` equal blocks as one module with a leading "layers" axis.

  Each block is initialised from its own key.
  """

  @nnx.split_rngs(splits=count)
  @nnx.vmap
  def make(rngs: nnx.Rngs) -> nnx.Module:
    return make_block(rngs)

  blocks = make(rngs)
  for _, variable in nnx.to_flat_state(nnx.state(blocks)):
    variable.set_metadata(logical_axes=("layers", *variable.logical_axes))
  return blocks


def scan_blocks(
  blocks: nnx.Module,
  step: Callable[[nnx.Module, Any], Any],
  carry: Any,
  remat: str = "none",
) -> Any:
  """Folds `carry = step(block, carry)` over a stack, as one `lax.scan`.

  Args:
    blocks: from `stack`.
    step: what one block does to the carry.
    carry: pytree of arrays; keeps its shapes and dtypes.
    remat: what the backward pass recomputes: "none"; "dots", everything but
      the matrix products with weights; "block", all of a block.

  Returns:
    The last carry.
  """
  graphdef, params = split(blocks)
  prepare, place = _PREPARE.get(), _PLACE.get()
  axes = jax.tree.map(
    lambda names: names[1:],  # without "layers"
    logical_axes(blocks),
    is_leaf=lambda names: isinstance(names, tuple),
  )

  def body(carry: Any, layer: Params) -> tuple[Any, None]:
    if prepare is not None:
      layer = prepare(layer, axes)
    carry = step(nnx.merge(graphdef, layer), carry)
    return (carry if place is None else jax.tree.map(place, carry)), None

  if place is not None:
    carry = jax.tree.map(place, carry)

  if remat == "block":
    body = jax.checkpoint(body, prevent_cse=False)
  elif remat == "dots":
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    body = jax.checkpoint(body, prevent_cse=False, policy=policy)
  elif remat != "none":
    raise ValueError(f"remat is {remat!r}; one of 'none', 'dots', 'block'")
  return jax.lax.scan(body, carry, params)[0]


# What `scan_blocks` does to a layer's parameters, and to arrays between blocks.
_PREPARE: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
  "prepare", default=None
)
_PLACE: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
  "place", default=None
)


def each_layer(
  prepare: Callable[[Params, Params], Params],
) -> contextlib.AbstractContextManager[None]:
  """Has `scan_blocks` prepare a layer's parameters inside its loop.

  So parameters that are stored in parts are whole for one layer at a time,
  and with `remat` the backward pass makes them whole again.

  Args:
    prepare: (a layer's parameters, their logical axes) -> parameters; traced
      wherever `scan_blocks` is while this context is entered.
  """
  return while_traced(_PREPARE, prepare)


def between_blocks(
  place: Callable[[jax.Array], jax.Array],
) -> contextlib.AbstractContextManager[None]:
  """Has `scan_blocks` place arrays on a mesh before and after every block.

  Args:
    place: a leaf of the carry -> the same array; traced as in `each_layer`.
  """
  return while_traced(_PLACE, place)


@contextlib.contextmanager
def while_traced(
  variable: contextvars.ContextVar, value: Any
) -> Iterator[None]:
  """Sets a context variable for as long as this is entered."""
  token = variable.set(value)
  try:
    yield
  finally:
    variable.reset(token)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
  """A module as (static definition, nested dict of its parameter arrays)."""
  graphdef, state = nnx.split(module)
  return graphdef, nnx.to_pure_dict(state)


def read_dtypes(module: nnx.Module) -> Params:
  """What layers round every parameter to before they compute with it.

  Nested like `split`'s dict. Kernels and adapters have the compute dtype of
  their layer; biases, norms and tables are read in float32.
  """
  return _of_variables(
    module, lambda known: known.get("read_as", jnp.dtype("float32"))
  )


def logical_axes(module: nnx.Module) -> Params:
  """The dimension names of every parameter, nested like `split`'s dict.

  Leaves are tuples of names: map over the tree with
  `is_leaf=lambda x: isinstance(x, tuple)`.
  """
  return _of_variables(module, lambda known: known["logical_axes"])


def _of_variables(
  module: nnx.Module, find: Callable[[dict[str, Any]], Any]
) -> Params:
  """Something of every parameter's metadata, nested like `split`'s dict."""
  found: Params = {}
  for path, variable in nnx.to_flat_state(nnx.state(module)):
    node = found
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = find(variable.get_metadata())
  return found


def as_read(params: Params, dtypes: Params) -> Params:
  """Parameters as layers read them: what a model makes of both is the same.

  Args:
    params: nested dict of arrays.
    dtypes: of `read_dtypes`, nested alike.

  Returns:
    Those of a wider dtype than they are read in, rounded; the others as they
    are.
  """

  def read(leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # Layers round explicitly; where this undoes a cast, XLA may drop both.
    wider = leaf.dtype.itemsize > dtype.itemsize
    return leaf.astype(dtype) if wider else leaf

  return jax.tree.map(read, params, dtypes)


@functools.lru_cache(maxsize=16)
def define(
  make: Callable[..., nnx.Module], config: Any
) -> tuple[nnx.GraphDef, Params, Params]:
  """A module's definition, shapes and axes, with nothing allocated.

  Made once for a config, and shared: the dicts must not be changed.

  Args:
    make: `make(config, rngs=...)`.
    config: a config record.

  Returns:
    Static definition, nested dicts of `jax.ShapeDtypeStruct`s and of axes.
  """
  module = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
  return *split(module), logical_axes(module)
