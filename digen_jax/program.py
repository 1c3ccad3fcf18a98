"""What the units of a GRPO step do, on whichever lane they run.

`Program` owns the samples of the steps under way and knows the islands that
hold the weights. `pipeline/execute.py` decides when each of its actions runs,
and where; every action returns at once with a handle.
"""

import concurrent.futures
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from digen_jax.config import Config
from digen_jax.data.embeddings import match_text
from digen_jax.data.prompts import PromptStream
from digen_jax.errors import LaneLost, UserError
from digen_jax.evaluation import as_floats
from digen_jax.lanes import Team
from digen_jax.links import Pending
from digen_jax.pipeline.cost_table import Measured
from digen_jax.pipeline.costs import Costs
from digen_jax.pipeline.execute import Handle, Start
from digen_jax.pipeline.units import Kind, Unit, Workload, step_units
from digen_jax.policy import Recipe
from digen_jax.rewards.compose import Composite, Scores
from digen_jax.samples import Samples, window_starts
from digen_jax.types import Conditioning, TrainBatch

_log = logging.getLogger(__name__)

NOTHING: frozenset[int] = frozenset()
KINDS = {"generate": Kind.GENERATE, "gradients": Kind.TRAIN}  # by method


@dataclasses.dataclass(frozen=True)
class DeviceWork(Handle):
  """What an island is computing, and what to do with it on the host."""

  pending: Pending
  take: Callable[[Any], None]

  @property
  def future(self) -> concurrent.futures.Future | None:
    """Of a lane in another process."""
    return self.pending.future

  def ready(self) -> bool:
    """Whether it has been computed."""
    return self.pending.ready()

  def finish(self) -> frozenset[int]:
    """Hands the result over."""
    self.take(self.pending.result())
    return NOTHING


@dataclasses.dataclass(frozen=True)
class HostWork(Handle):
  """A call in a thread, and what to do with its result."""

  future: concurrent.futures.Future
  take: Callable[[Any], frozenset[int]]

  def ready(self) -> bool:
    """Whether the call has returned or raised."""
    return self.future.done()

  def finish(self) -> frozenset[int]:
    """Hands the result over; raises what the call raised."""
    return self.take(self.future.result())


def _exhausted(error: Exception) -> bool:
  """Whether a device had too little memory."""
  return "RESOURCE_EXHAUSTED" in str(error)


class Program:
  """The actions, and the samples they share."""

  def __init__(
    self,
    config: Config,
    work: Workload,
    recipe: Recipe,
    team: Team,
    reward: Composite,
    stream: PromptStream,
    conditioning: Conditioning,
    negative: Conditioning | None,
  ):
    """Prepares the actions.

    Args:
      config: the run.
      work: what a global step consists of.
      recipe: what is fixed.
      team: islands, by lane.
      reward: what scores images.
      stream: the prompts of every step.
      conditioning: [P, ...] host arrays, one row per training prompt.
      negative: [1, ...] host arrays, with classifier-free guidance.
    """
    self.config, self.work, self.recipe = config, work, recipe
    self.team, self.links = team, team.links
    self.reward, self.stream = reward, stream
    self.conditioning, self.negative = match_text(conditioning, negative)
    self.sums: dict[str, float] = {}
    self.publish_bytes = 0
    # What tells that the last version has arrived, by lane.
    self._receipts: dict[str, Pending] = {}
    self._parcel: Pending | None = None  # that version, for lanes that die
    self._loading: set[str] = set()  # lanes that were started anew
    self._kept: Pending | None = None  # the state before several updates
    self._begun = 0  # updates of the step
    self._updates: list[Pending] = []
    self.resharded_blocks = False
    sampling = config.sampling
    self._step_weights = np.ones(sampling.num_steps, np.float32)
    if config.train.weight_by_noise:
      trained = sampling.window_first or sampling.num_steps - 1
      self._step_weights = recipe.step_weights(trained)
    self._threads = concurrent.futures.ThreadPoolExecutor(
      max_workers=config.pipeline.reward_slots, thread_name_prefix="reward"
    )
    self._steps: dict[int, Samples] = {}

  @property
  def starts(self) -> dict[Kind, Start]:
    """The actions by kind, as `execute.Executor` takes them."""
    return {
      Kind.GENERATE: self.generate,
      Kind.SCORE: self.score,
      Kind.TRAIN: self.train,
      Kind.UPDATE: self.update,
      Kind.PUBLISH: self.publish,
      Kind.SWITCH: self.switch,
    }

  def begin_step(self, step: int) -> None:
    """Forgets earlier steps; this one may have stale samples already."""
    self._steps = {k: v for k, v in self._steps.items() if k >= step}
    self.samples = self._of(step)
    self.sums = {}
    trains = [u for u in step_units(self.work, step) if u.kind == Kind.TRAIN]
    self._order = {unit: i for i, unit in enumerate(trains)}
    self._early: dict[Unit, Any] = {}
    self._summed = 0
    self._added = 0  # calls since the last update
    self._interim: Pending | None = None  # weights between two updates
    self._kept, self._begun, self._updates = None, 0, []

  def _of(self, step: int) -> Samples:
    """The samples of a step; of a new one its prompts and windows are drawn."""
    if step not in self._steps:
      sampling, ids = self.config.sampling, self.stream.indices(step)
      window = sampling.num_steps, self.work.window, sampling.window_first
      self._steps[step] = Samples(
        step,
        self.work,
        [self.stream.prompts[i] for i in ids],
        ids,
        window_starts(
          self.config.seed,
          step,
          self.work.groups,
          (*window[:2], window[2] or None),
        ),
        [reward.name for reward in self.reward.rewards],
      )
    return self._steps[step]

  def warm_up(self, step: int) -> None:
    """Compiles everything, before the clock starts; changes nothing.

    Args:
      step: the one that comes next.
    """
    calls = self._first_calls(step)
    with concurrent.futures.ThreadPoolExecutor(len(self.links)) as pool:
      lanes = {lane for lane, _ in calls}
      work = [
        pool.submit(self._prepare, [c for c in calls if c[0] == lane])
        for lane in sorted(lanes)
      ]
      for future in work:
        future.result()
    # The same version once more.
    self._send(step)
    self._await_arrival()

  def _prepare(self, calls: list[tuple[str, tuple]]) -> None:
    for lane, args in calls:
      self.links[lane].call("prepare", *args).result()

  def measure(
    self, step: int, what: Sequence[tuple[str, Kind]] = ()
  ) -> list[Measured]:
    """Runs a unit of each kind on each lane that can; changes nothing.

    Args:
      step: the one that comes next.
      what: lanes and kinds, if not all.
    """
    units = {unit.kind: unit for unit in reversed(step_units(self.work, step))}
    return [
      Measured(
        lane,
        KINDS[method],
        units[KINDS[method]].size,
        self.links[lane].call("measure", method, *args).result(),
      )
      for lane, (method, *args) in self._first_calls(step)
      if not what or (lane, KINDS[method]) in what
    ]

  def fits(self, step: int) -> bool:
    """Whether a Train unit fits into the memory of every lane that trains."""
    try:
      self.measure(step, [(lane, Kind.TRAIN) for lane in self.team.learners])
    except Exception as error:
      if not _exhausted(error):
        raise
      return False
    return True

  def calibrate(self, step: int, costs: Costs) -> None:
    """Measures what every lane can do, so that the first step has a plan.

    A trainer that assists is measured in both of its forms, and the one that
    is sooner through with a quarter of a step's samples is kept.
    """
    units = {unit.kind: unit for unit in reversed(step_units(self.work, step))}
    for lane, (method, *args) in self._first_calls(step):
      link, unit = self.links[lane], units[KINDS[method]]
      own = lane in self.team.rollouts or method == "gradients"
      layout = "trainer" if own else self.config.pipeline.tag_layout
      forced, seconds = layout == "rollout", math.inf
      if not forced:
        seconds = link.call("measure", method, *args).result()
      if layout != "trainer":
        try:
          switch = link.call("measure", "switch", True).result()
          block = link.call("measure", method, *args).result()
        except Exception as error:
          if forced or not _exhausted(error):
            raise
          switch = block = math.inf  # it does not fit, the other form does
        link.call("switch", False).result()
        count = -(-self.work.samples // unit.samples // 4)
        if forced or switch + count * block < count * seconds:
          self.resharded_blocks, seconds = True, block
          costs.observe(lane, Unit(Kind.SWITCH, step), switch)
      costs.observe(lane, unit, seconds)

  def first_pack(self, lane: str) -> tuple:
    """Arguments of `Island.gradients` for a pack of made-up samples."""
    calls = self._first_calls(0)
    return next(c[2:] for n, c in calls if n == lane and c[0] == "gradients")

  def _first_calls(self, step: int) -> list[tuple[str, tuple]]:
    """(lane, call) with the shapes of all later ones, by everybody."""
    self.begin_step(step)
    units = {unit.kind: unit for unit in reversed(step_units(self.work, step))}
    generate, train = units[Kind.GENERATE], units[Kind.TRAIN]
    shape = self.recipe.latent_shape
    self.samples.states = np.zeros(
      (self.work.samples, self.work.window + 1, *shape), np.float32
    )
    self.samples.rewards[:] = np.arange(self.work.samples)
    calls = [
      (lane, ("generate", step, *self._generate_args(lane, generate)))
      for lane in self.team.generators
    ]
    calls += [
      (lane, ("gradients", 0, *self._gradients_args(lane, train)))
      for lane in self.team.learners
    ]
    self._steps = {}
    return calls

  def generate(self, lane: str, unit: Unit) -> Handle:
    """Samples, decodes, and brings the trajectories to the host."""
    samples = self._of(unit.step)
    version = min(unit.step, self.samples.step)
    samples.version[unit.start : unit.stop] = version
    args = self._generate_args(lane, unit)
    return DeviceWork(
      self.links[lane].call("generate", version, *args),
      lambda arrays: samples.store(lane, unit, arrays),
    )

  def switch(self, lane: str, unit: Unit) -> Handle:
    """Prepares a lane to assist."""
    link = self.links[lane]
    pending = (
      link.call("borrow", self._interim)
      if unit.update
      else link.call("switch", self.resharded_blocks)
    )
    return DeviceWork(pending, lambda _: None)

  def _generate_args(self, lane: str, unit: Unit) -> tuple:
    """Arguments of `policy.generate`, on the host."""
    samples = self._of(unit.step)
    size = min(self.work.generate_size, self.work.samples)
    index = self._padded(np.arange(unit.start, unit.stop), size, lane)
    groups = self._groups(unit, size)
    group, member = np.divmod(index, self.work.group_size)
    return (
      self._prompts(samples, groups),
      self.negative,
      (group - groups[0]).astype(np.int32),
      samples.start[group].astype(np.int32),
      (
        np.uint32(self.config.seed),
        np.uint32(unit.step),
        group.astype(np.uint32),
        member.astype(np.uint32),
      ),
    )

  def score(self, lane: str, unit: Unit) -> Handle:
    """Asks the reward, in a thread."""
    del lane
    samples, size = self._of(unit.step), self.work.group_size
    prompts = [samples.prompts[i // size] for i in range(unit.start, unit.stop)]
    images = samples.images[unit.start : unit.stop]

    def call() -> Any:
      return self.reward.score(as_floats(images), prompts)

    return HostWork(
      self._threads.submit(call),
      lambda scores: samples.take(unit, scores, self.config.advantage),
    )

  def rate(self, images: np.ndarray, prompts: list[str]) -> Scores:
    """Scores of images that are of no step; see `Composite.score`.

    In the threads that score: those of stale samples may be under way, and
    `pipeline.reward_slots` bounds all calls.
    """
    return self._threads.submit(self.reward.score, images, prompts).result()

  def train(self, lane: str, unit: Unit) -> Handle:
    """Gradient of a pack of transitions."""
    number, args = self._order[unit], self._gradients_args(lane, unit)
    call = self.links[lane].call_pair
    metrics, gradient = call("gradients", number, *args)
    source = number if lane == self.team.trainer else gradient
    return DeviceWork(
      metrics, lambda metrics: self._accumulate(unit, metrics, source)
    )

  def _gradients_args(self, lane: str, unit: Unit) -> tuple:
    """Arguments of `policy.gradients`, on the host.

    Samples x steps are folded into rows, sample-major, padded to full packs.
    """
    samples, steps = self.samples, np.arange(unit.first, unit.last)
    size = min(self.work.train_size, self.work.samples // self.work.updates)
    rows = size * self.work.pack
    index, slot, real = (
      self._padded(x, rows, lane)
      for x in (
        np.repeat(np.arange(unit.start, unit.stop), len(steps)),
        np.tile(steps, unit.samples),
        np.ones(unit.samples * len(steps), np.float32),
      )
    )
    real[unit.samples * len(steps) :] = 0.0
    group = index // self.work.group_size
    groups = self._groups(unit, size)
    dead = samples.dead(groups)
    position = samples.start[group] + slot
    sigmas = self.recipe.sigmas
    batch = TrainBatch(
      x=samples.states[index, slot],
      x_next=samples.states[index, slot + 1],
      sigma=sigmas[position],
      sigma_next=sigmas[position + 1],
      old_log_prob=samples.log_probs[index, slot],
      advantage=samples.advantages[index],
      weight=np.where(
        np.isin(group, list(dead)),
        np.float32(0.0),
        real * self._step_weights[position],
      ),
      conditioning=None,  # put together on the device, from far fewer bytes
    )
    return (
      batch,
      (group - groups[0]).astype(np.int32),
      self._prompts(samples, groups),
      self.negative,
    )

  def _groups(self, unit: Unit, size: int) -> np.ndarray:
    """The groups of a unit; a short one repeats its last, for equal shapes."""
    groups = np.asarray(self.work.groups_of(unit))
    missing = -(-size // self.work.group_size) - len(groups)
    return np.concatenate([groups, np.repeat(groups[-1:], missing)])

  def _prompts(self, samples: Samples, groups: np.ndarray) -> Conditioning:
    """Conditioning of the prompts of `groups`, [G, ...] on the host."""
    ids = samples.prompt_ids[groups]
    return jax.tree.map(lambda x: x[ids], self.conditioning)

  def update(self, lane: str, unit: Unit) -> Handle:
    """Optimiser update with the accumulated gradient."""
    self._fold()  # dead groups at the end of the update are passed over here
    missing = [
      u for u in list(self._order)[self._summed :] if u.update <= unit.update
    ]
    if missing:
      raise RuntimeError(
        f"the gradient of samples {missing[0].start}:{missing[0].stop} is missing"
      )
    link = self.links[lane]
    if self.work.updates > 1 and not unit.update:
      self._kept = link.call("keep")
    self._begun += 1
    metrics = link.call("update", self._added)
    self._updates.append(metrics)
    self._added = 0
    if unit.update + 1 < self.work.updates and len(self.team.learners) > 1:
      # At once: later it would queue behind the trainer's Train units.
      self._interim = link.call("interim", unit.update + 1)

    def take(metrics: dict[str, jax.Array]) -> None:
      norm = float(metrics["grad_norm"])
      if not np.isfinite(norm):
        raise UserError(
          f"the gradient of update {unit.update} is {norm}: lower "
          "config.train.learning_rate or config.sampling.noise_level, or train "
          "in float32"
        )
      self.sums["grad_norm"] = max(self.sums.get("grad_norm", 0.0), norm)

    return DeviceWork(metrics, take)

  def make_whole(self) -> int | None:
    """Takes the trainer's state back to the beginning of the step, if need be.

    Returns:
      How many steps further than at its beginning the state then is: 0, or 1
      if all updates are done. None if it is lost: the only update of a step
      has failed while it changed the state, or there was no room to keep the
      state before several.

    Raises:
      LaneLost: the trainer has died.
    """
    if not self._begun:
      return 0
    try:
      norms = [float(i.result()["grad_norm"]) for i in self._updates]
    except LaneLost:
      raise
    except Exception:
      norms = []
    if len(norms) == self.work.updates and np.isfinite(norms).all():
      return 1
    trainer = self.links[self.team.trainer]
    try:
      if self._kept is not None:
        self._kept.result()
        trainer.call("roll_back").result()
      # What is not finite has changed nothing, nor has what never began.
      elif not norms and trainer.call("holds").result() != self.samples.step:
        return None
    except LaneLost:
      raise
    except Exception as error:
      _log.warning("the state before the step cannot be restored (%s)", error)
      return None
    return 0

  def publish(self, lane: str, unit: Unit) -> Handle:
    """Copies what was trained to the rollout layout; verified before use.

    It is done when the trainer has parted with the weights. Calls to an island
    keep their order, so the next version has arrived before it is asked for;
    rollout lanes, which may be busy with stale units, are not waited for.
    """
    del lane
    self._await_arrival()
    size = self._send(unit.step + 1)

    def take(size: int) -> None:
      self.publish_bytes = size

    return DeviceWork(size, take)

  def _send(self, version: int) -> Pending:
    """Has the trainer send a version to the rollout lanes; its bytes."""
    trainer = self.links[self.team.trainer]
    size, parcel = trainer.call_pair("outgoing", version)
    for lane in self.team.rollouts:
      self._receipts[lane] = self.links[lane].call("receive", parcel)
    if self.config.pipeline.lanes == "ray":  # others live as long as we do
      self._parcel = parcel
    return size

  def _await_arrival(self) -> None:
    for lane, receipt in self._receipts.items():
      if lane not in self._loading:
        receipt.result()

  def restore(self, step: int) -> None:
    """Goes on from a checkpoint."""
    self.links[self.team.trainer].call("restore", step).result()
    self._send(step)
    self._await_arrival()

  def revive(self, lane: str) -> Handle | None:
    """Starts a rollout lane anew that has died; None for any other lane.

    What it held comes from files and from the last version sent. Only the lane
    that trains has what nobody else does.
    """
    if lane not in self.team.rollouts or lane == self.team.trainer:
      return None
    link = self.links[lane]
    if not link.restart():
      return None
    # Before the first version is sent it is the one that the lane loads.
    call = ("receive", self._parcel) if self._parcel else ("switch", False)
    self._receipts[lane] = receipt = link.call(*call)
    self._loading.add(lane)
    return DeviceWork(receipt, lambda _: self._loading.discard(lane))

  def metrics(self) -> dict[str, Any]:
    """What the step's samples and packs say; means over trained rows."""
    samples, sums = self.samples, self.sums
    rows = max(sums.get("rows", 0.0), 1.0)
    stale = max(sums.get("rows_stale", 0.0), 1.0)
    return {
      "reward_mean": samples.rewards.mean(),
      "reward_std": samples.rewards.std(),
      "zero_std_groups": len(samples.dead(range(self.work.groups))),
      "advantage_abs_mean": np.abs(samples.advantages).mean(),
      "ratio_mean": sums.get("ratio_sum", rows) / rows,
      "clip_fraction": sums.get("clip_sum", 0.0) / rows,
      "kl": sums.get("kl_sum", 0.0) / rows,
      "loss": sums.get("loss_sum", 0.0) / rows,
      "grad_norm": sums.get("grad_norm", 0.0),
      # Of the first update, which is on-policy; later ones drift by design.
      "ratio_max_abs_log": sums.get("ratio_max_abs_log", 0.0),
      "ratio_max_abs_log_later": sums.get("ratio_max_abs_log_later", 0.0),
      # Of packs with samples of the version before (TCSS).
      "ratio_max_abs_log_stale": sums.get("ratio_max_abs_log_stale", 0.0),
      "ratio_mean_stale": sums.get("ratio_sum_stale", stale) / stale,
      "clip_fraction_stale": sums.get("clip_sum_stale", 0.0) / stale,
      "staleness_mean": float(samples.staleness().mean()),
      "staleness_max": int(samples.staleness().max()),
      "generated_by": dict(samples.generated_by),
    }

  def _accumulate(
    self, unit: Unit, metrics: dict[str, Any], source: Any
  ) -> None:
    """Adds a unit's gradient, in canonical order."""
    stale = self.samples.staleness(slice(unit.start, unit.stop)).any()
    for name, value in metrics.items():
      value = float(value)
      if name == "ratio_max_abs_log":
        if unit.update:
          name += "_later"
        elif stale:
          name += "_stale"
        self.sums[name] = max(self.sums.get(name, 0.0), value)
        continue
      for key in (name, f"{name}_stale") if stale else (name,):
        self.sums[key] = self.sums.get(key, 0.0) + value
    self._early[unit] = source
    self._fold()

  def _fold(self) -> None:
    """Sums the gradients whose predecessors have all been summed."""
    order = list(self._order)
    while self._summed < len(order):
      unit = order[self._summed]
      if unit in self._early:
        gradient = self._early.pop(unit)
        self.links[self.team.trainer].call("add", gradient)
        self._added += 1
      elif not self._is_dead(unit):
        return
      self._summed += 1

  def _is_dead(self, unit: Unit) -> bool:
    groups = self.work.groups_of(unit)
    return len(self.samples.dead(groups)) == len(groups)

  def _padded(self, rows: np.ndarray, count: int, lane: str) -> np.ndarray:
    """At least `count` rows, and what the lane divides, by repetition."""
    shards = self.links[lane].hardware.shards
    size = -(-count // shards) * shards
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), 0)])
