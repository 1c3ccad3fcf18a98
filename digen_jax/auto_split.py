"""`mesh="auto"`: how many devices generate and how many train, by measured cost.

A run begins on equal halves. There a unit of each kind is measured in two
sizes; the planner predicts the step of every split from that, and the run is
placed anew where another one is faster. What was chosen is read back from the
run's directory when it is resumed.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from digen_jax.config import Config, Mesh, Pipeline
from digen_jax.pipeline.cost_table import (
  CostTable,
  Measured,
  table_from_measured,
)
from digen_jax.pipeline.planner import (
  Prediction,
  Techniques,
  equal_split,
  fitting,
  predict,
)
from digen_jax.pipeline.splits import best_split, legal_sizes
from digen_jax.pipeline.units import Workload
from digen_jax.program import Program

WORTH = 0.02  # part of a step that another split must save: costs are noisy
NOT_MEASURED = "the optimiser, the publish and the rewards count as nothing"


@dataclasses.dataclass(frozen=True)
class Choice:
  """The split that was chosen, and the equal one."""

  best: Prediction
  equal: Prediction

  def placed(self, mesh: Mesh) -> Mesh:
    """A config's mesh, with this split."""
    split = self.best.split
    return dataclasses.replace(
      mesh, rollout=split.rollout, trainer=split.trainer
    )

  def __str__(self) -> str:
    best, equal = (
      f"{p.split.rollout} + {p.split.trainer} devices ({p.step_seconds:.2f} s)"
      for p in (self.best, self.equal)
    )
    said = "the best"
    if self.best.split != self.equal.split:
      said = f"better than {equal}"
    return f"auto split: {best} is predicted to be {said} ({NOT_MEASURED})"


def wanted(config: Config, devices: int) -> bool:
  """Whether there is anything to choose."""
  mesh = config.mesh
  auto = mesh.rollout == mesh.trainer == "auto"
  return auto and config.pipeline.mode == "disaggregated" and devices > 2


def recorded(workdir: Path, devices: int, mesh: Mesh) -> Mesh | None:
  """What a run in this directory made of `mesh`.

  None if there was no run, or there were other devices.
  """
  file = workdir / "config.json"
  if not file.exists():
    return None
  meshes = json.loads(file.read_text("utf-8")).get("meshes", {})
  sizes = {name: math.prod(axes.values()) for name, axes in meshes.items()}
  if set(sizes) != {"rollout", "trainer"} or sum(sizes.values()) != devices:
    return None
  return dataclasses.replace(
    mesh, rollout=sizes["rollout"], trainer=sizes["trainer"]
  )


def measure(programs: Sequence[Program], step: int) -> list[Measured]:
  """A unit of each kind on each lane that can do it, in several sizes.

  Args:
    programs: over the same lanes, with units of different sizes.
    step: the one that comes next.
  """
  return [unit for program in programs for unit in program.measure(step)]


def smaller(work: Workload) -> Workload:
  """The workload in units of half the size, or less where half is not legal."""

  def below(size: int, groups: int) -> int:
    sizes = legal_sizes(work.group_size, groups)
    return max((n for n in sizes if 2 * n <= size), default=size)

  return dataclasses.replace(
    work,
    generate_size=below(work.generate_size or work.group_size, work.groups),
    train_size=below(
      work.train_size or work.group_size, work.groups // work.updates
    ),
  )


def choose(
  measured: Sequence[Measured],
  work: Workload,
  pipeline: Pipeline,
  devices: int,
) -> Choice:
  """The split with which a step is predicted to be shortest.

  Optimiser, publish and rewards are not measured before a run has trained:
  they count as nothing.

  Args:
    measured: on lanes that share the devices equally.
    work: what a step consists of; units keep their sizes.
    pipeline: the techniques.
    devices: how many there are.
  """
  equal = equal_split(work, devices)
  table = table_from_measured(
    measured,
    {"rollout": equal.rollout, "trainer": equal.trainer},
    roles={"rollout": "rollout", "trainer": "trainer"},
  )
  return compare(table, work, pipeline, devices)


def compare(
  table: CostTable, work: Workload, pipeline: Pipeline, devices: int
) -> Choice:
  """As `choose`, from a table of costs.

  A split that does not fit is not chosen: where the equal one does not, the
  choice holds the best in its place.
  """
  techniques = techniques_of(pipeline)
  best = best_split(table, work, devices, techniques, resize=False)
  after = predict(table, work, best, techniques)
  equal = fitting(table, work, equal_split(work, devices), techniques)
  if equal is None:
    return Choice(after, after)
  before = predict(table, work, equal, techniques)
  if after.step_seconds > (1 - WORTH) * before.step_seconds:
    after = before
  return Choice(after, before)


def techniques_of(pipeline: Pipeline) -> Techniques:
  """The switches of a config, as the planner takes them."""
  return Techniques(
    colocated=pipeline.mode == "colocated",
    gap=pipeline.gap,
    tsp=pipeline.tsp,
    tag=pipeline.tag,
    rat=pipeline.rat,
    bts=pipeline.bts,
    tcss=pipeline.tcss,
    reward_slots=pipeline.reward_slots,
  )
