"""Parameters stored in parts (`fsdp`), made whole where they are used.

A stack of blocks is gathered a layer at a time inside its loop, and again in
the backward pass, so that a device holds little more than its part and a layer
(without recomputation, `remat="none"`, gathered layers are kept for that pass).
Gradients go back to parts as they come. Every device computes its rows with
whole matrices, as a rollout mesh does.

Source: Rajbhandari et al. 2020 (ZeRO), stage 3.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from digen_jax.models import layers
from digen_jax.parallel import rules
from digen_jax.parallel.mesh import on_mesh
from digen_jax.sampling.denoise import Apply


def reading(apply: Apply, mesh: Mesh, axes: Any, dtypes: Any) -> Apply:
  """`apply` for parameters as a lane stores them.

  Args:
    apply: `apply(params, ...)`.
    mesh: where the parameters are.
    axes: logical axes of all parameters.
    dtypes: what they are rounded to when they are read, see
      `layers.read_dtypes`. That is done before they are gathered.
  """

  apply = on_mesh(apply, mesh)

  def whole(params: Any, axes: Any) -> Any:
    layout = rules.param_shardings(mesh, axes, params, rules.ROLLOUT)
    return jax.lax.with_sharding_constraint(params, layout)

  def outside(leaf: jax.Array, axes: layers.Axes) -> jax.Array:
    return leaf if "layers" in axes else whole(leaf, axes)

  def read(params: Any, *args: Any) -> Any:
    params = layers.as_read(params, dtypes)
    if mesh.shape["fsdp"] == mesh.shape["sequence"] == 1:
      return apply(params, *args)
    with layers.each_layer(whole):
      return apply(jax.tree.map(outside, params, axes), *args)

  return read
