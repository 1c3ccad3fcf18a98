"""The ladder: what every technique of the engine adds, measured on two cores.

Two lanes, each a process pinned to one core, run the same global steps with
one technique more per rung. The bound is what no schedule can beat: all work of
a step at its measured cost, spread evenly over the lanes.

Overlap is shown before it is used: alone, each lane must use one core, and
both together must get twice the work of one done; otherwise nothing is
reported.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from digen_jax import assemble, assets, cluster
from digen_jax.benchmarks import output
from digen_jax.benchmarks.ladder_summary import (
  RUNGS,
  Ran,
  Took,
  ladder_page,
  picture,
  rows,
  summarize,
)
from digen_jax.benchmarks.overlap import check_overlap, cpu_seconds
from digen_jax.config import Config, Pipeline, from_config_dict
from digen_jax.data.prompts import PromptStream, read_prompts
from digen_jax.errors import UserError
from digen_jax.lanes import Team, make_lanes, team_of
from digen_jax.pipeline.costs import Costs
from digen_jax.pipeline.execute import Executor
from digen_jax.pipeline.scheduler import Lane, State, next_step, start_step
from digen_jax.pipeline.search import LIVE, PREDICTED, Budget, Search
from digen_jax.pipeline.simulate import Assist, Cost, Left, simulate
from digen_jax.pipeline.steady import Pays, what_pays
from digen_jax.pipeline.units import (
  Kind,
  Unit,
  Workload,
  full_sizes,
)
from digen_jax.program import Program
from digen_jax.rewards.compose import compose, parse
from digen_jax.timeline import Span, lane_accounting, write_text

# What each rung adds to the one before.
SWITCHES: Mapping[str, Mapping[str, Any]] = {
  "colocated": {"mode": "colocated", "gap": False, "tsp": False},
  "sequential": {"gap": False, "tsp": False},
  "gap": {"gap": True, "tsp": False},
  "tsp": {"gap": True, "tsp": True},
  "tag": {"gap": True, "tsp": True, "tag": True},
  "rat": {"gap": True, "tsp": True, "tag": True, "rat": True},
  "tcss": {"gap": True, "tsp": True, "tag": True, "rat": True, "tcss": 0.5},
}
# Denoising steps and trained steps: how the work divides over the two kinds.
WORKLOADS: Mapping[str, tuple[int, int]] = {
  "generation-heavy": (16, 2),
  "balanced": (12, 4),
  "training-heavy": (8, 6),
}
STEPS = 5  # of a repetition; the first and the last are not counted
# Part of the processor time that a repetition wanted and did not get: if it is
# more, the repetition is run again ...
QUIET = 0.02
EXTRA = 1.0  # ... of all together at most so many times as many as asked for.
FRESH = Pays(stale=False, assists=True)
TRIES = 20  # of a pack; the fastest, as others may slow the rest down


class _Recorded(Costs):
  """Costs that keep every unit, too."""

  def __init__(self, work: Workload):
    super().__init__(full_sizes(work))
    self.every: list[Took] = []

  def observe(self, lane: str, unit: Unit, seconds: float) -> None:
    super().observe(lane, unit, seconds)
    self.every.append((lane, unit, seconds))


def run(
  workdir: str | Path,
  *,
  repetitions: int = 3,
  workloads: Sequence[str] = tuple(WORKLOADS),
  groups: int = 16,
  group_size: int = 16,
  report: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Measures the ladder; writes `ladder.json`, `ladder.md` and `ladder.html`.

  Args:
    workdir: directory for them.
    repetitions: of every rung, interleaved.
    workloads: which of `WORKLOADS`.
    groups: prompts per step.
    group_size: samples per prompt.
    report: told what happens, a line at a time.

  Returns:
    What `ladder.json` holds beside where it was measured.

  Raises:
    UserError: fewer than two cores, or lanes that do not overlap here.
  """
  ray = cluster.start()
  result: dict[str, Any] = {}
  tables: dict[str, Any] = {}
  pictures: dict[str, str] = {}
  for name in workloads:
    config = workload_config(name, groups, group_size)
    lanes = _Lanes(ray, config)
    try:
      report(f"{name}: compiling")
      rungs = _rungs(config, lanes, report)
      if not result:
        program = rungs["rat"].program
        args = {lane: program.first_pack(lane) for lane in lanes.pair}
        result = check_overlap(lanes.links, args, report)
      ran, aside = _repeat(rungs, repetitions, report)
      tables[name] = summarize(rungs, ran, aside)
      pictures[name] = picture(tables[name], ran)
    finally:
      lanes.stop()
  result |= {"workloads": tables}
  output.save(workdir, "ladder", rows(result), result)
  write_text(Path(workdir) / "ladder.html", ladder_page(pictures))
  return result


def workload_config(name: str, groups: int, group_size: int) -> Config:
  """The run that a workload takes its steps from."""
  steps, window = WORKLOADS[name]
  prompts = assets.path("prompts_train.txt")
  return from_config_dict(
    {
      "checkpoint": assets.path("tiny_flux"),
      "prompts": prompts,
      "reward": "shapes",
      "steps": 1_000_000,  # nothing is saved, and no step is the last
      "batch": {"prompts": groups, "group_size": group_size},
      "sampling": {"num_steps": steps, "window": window, "noise_level": 0.7},
      "train": {"learning_rate": 1e-6, "remat": "dots"},
      "pipeline": {"lanes": "ray"},
      "mesh": {"rollout": 1, "trainer": 1},
    }
  )


class _Lanes:
  """The processes that the rungs of a workload share."""

  def __init__(self, ray: Any, config: Config):
    every = dataclasses.replace(config.pipeline, tag=True, rat=True)
    one = dataclasses.replace(config.pipeline, mode="colocated")
    if cluster.gpus(ray):
      raise UserError(
        "the ladder measures two processor cores, and Ray found GPUs: hide them "
        "with CUDA_VISIBLE_DEVICES=''"
      )
    sites = cluster.place(ray, {"rollout": {"data": 1}, "trainer": {"fsdp": 1}})
    cores = sum((site.cores for site in sites.values()), ())
    if len(set(cores)) < 2:
      raise UserError(
        "the ladder needs a core for each of its two lanes, and this process "
        "may use one: free another (taskset, cpuset)"
      )
    sites["colocated"] = cluster.Site({"fsdp": 2}, 2, cores)
    self.links = {
      lane.name: cluster.RayLink(ray, config, lane, sites[lane.name])
      for pipeline in (every, one)
      for lane in make_lanes(pipeline)
      if lane.name in sites
    }
    self.pair = ("rollout", "trainer")
    for link in self.links.values():
      _ = link.hardware

  def team(self, pipeline: Pipeline) -> Team:
    """Those of the processes that a rung uses, able to do what it allows."""
    return team_of(make_lanes(pipeline), self.links)

  def stop(self) -> None:
    """Ends the processes."""
    for link in self.links.values():
      link.stop()


class _Rung:
  """One rung of the ladder, on lanes that it shares with the others."""

  def __init__(
    self, name: str, config: Config, assembly: Any, lanes: _Lanes, data: Any
  ):
    pipeline = dataclasses.replace(config.pipeline, **SWITCHES[name])
    self.config = dataclasses.replace(config, pipeline=pipeline)
    self.work = assemble.workload(self.config)
    self.team = lanes.team(pipeline)
    reward, stream, conditioning = data

    def program(work: Workload) -> Program:
      return Program(
        self.config,
        work,
        assembly.recipe,
        self.team,
        reward,
        stream,
        conditioning,
        None,
      )

    self._make_program, self.program = program, program(self.work)
    self.costs = _Recorded(self.work)

  def row_seconds(self, packs: Sequence[int]) -> dict[int, float]:
    """Of a transition in packs of so many trained steps, on the trainer.

    As a step asks for it, with the call and what it carries: that is what
    larger packs save. The driver's own time counts besides, as in a step it
    takes a core from a lane. Packs take turns, since a core's speed changes.
    """
    link = self.team.links["trainer"]

    def seconds(args: tuple) -> float:
      start, driver = time.perf_counter(), time.process_time()
      link.call_pair("gradients", 0, *args)[0].result()
      passed = time.perf_counter() - start + time.process_time() - driver
      return passed / len(args[0].x)

    calls = {}
    for pack in packs:
      work = dataclasses.replace(self.work, pack=pack)
      calls[pack] = self._make_program(work).first_pack("trainer")
      seconds(calls[pack])  # compiles
    rounds = [{n: seconds(calls[n]) for n in packs} for _ in range(TRIES)]
    return {n: min(took[n] for took in rounds) for n in packs}

  def assist(self, cost: Cost, budget: Budget, pays: Pays) -> Assist:
    """As a run decides it."""
    search = Search(self.team.lanes, cost, budget)

    def assist(state: State, lane: Lane, unit: Unit, left: Left) -> bool:
      return not pays.forbid(state) and search(state, lane, unit, left)

    return assist

  def warm_up(self, step: int) -> None:
    """Compiles, and measures what nobody has measured yet."""
    self.program.warm_up(step)
    self.program.calibrate(step, self.costs)

  def run(self, first: int) -> Ran:
    """STEPS global steps; those between the first and the last count."""
    pays = what_pays(self.work, self.team.lanes, self.costs)
    executor = Executor(
      self.team.lanes,
      self.program.starts,
      self.costs,
      assist=self.assist(self.costs, LIVE, pays),
    )
    last = first + STEPS - 1
    ahead = last if pays.stale else None
    state = start_step(self.work, first, last=ahead)
    self.costs.every.clear()
    spans: list[Span] = []
    ends: list[float] = []
    driver: list[float] = []
    used: list[tuple[float, float]] = []
    for step in range(first, last + 1):
      self.program.begin_step(step)
      ran, state = executor.run(state)
      ends.append(time.perf_counter())
      driver.append(time.process_time())
      used.append(cpu_seconds())
      spans += ran
      if step < last:
        state = next_step(state, last=ahead)
    names = list(self.team.links)
    counted = STEPS - 2
    accounting = lane_accounting(spans, names, ends[0], ends[-2])
    return Ran(
      [b - a for a, b in itertools.pairwise(ends[:-1])],
      [s for s in spans if first < s.args["step"] < last],
      [took for took in self.costs.every if first < took[1].step < last],
      pays,
      (driver[-2] - driver[0]) / counted,
      (used[-2][0] - used[0][0]) / max(used[-2][1] - used[0][1], 1e-9),
      {
        lane: {k: v / counted for k, v in dataclasses.asdict(a).items()}
        for lane, a in accounting.items()
      },
    )

  def predict(self, cost: Cost, pays: Pays) -> float:
    """Seconds of a counted step, by simulation of a repetition.

    Args:
      cost: of units.
      pays: whether those of the next step may start early, and lanes assist
        then.
    """
    last = STEPS - 1
    assist = self.assist(cost, PREDICTED, pays)
    work = self.work
    if not pays.stale:
      work = dataclasses.replace(work, stale=0)
    state = start_step(work, 0, last=last)
    spans = simulate(state, self.team.lanes, cost, last=last, assist=assist)
    ends = [
      max(s.end for s in spans if s.args["step"] == step)
      for step in range(STEPS)
    ]
    return (ends[-2] - ends[0]) / (STEPS - 2)


def _rungs(
  config: Config, lanes: _Lanes, report: Callable[[str], None]
) -> dict[str, _Rung]:
  """All rungs, compiled."""
  assembly = assemble.assemble(config, weights=False)
  prompts = read_prompts(config.prompts)
  data = (
    compose(parse(config.reward)),
    PromptStream(tuple(prompts), config.seed, config.batch.prompts),
    assemble.embed(assembly, prompts),
  )

  def rung(name: str, pack: int) -> _Rung:
    pipeline = dataclasses.replace(config.pipeline, timesteps_per_pack=pack)
    changed = dataclasses.replace(config, pipeline=pipeline)
    return _Rung(name, changed, assembly, lanes, data)

  pack = _best_pack(rung, config.sampling.window, report)
  rungs = {name: rung(name, pack) for name in RUNGS}
  for each in rungs.values():
    each.warm_up(0)
  return rungs


def _best_pack(
  rung: Callable[[str, int], _Rung], window: int, report: Callable[[str], None]
) -> int:
  """Trained steps per pack of the shortest step, by what packs cost here.

  Small packs pay for their calls, large ones leave a lane idle at the end.
  """
  packs = [n for n in range(1, window + 1) if window % n == 0]
  trial = rung("tsp", window)
  row = trial.row_seconds(packs)
  what = [("rollout", Kind.GENERATE)]
  generate = min(trial.program.measure(0, what)[0].seconds for _ in range(3))

  def predict(pack: int) -> float:
    all_on = rung("rat", pack)
    rows = all_on.work.train_size * pack
    costs = {Kind.GENERATE: generate, Kind.TRAIN: rows * row[pack]}
    return all_on.predict(lambda _, unit: costs.get(unit.kind, 0.0), FRESH)

  steps = {pack: predict(pack) for pack in packs}
  report(
    "  trained steps per pack -> ms a row, s a step: "
    + ", ".join(f"{n} -> {1e3 * row[n]:.2f}, {steps[n]:.2f}" for n in packs)
  )
  return min(steps, key=steps.__getitem__)


def _repeat(
  rungs: Mapping[str, _Rung],
  repetitions: int,
  report: Callable[[str], None],
) -> tuple[dict[str, list[Ran]], dict[str, list[Ran]]]:
  """Every rung in turn, several times over.

  A repetition during which others had the cores says nothing about a rung, so
  it is put aside and run again at once, next to the ones it is compared with.
  When there have been too many, the quietest counts.

  Returns:
    By rung, the repetitions that count, and those put aside.
  """
  ran: dict[str, list[Ran]] = {name: [] for name in rungs}
  aside: dict[str, list[Ran]] = {name: [] for name in rungs}
  step = {"colocated": 0, "disaggregated": 0}  # each has its own training
  extra = round(EXTRA * repetitions * len(rungs))
  for repetition in range(repetitions):
    for name, rung in rungs.items():
      mode, tries = rung.config.pipeline.mode, []
      while not tries or (tries[-1].stolen > QUIET and extra > 0):
        extra -= bool(tries)
        tries.append(rung.run(step[mode]))
        step[mode] += STEPS
        seconds = statistics.median(tries[-1].seconds)
        report(
          f"  repetition {repetition + 1}  {name:11s} {seconds:.3f} s, "
          f"{100 * tries[-1].stolen:.1f} % of the processor taken away"
        )
      quietest = min(tries, key=lambda one: one.stolen)
      ran[name].append(quietest)
      aside[name] += [one for one in tries if one is not quietest]
  return ran, aside
