"""The samples of a global step, and what becomes known of them."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from digen_jax.config import Advantage
from digen_jax.grpo.advantages import group_advantages
from digen_jax.grpo.windows import window_start
from digen_jax.pipeline.units import Unit, Workload
from digen_jax.rewards.compose import Scores

BLOCK = 256  # steps
WINDOW_STREAM = 0x57494E44  # noise is keyed by the step itself, far below


def window_starts(
  seed: int, step: int, groups: int, window: tuple[int, int, int | None]
) -> np.ndarray:
  """First trained step of every group: [groups] int32.

  Keyed by seed, step and group, in a stream apart from that of the noise.
  Drawn for many steps at once: the device that is asked may have units queued.
  """
  block, row = divmod(step, BLOCK)
  return _drawn(seed, block * BLOCK, groups, window)[row]


@functools.lru_cache(maxsize=4)
def _drawn(
  seed: int, first: int, groups: int, window: tuple[int, int, int | None]
) -> np.ndarray:
  """Those of `BLOCK` steps: [BLOCK, groups] int32."""
  stream = jax.random.fold_in(jax.random.key(seed), WINDOW_STREAM)

  def start(step: jax.Array, group: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(stream, step), group)
    return window_start(key, *window)

  rows = jax.vmap(jax.vmap(start, (None, 0)), (0, None))
  steps = np.arange(first, first + BLOCK, dtype=np.uint32)
  return np.asarray(jax.jit(rows)(steps, np.arange(groups, dtype=np.uint32)))


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
    version: [N] int32, the policy version each was generated with.
    generated_by: lane name -> Generate units.
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
    self.version = np.full(count, step, np.int32)
    self.generated_by: dict[str, int] = {}

  def store(self, lane: str, unit: Unit, arrays: tuple) -> None:
    """Takes in what a Generate unit made; padding rows are dropped."""
    self.generated_by[lane] = self.generated_by.get(lane, 0) + 1
    trajectory, images = jax.tree.map(np.asarray, arrays)
    if self.states is None:
      count = self.work.samples
      self.states = np.empty((count, *trajectory.states.shape[1:]), np.float32)
      self.images = np.empty((count, *images.shape[1:]), np.uint8)
    rows = slice(unit.start, unit.stop)
    self.states[rows] = trajectory.states[: unit.samples]
    self.log_probs[rows] = trajectory.log_probs[: unit.samples]
    self.images[rows] = images[: unit.samples]

  def take(
    self, unit: Unit, scores: Scores, settings: Advantage
  ) -> frozenset[int]:
    """Stores rewards, and advantages where rewards are all there.

    Returns:
      Those of the groups that are now complete whose rewards are all equal.
    """
    work = self.work
    self.rewards[unit.start : unit.stop] = scores.total
    for name, values in scores.parts.items():
      self.parts[name][unit.start : unit.stop] = values
    together = (
      [range(work.groups)]
      if work.scope == "global"
      else [range(g, g + 1) for g in work.groups_of(unit)]
    )
    complete = [groups for groups in together if self._scored(groups)]
    for groups in complete:
      rows = self._rows(groups)
      self.advantages[rows] = group_advantages(
        self.rewards[rows],
        np.arange(rows.start, rows.stop) // work.group_size,
        scope=settings.scope,
        ddof=settings.ddof,
        eps=settings.eps,
        clip=settings.clip,
      )
    return self.dead([g for groups in complete for g in groups])

  def _scored(self, groups: range) -> bool:
    return not np.isnan(self.rewards[self._rows(groups)]).any()

  def _rows(self, groups: range) -> slice:
    size = self.work.group_size
    return slice(groups[0] * size, (groups[-1] + 1) * size)

  def dead(self, groups: Sequence[int]) -> frozenset[int]:
    """Those of `groups` whose rewards are all equal."""
    rewards = self.rewards.reshape(self.work.groups, self.work.group_size)
    return frozenset(g for g in groups if (rewards[g] == rewards[g, 0]).all())

  def staleness(self, rows: slice = slice(None)) -> np.ndarray:
    """By how many updates the policy was older than the step: [n] int32."""
    return self.step - self.version[rows]
