"""Mesh construction: one mesh for both roles, or one for each.

Every mesh has the axes `data` (batch), `fsdp` (batch, and parameters split
over it), `sequence` (the tokens of a sample) and `tensor` (heads and MLP). The
sizes are chosen per role: generation and training need not be laid out alike.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from digen_jax.errors import UserError
from digen_jax.models import attention, layers
from digen_jax.sampling.denoise import Apply

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")
ROW_AXES = ("sequence", "tensor")  # over devices that share a row


def make_meshes(
  mode: str,
  rollout: Any,
  trainer: Any,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, Mesh]:
  """The meshes of a run, by lane name.

  Args:
    mode: "disaggregated" gives disjoint meshes `{"rollout": …, "trainer": …}`;
      "colocated" gives `{"colocated": …}` over the devices of both.
    rollout: device count, axis sizes (`{"data": 2, "tensor": 2}`), or "auto":
      what the trainer leaves, half of all devices when both are "auto" (where
      `training.Run` has not chosen a better split by then). A list of these
      gives as many lanes, "rollout0" and so on.
    trainer: likewise. A count means `data` for the rollout and `fsdp` for the
      trainer.
    devices: defaults to all devices.

  Raises:
    UserError: sizes that are not positive integers or exceed what is there.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = mesh_axes(mode, rollout, trainer, len(devices))
  meshes, taken = {}, 0
  for name, axes in sizes.items():
    count = math.prod(axes.values())
    meshes[name] = make_mesh(axes, devices[taken : taken + count])
    taken += count
  return meshes


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
  """A mesh with all of `AXES`; those that are not given have size 1."""
  shape = tuple(axes.get(name, 1) for name in AXES)
  return Mesh(
    np.asarray(devices).reshape(shape),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device of the mesh."""
  return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts the mesh splits a batch."""
  return math.prod(mesh.shape[name] for name in BATCH_AXES)


def one_by_one(
  function: Callable[[Any, jax.Array], jax.Array], mesh: Mesh
) -> Callable[[Any, jax.Array], jax.Array]:
  """A function of batches that each device applies to one row after the other.

  Args:
    function: (params, [B, ...]) -> [B, ...], row by row.
    mesh: has `params` everywhere, and splits the batch evenly.
  """

  def rows(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.map(lambda row: function(params, row[None])[0], x)

  batch = PartitionSpec(BATCH_AXES)
  return jax.shard_map(
    rows,
    mesh=mesh,
    in_specs=(PartitionSpec(), batch),
    out_specs=batch,
    check_vma=False,
  )


def row_devices(axes: Mapping[str, int]) -> int:
  """How many devices share a row, by axis sizes."""
  return math.prod(axes.get(name, 1) for name in ROW_AXES)


def on_mesh(apply: Apply, mesh: Mesh) -> Apply:
  """A model whose tokens, and kernels of attention, are divided on a mesh.

  Between blocks every device has its part of a sample's tokens. In attention
  it computes the rows of that part, with all keys: the scores of a row are
  never in two places.
  """
  heads = PartitionSpec(BATCH_AXES, "sequence", "tensor", None)
  tokens = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence", None))

  def place(x: jax.Array) -> jax.Array:
    even = (mesh.size > 1 and x.ndim == 3) and not (
      x.shape[0] % batch_shards(mesh) or x.shape[1] % mesh.shape["sequence"]
    )
    return jax.lax.with_sharding_constraint(x, tokens) if even else x

  def divided(*args: Any) -> Any:
    with attention.divided(mesh, heads), layers.between_blocks(place):
      return apply(*args)

  return divided


def padded_size(size: int, mesh: Mesh) -> int:
  """`size` rounded up to what the mesh splits evenly."""
  shards = batch_shards(mesh)
  return -(-size // shards) * shards


def mesh_axes(
  mode: str, rollout: Any, trainer: Any, available: int
) -> dict[str, dict[str, int]]:
  """Axis sizes of the meshes that `make_meshes` makes, by lane name.

  Args:
    mode: as there.
    rollout: as there.
    trainer: as there.
    available: number of devices.

  Raises:
    UserError: as there.
  """
  sizes = lane_sizes(rollout, trainer, available)
  for name, axes in sizes.items():
    if mode == "disaggregated" and not math.prod(axes.values()):
      raise UserError(
        f"'auto' for the {name} mesh of config.mesh is left without a device: "
        f"{available} there, and disaggregated mode needs at least one for "
        "each role; use config.pipeline.mode='colocated', or more devices (on "
        "CPU, raise config.devices)"
      )
  if mode == "colocated":
    sizes = _together(sizes)
  needed = sum(math.prod(axes.values()) for axes in sizes.values())
  if needed > available:
    asked = " + ".join(
      f"{math.prod(axes.values())} ({name})" for name, axes in sizes.items()
    )
    raise UserError(
      f"config.mesh asks for {asked} devices, but there are {available}: "
      "lower config.mesh.rollout or config.mesh.trainer, or raise "
      "config.devices where there is no accelerator"
    )
  return sizes


def lane_sizes(
  rollout: Any, trainer: Any, available: int
) -> dict[str, dict[str, int]]:
  """Axis sizes of each role's lanes: what "auto" comes to, if only 0.

  Args:
    rollout: as for `make_meshes`, and so are the others.
    trainer: likewise.
    available: number of devices, of which more may be asked for.

  Raises:
    UserError: sizes that are not positive integers.
  """
  several = isinstance(rollout, list | tuple) and len(rollout) > 0
  rollouts = rollout if several else [rollout]
  sizes = {
    f"rollout{i if len(rollouts) > 1 else ''}": _parse("rollout", mesh, "data")
    for i, mesh in enumerate(rollouts)
  }
  sizes["trainer"] = _parse("trainer", trainer, "fsdp")
  auto = [name for name, axes in sizes.items() if axes is None]
  used = sum(math.prod(a.values()) for a in sizes.values() if a is not None)
  rest = available - used
  for i, name in enumerate(auto):
    share = (available - used) // (len(auto) - i)
    if name != "trainer" and auto[-1] == "trainer":  # equal lanes, and the rest
      share = rest // len(auto)
    share = max(share, 0)
    sizes[name] = {("fsdp" if name == "trainer" else "data"): share}
    used += share
  return sizes


def _together(
  sizes: Mapping[str, Mapping[str, int]],
) -> dict[str, dict[str, int]]:
  """One mesh over the devices of all, with the row axes of the trainer."""
  total = sum(math.prod(axes.values()) for axes in sizes.values())
  shared = {name: sizes["trainer"].get(name, 1) for name in ROW_AXES}
  if total % row_devices(shared):
    shown = ", ".join(f"{n}={size}" for n, size in shared.items() if size > 1)
    raise UserError(
      f"colocated mode puts the devices of both roles, {total}, on one mesh, "
      f"which config.mesh.trainer's {shown} does not divide"
    )
  return {"colocated": {"fsdp": total // row_devices(shared), **shared}}


def _parse(role: str, value: Any, axis: str) -> dict[str, int] | None:
  if value == "auto":
    return None
  axes = {axis: value} if isinstance(value, int) else value
  if not isinstance(axes, Mapping) or not axes:
    several = " (or a list of these)" if role == "rollout" else ""
    raise UserError(
      f"config.mesh.{role} takes a device count, axis sizes such as "
      f"{{'data': 2, 'tensor': 2}}, or 'auto'{several}; got {value!r}"
    )
  for name, size in axes.items():
    if name not in AXES:
      raise UserError(
        f"config.mesh.{role} has no axis {name!r}: use {', '.join(AXES)}"
      )
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
      raise UserError(
        f"config.mesh.{role}: the size of {name!r} must be a positive "
        f"integer; got {size!r}"
      )
  return dict(axes)
