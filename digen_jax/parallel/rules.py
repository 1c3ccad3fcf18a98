"""Logical-axis rules -> `NamedSharding` of every parameter.

Parameters carry logical axis names (`("embed", "mlp")`); a table of rules
says which mesh axis may split which of them. Generation and training have a
table each: the same model, two layouts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from digen_jax.errors import UserError

# (logical axis, mesh axis), the first that applies wins. `tensor` splits what
# attention heads and MLP units own; a size it does not divide is an error.
# `fsdp` splits storage only, and so do `sequence` and `data`: a size that they
# do not divide is passed over.
Rules = Sequence[tuple[str, str]]

TENSOR: Rules = (("heads", "tensor"), ("mlp", "tensor"))
SPLIT = ("embed", "modulation", "mlp", "heads", "text", "time")
ROLLOUT: Rules = TENSOR
TRAINER: Rules = (
  *TENSOR,
  *((name, axis) for axis in ("fsdp", "sequence") for name in SPLIT),
)
# Of gradients that a rollout mesh sends away: over all devices.
PARTS: Rules = (*TRAINER, *((name, "data") for name in SPLIT))


def param_shardings(
  mesh: Mesh, logical_axes: Any, shapes: Any, rules: Rules
) -> Any:
  """A `NamedSharding` for every parameter.

  Args:
    mesh: a mesh with the axes of `digen_jax.parallel.mesh.AXES`.
    logical_axes: pytree of tuples of names (or None), one per array dimension.
    shapes: matching pytree of arrays or `jax.ShapeDtypeStruct`s.
    rules: the layout.

  Raises:
    UserError: a dimension that the `tensor` axis does not divide.
  """
  return jax.tree.map_with_path(
    lambda path, leaf, axes: NamedSharding(
      mesh, _spec(jax.tree_util.keystr(path), mesh, axes, leaf.shape, rules)
    ),
    shapes,
    logical_axes,
  )


def check_heads(shape: Mapping[str, int], heads: int, name: str) -> None:
  """Raises UserError if the `tensor` axis would cut an attention head in two.

  The "heads" dimension of a parameter counts features; an axis that divides
  those need not divide the heads, and then every attention would move them.

  Args:
    shape: axis sizes of the mesh where the model will be.
    heads: how many it has.
    name: of the model.
  """
  size, devices = shape.get("tensor", 1), math.prod(shape.values())
  if heads % size:
    raise UserError(
      f"the tensor axis of the mesh, {size}, does not divide the {heads} "
      f"attention heads of {name}: give config.mesh a tensor axis of "
      f"{math.gcd(heads, devices)}, the largest that divides both them and "
      f"the {devices} devices, and the rest to data, fsdp or sequence"
    )


def _spec(
  path: str,
  mesh: Mesh,
  axes: tuple[str | None, ...],
  shape: tuple[int, ...],
  rules: Rules,
) -> PartitionSpec:
  if len(axes) != len(shape):
    raise ValueError(f"{path}: logical axes {axes} for shape {shape}")
  spec: list[str | None] = [None] * len(shape)
  for logical, mesh_axis in rules:
    size = mesh.shape[mesh_axis]
    if size == 1 or mesh_axis in spec or logical not in axes:
      continue
    dim = axes.index(logical)
    if spec[dim] is not None:
      continue
    if shape[dim] % size:
      if mesh_axis == "tensor":
        raise UserError(
          f"the tensor axis of the mesh, {size}, does not divide the "
          f"{logical!r} dimension {shape[dim]} of {path}: choose a divisor of "
          "it in config.mesh"
        )
      continue
    spec[dim] = mesh_axis
  return PartitionSpec(*spec)
