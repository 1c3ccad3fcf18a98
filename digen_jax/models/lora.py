"""Low-rank adapters on the linear layers of a model, stacked ones included.

W' = W + (alpha / rank) A B with A [in, rank] random and B [rank, out] zero, so
that an adapted model starts out equal to its base (Hu et al. 2021, section
4.1). Adapters are leaves `lora_a`, `lora_b` beside the `kernel` they adapt.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import Model, layers
from digen_jax.models.layers import Linear, Params

LEAVES = ("lora_a", "lora_b")

# (shape, logical axes) of a parameter -> where it is made; None means the
# default device.
Placement = Callable[[tuple[int, ...], layers.Axes], Any]


def adapt(
  model: Model,
  *,
  rank: int,
  alpha: float,
  targets: Sequence[str],
  key: jax.Array,
  sharding: Placement | None = None,
) -> Model:
  """The model with adapters on every linear layer that `targets` match.

  Args:
    model: its arrays may be `jax.ShapeDtypeStruct`s under `jax.eval_shape`.
    rank: of the adapters.
    alpha: their strength; the update is scaled by alpha / rank.
    targets: regular expressions, searched for in module paths such as
      "double_blocks.attn.to_q".
    key: typed PRNG key for A.
    sharding: of every adapter; None means the default device.

  Returns:
    A model with more parameters and its own `apply`; base arrays are shared.

  Raises:
    UserError: a target that matches no linear layer, or a bad rank.
  """
  module = nnx.merge(model.graphdef, model.params)
  add_lora(
    module,
    rank=rank,
    alpha=alpha,
    targets=targets,
    rngs=nnx.Rngs(key),
    sharding=sharding,
  )
  graphdef, params = layers.split(module)
  return dataclasses.replace(
    model,
    graphdef=graphdef,
    params=params,
    logical_axes=layers.logical_axes(module),
  )


def add_lora(
  module: nnx.Module,
  *,
  rank: int,
  alpha: float,
  targets: Sequence[str],
  rngs: nnx.Rngs,
  sharding: Placement | None = None,
) -> None:
  """Adds adapters to a module in place; arguments as for `adapt`.

  Adapters are float32 whatever the kernels are: they are what is trained.
  """
  if rank < 1:
    raise UserError(f"LoRA rank is {rank}; it must be at least 1")
  linears = {
    ".".join(map(str, path)): layer
    for path, layer in nnx.iter_modules(module)
    if isinstance(layer, Linear)
  }
  for target in targets:
    if not any(re.search(target, name) for name in linears):
      raise UserError(
        f"LoRA target {target!r} matches no linear layer; there are "
        f"{', '.join(sorted(linears))}"
      )
  for name in sorted(linears):
    if any(re.search(target, name) for target in targets):
      _add(linears[name], rank, alpha / rank, rngs.params(), sharding)


def merge_lora(params: Params, alpha: float) -> Params:
  """Folds the adapters into their kernels.

  Args:
    params: of an adapted model.
    alpha: as given to `adapt`.

  Returns:
    Parameters of the base model; the sums are taken in float32.
  """
  if not isinstance(params, dict):
    return params
  merged = {
    key: merge_lora(value, alpha)
    for key, value in params.items()
    if key not in LEAVES
  }
  if "lora_a" in params:
    a, b = (params[key].astype(jnp.float32) for key in LEAVES)
    kernel = params["kernel"]
    update = jnp.matmul(a, b, precision="highest") * (alpha / a.shape[-1])
    merged["kernel"] = (kernel.astype(jnp.float32) + update).astype(
      kernel.dtype
    )
  return merged


def split_trainable(params: Params, mode: str) -> tuple[Params, Params]:
  """Parameters as (trainable, frozen), each nested like the whole.

  `grpo.train_step.join` puts them together again.

  Args:
    params: of a model.
    mode: "full", everything but `layers.CONSTANTS` is trained; "lora", the
      adapters are.

  Raises:
    UserError: an unknown mode, or "lora" without any adapter.
  """
  if mode == "full":
    return _partition(params, lambda key: key not in layers.CONSTANTS)
  if mode != "lora":
    raise UserError(f"training mode is {mode!r}; one of 'full', 'lora'")
  trainable, frozen = _partition(params, lambda key: key in LEAVES)
  if not trainable:
    raise UserError("these parameters have no LoRA adapters; see lora.adapt")
  return trainable, frozen


def _partition(
  params: Params, chosen: Callable[[str], bool]
) -> tuple[Params, Params]:
  """The leaves with a chosen key, and the others."""
  parts: tuple[Params, Params] = {}, {}
  for key, value in params.items():
    if isinstance(value, dict):
      for part, inner in zip(parts, _partition(value, chosen)):
        if inner:
          part[key] = inner
    else:
      parts[not chosen(key)][key] = value
  return parts


def _add(
  linear: Linear,
  rank: int,
  scale: float,
  key: jax.Array,
  sharding: Placement | None,
) -> None:
  *stack, fan_in, fan_out = linear.kernel.shape
  *stack_axes, in_axis, out_axis = linear.kernel.logical_axes
  a_shape, a_axes = (*stack, fan_in, rank), (*stack_axes, in_axis, "rank")
  b_shape, b_axes = (*stack, rank, fan_out), (*stack_axes, "rank", out_axis)

  def make(
    init: Callable[..., jax.Array], shape: tuple[int, ...], axes: layers.Axes
  ) -> jax.Array:
    place = sharding(shape, axes) if sharding is not None else None
    return jax.jit(init, static_argnums=1, out_shardings=place)(key, shape)

  # Variance 1 / in: (x A) then has the scale of x.
  a = make(jax.random.normal, a_shape, a_axes) * fan_in**-0.5
  b = make(_zeros, b_shape, b_axes)
  linear.lora_a = _param(a, a_axes, linear.dtype)
  linear.lora_b = _param(b, b_axes, linear.dtype)
  linear.lora_scale = scale


def _zeros(_: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jnp.zeros(shape)


def _param(value: jax.Array, axes: layers.Axes, dtype: jnp.dtype) -> Any:
  # The attribute was None, which NNX takes for static until told otherwise.
  return nnx.data(nnx.Param(value, logical_axes=axes, read_as=dtype))
