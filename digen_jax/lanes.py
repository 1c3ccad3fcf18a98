"""The lanes of a run: what each may do, and the islands behind them."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence

import jax

from digen_jax.assemble import Assembly
from digen_jax.config import Config, Pipeline
from digen_jax.errors import UserError
from digen_jax.island import Island
from digen_jax.links import Link, LocalLink
from digen_jax.optimizer import make_optimizer
from digen_jax.parallel.mesh import make_meshes, mesh_axes
from digen_jax.parallel.rules import check_heads
from digen_jax.pipeline.scheduler import Lane
from digen_jax.pipeline.units import Kind


@dataclasses.dataclass(frozen=True)
class Team:
  """The islands of a run and who does what by itself.

  Attributes:
    lanes: all lanes, the host threads that score included.
    links: the way to each island, by lane name.
    rollouts: the lanes whose own work is generating; they are sent every
      version, and sample for evaluations.
    trainer: the lane that owns the training state; may be the same.
    generators: all lanes that can generate, assisting or not.
    learners: all lanes that can compute gradients.
  """

  lanes: tuple[Lane, ...]
  links: Mapping[str, Link]
  rollouts: tuple[str, ...]
  trainer: str
  generators: tuple[str, ...]
  learners: tuple[str, ...]

  def stop(self) -> None:
    """Lets the islands go."""
    for link in self.links.values():
      link.stop()


def make_lanes(
  pipeline: Pipeline, names: Iterable[str] = ("rollout", "trainer")
) -> tuple[Lane, ...]:
  """The lanes of a run, and the host threads that score.

  Args:
    pipeline: what they may do.
    names: of the lanes with devices, see `lane_axes`.
  """
  host = Lane("host", frozenset({Kind.SCORE}), slots=pipeline.reward_slots)
  if pipeline.mode == "colocated":
    return Lane("colocated", frozenset(Kind) - host.kinds), host
  trainer = frozenset({Kind.TRAIN, Kind.UPDATE, Kind.PUBLISH})
  rat = frozenset({Kind.TRAIN} if pipeline.rat else ())
  tag = frozenset({Kind.GENERATE} if pipeline.tag else ())
  generate = frozenset({Kind.GENERATE})
  return (
    *(Lane(n, generate, assists=rat) for n in names if n != "trainer"),
    Lane("trainer", trainer, assists=tag),
    host,
  )


def lane_axes(config: Config) -> dict[str, dict[str, int]]:
  """Mesh axes of every lane; reads no weights.

  Raises:
    UserError: the devices do not suffice, accelerators would stay idle, a lane
      is larger than a host or wants GPUs of a kind that is not there, or Ray is
      wanted and not installed or has TPUs.
  """
  mesh, mode = config.mesh, config.pipeline.mode
  hosts: list[int] = []
  if config.pipeline.lanes == "ray":
    from digen_jax import cluster

    ray = cluster.start()
    hosts = cluster.gpus(ray)
    available = sum(hosts) or config.devices
    kind = "gpu" if hosts else "cpu"
  else:
    available, kind = jax.device_count(), jax.default_backend()
  if len(hosts) > 1 and mesh.rollout == mesh.trainer == "auto":
    raise UserError(
      "config.mesh.rollout and config.mesh.trainer cannot both be 'auto' on "
      f"several hosts (their GPUs: {hosts}): give the devices of each lane, none "
      "more than a host has, such as mesh.rollout=[4,4]"
    )
  axes = mesh_axes(mode, mesh.rollout, mesh.trainer, available)
  counts = {name: math.prod(sizes.values()) for name, sizes in axes.items()}
  used = sum(counts.values())
  # Nobody means that; but virtual devices of a CPU cost nothing, and a cluster
  # may work for others, too.
  shared = len(hosts) > 1 or (hosts and "RAY_ADDRESS" in os.environ)
  if used < available and kind != "cpu" and not shared:
    raise UserError(
      f"config.mesh uses {used} of {available} {kind} devices: "
      "give one of the roles the others ('auto'), or hide them, e.g. with "
      "CUDA_VISIBLE_DEVICES or TPU_VISIBLE_DEVICES; a cluster of Ray that is "
      "shared is named by RAY_ADDRESS"
    )
  if hosts:
    cluster.check_hosts(ray, counts, lane_gpus(config, axes))
  elif mesh.rollout_gpu or mesh.trainer_gpu:
    raise UserError(
      "config.mesh.rollout_gpu and config.mesh.trainer_gpu choose among the GPUs "
      "of a cluster: leave them empty where config.pipeline.lanes is 'local' or "
      "Ray finds no GPUs"
    )
  return axes


def lane_gpus(config: Config, names: Iterable[str]) -> dict[str, str]:
  """The kind of GPU that each lane is to have, as Ray calls it; "" is any.

  Args:
    config: the run.
    names: of its lanes with devices.

  Raises:
    UserError: they are not given one for each lane.
  """
  mesh, names = config.mesh, list(names)
  kinds = mesh.rollout_gpu
  if config.pipeline.mode == "colocated":
    if kinds not in ("", mesh.trainer_gpu):
      raise UserError(
        "in colocated mode one lane has the devices of both roles: set "
        "config.mesh.trainer_gpu alone"
      )
    return dict.fromkeys(names, mesh.trainer_gpu)
  rollouts = [name for name in names if name != "trainer"]
  if isinstance(kinds, str):
    kinds = [kinds] * len(rollouts)
  wrong = not isinstance(kinds, list | tuple) or len(kinds) != len(rollouts)
  if wrong or not all(isinstance(kind, str) for kind in kinds):
    raise UserError(
      "config.mesh.rollout_gpu takes a kind of GPU such as 'H100', or a list of "
      f"one for each of the {len(rollouts)} rollout lanes; got "
      f"{mesh.rollout_gpu!r}"
    )
  return {**dict(zip(rollouts, kinds)), "trainer": mesh.trainer_gpu}


def make_team(config: Config, assembly: Assembly) -> Team:
  """Places a run's weights on the islands of its lanes.

  Args:
    config: the run.
    assembly: with weights for lanes of this process; lanes of other processes
      load their own.

  Raises:
    UserError: the meshes do not fit the devices or the model.
  """
  axes = lane_axes(config)
  lanes = make_lanes(config.pipeline, axes)
  check_lanes(axes, assembly)
  if config.pipeline.lanes == "ray":
    links = _ray_links(config, lanes, axes)
  else:
    links = _local_links(config, assembly, lanes)
  return team_of(lanes, links)


def divide(count: int, sizes: Mapping[str, int]) -> dict[str, range]:
  """`count` samples among lanes of so many devices; none is left out.

  A lane with nothing to do has no part.
  """
  ends = [
    round(count * end / sum(sizes.values()))
    for end in itertools.accumulate(sizes.values())
  ]
  parts = map(range, [0, *ends], ends)
  return {name: part for name, part in zip(sizes, parts) if part}


def check_lanes(
  axes: Mapping[str, Mapping[str, int]], assembly: Assembly
) -> None:
  """Raises UserError where a lane's mesh does not divide heads or tokens."""
  heads = assembly.model.config.num_attention_heads
  # Every family's patches are 2 x 2 pixels of the latents, and of a frame.
  tokens = math.prod(assembly.recipe.latent_shape[:-1]) // 4
  for name, shape in axes.items():
    check_heads(shape, heads, assembly.model.family.class_name)
    size = shape.get("sequence", 1)
    if tokens % size:
      raise UserError(
        f"the sequence axis of the {name} mesh, {size}, does not divide the "
        f"{tokens} tokens of a sample: give it a divisor of them, such as "
        f"{math.gcd(tokens, size)}, in config.mesh"
      )


def team_of(lanes: Sequence[Lane], links: Mapping[str, Link]) -> Team:
  """The team of some lanes, on islands that can do at least as much."""
  devices = [lane for lane in lanes if lane.name in links]

  def own(kind: Kind) -> tuple[str, ...]:
    return tuple(lane.name for lane in devices if kind in lane.kinds)

  def able(kind: Kind) -> tuple[str, ...]:
    return tuple(i.name for i in devices if kind in i.kinds | i.assists)

  return Team(
    tuple(lanes),
    {lane.name: links[lane.name] for lane in devices},
    rollouts=own(Kind.GENERATE),
    trainer=own(Kind.TRAIN)[0],
    generators=able(Kind.GENERATE),
    learners=able(Kind.TRAIN),
  )


def _local_links(
  config: Config, assembly: Assembly, lanes: Sequence[Lane]
) -> dict[str, Link]:
  mesh = config.mesh
  meshes = make_meshes(config.pipeline.mode, mesh.rollout, mesh.trainer)
  updates = config.steps * config.train.updates_per_batch
  optimizer = make_optimizer(config.train, updates)
  weights, recipe = assembly.weights, assembly.recipe
  return {
    lane.name: LocalLink(
      Island(lane, meshes[lane.name], recipe, weights, optimizer)
    )
    for lane in lanes
    if lane.name in meshes
  }


def _ray_links(
  config: Config, lanes: Sequence[Lane], axes: Mapping[str, dict[str, int]]
) -> dict[str, Link]:
  from digen_jax import cluster

  ray = cluster.start()
  sites = cluster.place(ray, axes, lane_gpus(config, axes))
  links = {
    lane.name: cluster.RayLink(ray, config, lane, sites[lane.name])
    for lane in lanes
    if lane.name in sites
  }
  for link in links.values():
    _ = link.hardware  # all load at once; wait for them
  return links
