"""What the units of a GRPO step do, on the lanes of this process.

`Program` owns the arrays of a run: weights on each mesh, optimiser state, and
the samples of the step under way. `pipeline/execute.py` decides when each of
its five actions runs; every action returns at once with a handle.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from digen_jax.config import Config
from digen_jax.data.embeddings import match_text
from digen_jax.errors import UserError
from digen_jax.grpo.advantages import group_advantages
from digen_jax.grpo.windows import window_start
from digen_jax.parallel.mesh import padded_size
from digen_jax.pipeline.execute import Handle, Start
from digen_jax.pipeline.units import Kind, Unit, Workload, step_units
from digen_jax.placement import Call, Placement
from digen_jax.rewards.compose import Composite
from digen_jax.types import Conditioning, TrainBatch

NOTHING: frozenset[int] = frozenset()
WINDOW_STREAM = 0x57494E44  # noise is keyed by the step itself, far below


@dataclasses.dataclass(frozen=True)
class DeviceWork(Handle):
  """Arrays being computed, and what to do with them on the host."""

  arrays: Any
  take: Callable[[Any], None]

  def ready(self) -> bool:
    """Whether every array has been computed."""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(self.arrays))

  def finish(self) -> frozenset[int]:
    """Hands the arrays over."""
    self.take(self.arrays)
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


def window_starts(
  seed: int, step: int, groups: int, window: tuple[int, int, int | None]
) -> np.ndarray:
  """First trained step of every group: [groups] int32.

  Keyed by seed, step and group, in a stream apart from that of the noise.
  """
  key = jax.random.fold_in(jax.random.key(seed), WINDOW_STREAM)
  key = jax.random.fold_in(key, step)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    key, np.arange(groups, dtype=np.uint32)
  )
  return np.asarray(jax.vmap(lambda key: window_start(key, *window))(keys))


class Samples:
  """The samples of one global step, on the host, in canonical order.

  Attributes:
    step: global step.
    prompts: [groups] text of each group's prompt.
    prompt_ids: [groups] index of each prompt in the prompt set.
    start: [groups] first trained step of each group.
    states: [N, W+1, ...] float32, allocated with the first unit.
    log_probs: [N, W] float32.
    rewards: [N] float32, NaN where not scored yet.
    parts: reward name -> [N] float32.
    advantages: [N] float32, NaN where not known yet.
    images: [N, H, W, 3] uint8, or [N, F, H, W, 3] videos.
  """

  def __init__(
    self,
    step: int,
    work: Workload,
    prompts: Sequence[str],
    prompt_ids: np.ndarray,
    start: np.ndarray,
    reward_names: Sequence[str],
  ):
    count = work.samples
    self.step, self.work = step, work
    self.prompts, self.prompt_ids, self.start = prompts, prompt_ids, start
    self.states = self.images = None
    self.log_probs = np.zeros((count, work.window), np.float32)
    self.rewards = np.full(count, np.nan, np.float32)
    self.parts = {n: np.full(count, np.nan, np.float32) for n in reward_names}
    self.advantages = np.full(count, np.nan, np.float32)

  def store(self, unit: Unit, arrays: tuple) -> None:
    """Takes in what a Generate unit made; padding rows are dropped."""
    trajectory, images = jax.tree.map(np.asarray, arrays)
    if self.states is None:
      count = self.work.samples
      self.states = np.empty((count, *trajectory.states.shape[1:]), np.float32)
      self.images = np.empty((count, *images.shape[1:]), np.uint8)
    rows = slice(unit.start, unit.stop)
    self.states[rows] = trajectory.states[: unit.samples]
    self.log_probs[rows] = trajectory.log_probs[: unit.samples]
    self.images[rows] = images[: unit.samples]

  def dead(self, groups: Sequence[int]) -> frozenset[int]:
    """Those of `groups` whose rewards are all equal."""
    rewards = self.rewards.reshape(self.work.groups, self.work.group_size)
    return frozenset(g for g in groups if (rewards[g] == rewards[g, 0]).all())


class Program:
  """The five actions, and the arrays they share."""

  def __init__(
    self,
    config: Config,
    work: Workload,
    placement: Placement,
    reward: Composite,
    conditioning: Conditioning,
    negative: Conditioning | None,
  ):
    """Prepares the actions.

    Args:
      config: the run.
      work: what a global step consists of.
      placement: compiled functions and arrays, by lane.
      reward: what scores images.
      conditioning: [P, ...] host arrays, one row per training prompt.
      negative: [1, ...] host arrays, with classifier-free guidance.
    """
    self.config, self.work, self.placement = config, work, placement
    self.reward = reward
    self.conditioning, self.negative = match_text(conditioning, negative)
    self.samples: Samples | None = None
    self.sums: dict[str, float] = {}
    self.publish_bytes = 0
    sampling = config.sampling
    self._step_weights = np.ones(sampling.num_steps, np.float32)
    if config.train.weight_by_noise:
      trained = sampling.window_first or sampling.num_steps - 1
      self._step_weights = placement.recipe.step_weights(trained)
    self._threads = concurrent.futures.ThreadPoolExecutor(
      max_workers=4, thread_name_prefix="reward"
    )

  @property
  def starts(self) -> dict[Kind, Start]:
    """The actions by kind, as `execute.run_step` takes them."""
    return {
      Kind.GENERATE: self.generate,
      Kind.SCORE: self.score,
      Kind.TRAIN: self.train,
      Kind.UPDATE: self.update,
      Kind.PUBLISH: self.publish,
    }

  def begin_step(
    self, step: int, prompts: Sequence[str], prompt_ids: np.ndarray
  ) -> None:
    """Forgets the last step's samples and draws this step's windows."""
    sampling = self.config.sampling
    start = window_starts(
      self.config.seed,
      step,
      self.work.groups,
      (sampling.num_steps, self.work.window, sampling.window_first or None),
    )
    self.samples = Samples(
      step,
      self.work,
      prompts,
      prompt_ids,
      start,
      [reward.name for reward in self.reward.rewards],
    )
    self.sums = {}
    self._order = {
      unit: i
      for i, unit in enumerate(
        u for u in step_units(self.work, step) if u.kind == Kind.TRAIN
      )
    }
    self._early: dict[Unit, Any] = {}
    self._gradient = None
    self._summed = 0
    self.updated = False

  def warm_up(self) -> None:
    """Compiles everything, before the clock starts; changes nothing."""
    self.begin_step(0, [""] * self.work.groups, np.zeros(self.work.groups, int))
    units = step_units(self.work, 0)
    first = {unit.kind: unit for unit in reversed(units)}
    shape = self.placement.recipe.latent_shape
    self.samples.states = np.zeros(
      (self.work.samples, self.work.window + 1, *shape), np.float32
    )
    self.placement.compile(
      self._generate_call(self.placement.rollout_lane, first[Kind.GENERATE]),
      self._gradients_call(self.placement.trainer_lane, first[Kind.TRAIN]),
    )
    self.placement.publish()  # the same version once more

  def generate(self, lane: str, unit: Unit) -> Handle:
    """Samples, decodes, and brings the trajectories to the host."""
    samples = self.samples
    call = self._generate_call(lane, unit)
    return DeviceWork(
      self.placement.run(call), lambda arrays: samples.store(unit, arrays)
    )

  def _generate_call(self, lane: str, unit: Unit) -> Call:
    samples = self.samples
    size = min(self.work.generate_size, self.work.samples)
    index = self._padded(np.arange(unit.start, unit.stop), size, lane)
    groups = self._groups(unit, size)
    group, member = np.divmod(index, self.work.group_size)
    return self.placement.generate(
      self._prompts(groups),
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
    samples, size = self.samples, self.work.group_size
    prompts = [samples.prompts[i // size] for i in range(unit.start, unit.stop)]
    images = samples.images[unit.start : unit.stop]

    def call() -> Any:
      return self.reward.score(images.astype(np.float32) / 255.0, prompts)

    return HostWork(
      self._threads.submit(call), lambda scores: self._take(unit, scores)
    )

  def train(self, lane: str, unit: Unit) -> Handle:
    """Gradient of a pack of transitions."""
    call = self._gradients_call(lane, unit)
    return DeviceWork(
      self.placement.run(call), lambda arrays: self._accumulate(unit, *arrays)
    )

  def _gradients_call(self, lane: str, unit: Unit) -> Call:
    """Folds samples x steps into rows, sample-major, padded to full packs."""
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
    sigmas = self.placement.recipe.sigmas
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
    return self.placement.gradients(
      batch,
      (group - groups[0]).astype(np.int32),
      self._prompts(groups),
      self.negative,
    )

  def _groups(self, unit: Unit, size: int) -> np.ndarray:
    """The groups of a unit; a short one repeats its last, for equal shapes."""
    groups = np.asarray(self.work.groups_of(unit))
    missing = -(-size // self.work.group_size) - len(groups)
    return np.concatenate([groups, np.repeat(groups[-1:], missing)])

  def _prompts(self, groups: np.ndarray) -> Conditioning:
    """Conditioning of the prompts of `groups`, [G, ...] on the host."""
    ids = self.samples.prompt_ids[groups]
    return jax.tree.map(lambda x: x[ids], self.conditioning)

  def update(self, lane: str, unit: Unit) -> Handle:
    """Optimiser update with the accumulated gradient."""
    self._fold()  # dead groups at the end of the update are passed over here
    gradient, self._gradient = self._gradient, None
    self.updated = True
    del lane
    metrics = self.placement.update(gradient)

    def take(metrics: dict[str, jax.Array]) -> None:
      norm = float(metrics["grad_norm"])
      if not np.isfinite(norm):
        raise UserError(
          f"the gradient of update {unit.update} is {norm}: lower "
          "config.train.learning_rate or config.sampling.noise_level, or train "
          "in float32; the last checkpoint is intact"
        )
      self.sums["grad_norm"] = max(self.sums.get("grad_norm", 0.0), norm)

    return DeviceWork(metrics, take)

  def publish(self, lane: str, unit: Unit) -> Handle:
    """Copies what was trained to the rollout layout, and verifies it."""
    del lane, unit
    self.publish_bytes = self.placement.publish()
    return DeviceWork((), lambda _: None)

  def metrics(self) -> dict[str, Any]:
    """What the step's samples and packs say; means over trained rows."""
    samples, sums = self.samples, self.sums
    rows = max(sums.get("rows", 0.0), 1.0)
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
    }

  def _take(self, unit: Unit, scores: Any) -> frozenset[int]:
    """Stores rewards, and advantages where they are all there."""
    samples, work = self.samples, self.work
    samples.rewards[unit.start : unit.stop] = scores.total
    for name, values in scores.parts.items():
      samples.parts[name][unit.start : unit.stop] = values
    if work.scope == "global":
      complete = (
        [range(work.groups)] if self._scored(range(work.groups)) else []
      )
    else:
      complete = [range(g, g + 1) for g in work.groups_of(unit)]
      complete = [groups for groups in complete if self._scored(groups)]
    for groups in complete:
      rows = slice(
        groups[0] * work.group_size, (groups[-1] + 1) * work.group_size
      )
      settings = self.config.advantage
      samples.advantages[rows] = group_advantages(
        samples.rewards[rows],
        np.arange(rows.start, rows.stop) // work.group_size,
        scope=settings.scope,
        ddof=settings.ddof,
        eps=settings.eps,
        clip=settings.clip,
      )
    return samples.dead([g for groups in complete for g in groups])

  def _scored(self, groups: range) -> bool:
    size = self.work.group_size
    rows = slice(groups[0] * size, (groups[-1] + 1) * size)
    return not np.isnan(self.samples.rewards[rows]).any()

  def _accumulate(self, unit: Unit, gradient: Any, metrics: Any) -> None:
    """Adds a unit's gradient, in canonical order."""
    for name, value in metrics.items():
      value = float(value)
      if name == "ratio_max_abs_log":
        name = name if unit.update == 0 else f"{name}_later"
        self.sums[name] = max(self.sums.get(name, 0.0), value)
      else:
        self.sums[name] = self.sums.get(name, 0.0) + value
    self._early[unit] = gradient
    self._fold()

  def _fold(self) -> None:
    """Sums the gradients whose predecessors have all been summed."""
    order = list(self._order)
    while self._summed < len(order):
      unit = order[self._summed]
      if unit in self._early:
        gradient = self._early.pop(unit)
        self._gradient = self.placement.add(self._gradient, gradient)
      elif not self._is_dead(unit):
        return
      self._summed += 1

  def _is_dead(self, unit: Unit) -> bool:
    groups = self.work.groups_of(unit)
    return len(self.samples.dead(groups)) == len(groups)

  def _padded(self, rows: np.ndarray, count: int, lane: str) -> np.ndarray:
    """At least `count` rows, and what the mesh divides, by repetition."""
    size = padded_size(count, self.placement.meshes[lane])
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), 0)])
