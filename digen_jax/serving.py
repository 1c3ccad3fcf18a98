"""An island behind calls from another process."""

from collections.abc import Mapping
from typing import Any

import jax

from digen_jax.assemble import assemble
from digen_jax.config import Config
from digen_jax.island import Island
from digen_jax.links import Hardware
from digen_jax.optimizer import make_optimizer
from digen_jax.parallel.mesh import make_mesh
from digen_jax.parallel.rules import PARTS, TRAINER
from digen_jax.pipeline.scheduler import Lane
from digen_jax.pipeline.units import Kind

# Methods whose result somebody needs; of others only the end is told.
ANSWERS = frozenset(
  {
    "averaged",
    "generate",
    "gradients",
    "holds",
    "interim",
    "latest",
    "measure",
    "outgoing",
    "sample",
    "sees",
    "update",
  }
)
# Methods that nobody need have waited for.
UNHEARD = frozenset({"add", "receive"})


def serve(config: Config, lane: Lane, axes: Mapping[str, int]) -> "Served":
  """Loads a run's checkpoint onto all devices of this process."""
  mesh = make_mesh(axes, jax.devices())
  # In parts at first: what is trained comes in float32, wider than it stays.
  rules = TRAINER if Kind.TRAIN in lane.kinds else PARTS
  assembly = assemble(config, mesh=mesh, rules=rules)
  updates = config.steps * config.train.updates_per_batch
  optimizer = make_optimizer(config.train, updates)
  return Served(
    Island(lane, mesh, assembly.recipe, assembly.weights, optimizer)
  )


class Served:
  """Calls an island's methods and brings the results to the host.

  Nobody may have waited for a call without an answer. If one has failed, the
  next that has an answer fails with its error.
  """

  def __init__(self, island: Island):
    self.island = island
    self.hardware = Hardware.of(island.mesh)
    self._failure: Exception | None = None

  def call(self, method: str, *args: Any) -> Any:
    """Result of a method, as NumPy arrays."""
    answers = method in ANSWERS
    if answers and self._failure is not None:
      failure, self._failure = self._failure, None
      raise failure
    try:
      result = getattr(self.island, method)(*args)
      if answers:
        return jax.device_get(result)
      jax.block_until_ready(result)
      return None
    except Exception as failure:
      if method in UNHEARD:
        self._failure = failure
      raise
