"""BTS: at each bubble, how many units an idle lane should take from others.

Taking too few leaves the lane idle; taking one too many keeps it from its own
work when that arrives. So each bubble asks the simulator, with the costs as
they are now: for a number of units n, the lane takes the next n units that are
not its own and none after them; when does the step end? The best n becomes a
commitment: the lane takes that many, and every later bubble counts on it.
Where lanes gain only by helping each other, none would begin: so each n is
also tried with all others helping as much as they can, and then their part of
such a plan is committed to with it.

A commitment is only made if the simulated end of the step, all earlier
commitments kept, moves forward. So that end never moves back, and within the
accuracy of the costs the search is never slower than not assisting.

All units and one are tried first, then what lies between. The search over n is
cut short where nothing more can be gained (a lower bound is reached) and by a
budget; a state in which nothing pays is decided once. Where a step has so many
units that a single simulation uses the budget up, all or nothing is decided,
once in the step.
"""

import collections
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence

from digen_jax.pipeline import bounds
from digen_jax.pipeline.scheduler import Lane, State
from digen_jax.pipeline.simulate import Cost, Left, simulate
from digen_jax.pipeline.units import (
  Kind,
  Unit,
  Workload,
  full_sizes,
  plan,
  step_units,
)

GAIN = 1e-3  # relative; less than this is rounding, not time
MEMORY = 4096  # decided states that are remembered
# Where a step has more units than this, a search at every bubble would take
# minutes in simulations of whole steps.
SEARCHED_UNITS = 100


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a decision may cost.

  Attributes:
    simulations: at most so many per bubble.
    seconds: and no new one after this long ...
    part: ... and after this part of the shortest unit of a lane's own work.
  """

  simulations: int = 24
  seconds: float = math.inf
  part: float = 0.0


# Where lanes wait for the answer; and, where its outcome is predicted, what
# there is time for with some sixty units.
LIVE = Budget(seconds=0.02, part=0.02)
PREDICTED = Budget(simulations=8)
# Where steps are `large`: all or nothing at once.
WHOLE = Budget(seconds=0.0)


def large(work: Workload) -> bool:
  """Whether steps have so many units that simulations must be few."""
  generating = work.samples // full_sizes(work)[Kind.GENERATE]
  return bounds.train_units(work) + generating > SEARCHED_UNITS


class Search:
  """Decides whether an idle lane assists; pass it to `simulate` or an `Executor`.

  search = Search(lanes, costs)
  search(state, lane, unit, left) -> bool
  """

  def __init__(
    self,
    lanes: Sequence[Lane],
    cost: Cost,
    budget: Budget = Budget(),
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Prepares the search.

    Args:
      lanes: all of them.
      cost: expected seconds of a unit on a lane, asked anew each time.
      budget: per bubble.
      clock: seconds, for the budget.
    """
    self.lanes, self.cost, self.budget = tuple(lanes), cost, budget
    self._clock = clock
    self._step = -1
    self._whole: bool | None = None  # the answer for all of the step
    self._committed: dict[str, int] = {}
    self._refused: collections.OrderedDict[tuple, None] = (
      collections.OrderedDict()
    )

  def __call__(self, state: State, lane: Lane, unit: Unit, left: Left) -> bool:
    """Whether `lane` should take `unit` now; if so, it has to.

    Args:
      state: where the run stands.
      lane: idle.
      unit: not its own work; the next it could take.
      left: seconds that the units under way still need.
    """
    if state.step != self._step:
      self._step, self._committed, self._whole = state.step, {}, None
    if self._committed.get(lane.name, 0) <= 0:
      if self._whole is not None:
        return self._whole
      promises = tuple(sorted(self._committed.items()))
      ahead = state.ahead is not None  # a lane that does not help has work
      key = (state.now, ahead, state.running, lane.name, promises)
      if key in self._refused:
        return False
      plan = self._best(state, lane, unit, left)
      if not plan:
        if len(self._refused) >= MEMORY:
          self._refused.popitem(last=False)
        self._refused[key] = None
        return False
      # Another lane may have been quicker to take what this one is for.
      self._committed = plan | {lane.name: max(plan.get(lane.name, 0), 1)}
    self._committed[lane.name] -= 1
    return True

  def _best(
    self, state: State, lane: Lane, unit: Unit, left: Left
  ) -> dict[str, int]:
    """Units that each lane should commit to; none if `lane` should not."""
    deadline = self._clock() + self._patience(state)
    best: dict[str, int] = {}
    soonest = self._simulate(state, lane, 0, left, False)[0] * (1 - GAIN)
    if large(state.work) and self._clock() > deadline:
      seconds, plan = self._simulate(state, lane, sys.maxsize, left, True)
      self._whole = seconds < soonest
      return plan if self._whole else {}
    least = math.inf  # of plans that end alike, the one that decides least
    bound = self._bound(state, left)
    tries = itertools.product(self._quotas(state, unit), (False, True))
    for tried, (quota, together) in enumerate(tries, start=2):
      if soonest <= bound or tried > self.budget.simulations:
        break
      seconds, plan = self._simulate(state, lane, quota, left, together)
      if seconds < soonest or (best and seconds == soonest and quota < least):
        best, soonest, least = plan, seconds, quota
      if self._clock() > deadline:
        break
    return best

  def _patience(self, state: State) -> float:
    """Seconds that a decision may take."""
    budget = self.budget
    if not budget.part:
      return budget.seconds
    units, kinds = step_units(state.work, state.step), plan(state.work).kinds
    found = [
      self.cost(lane.name, units[(members & -members).bit_length() - 1])
      for lane in self.lanes
      for kind in (Kind.GENERATE, Kind.TRAIN)
      if kind in lane.kinds and (members := kinds[kind])
    ]
    return max(budget.seconds, budget.part * min(found, default=0.0))

  def _quotas(self, state: State, unit: Unit) -> list[int]:
    """All that is left of the kind, 1, half of it, 2, a quarter, 3, 4, 6, ..."""
    members = plan(state.work).kinds[unit.kind] & ~state.now.started
    count = (members & ~state.now.done).bit_count()
    few, n = [], 1
    while n < count:
      few += [n] if n % 2 or n < 4 else [n, n + n // 2]
      n = n + 1 if n < 4 else 2 * n
    many = [count >> i for i in range(count.bit_length())]
    pairs = itertools.zip_longest(many, few)
    quotas = dict.fromkeys(q for pair in pairs for q in pair if q)
    return [q for q in quotas if q <= count]

  def _simulate(
    self, state: State, lane: Lane, quota: int, left: Left, together: bool
  ) -> tuple[float, dict[str, int]]:
    """Seconds to the end of the step if `lane` commits to `quota` units.

    Also what all lanes are then committed to. Others do what they have
    promised, or, `together`, all they can.
    """
    promised = self._committed | {lane.name: quota}
    taken: dict[str, int] = dict.fromkeys(promised, 0)

    def assist(_: State, who: Lane, unit: Unit, left: Left) -> bool:
      del unit, left
      willing = together and who.name != lane.name
      if not willing and taken.get(who.name, 0) >= promised.get(who.name, 0):
        return False
      taken[who.name] = taken.get(who.name, 0) + 1
      return True

    spans = simulate(state, self.lanes, self.cost, assist=assist, left=left)
    return max(span.end for span in spans), taken if together else promised

  def _bound(self, state: State, left: Left) -> float:
    """No plan ends before all work is done at every lane's best speed."""
    lanes = [lane for lane in self.lanes if Kind.SCORE not in lane.kinds]
    names = {lane.name for lane in lanes}
    work = sum(
      left.get((name, unit), 0.0)
      for name, unit in state.running
      if name in names and unit.step == state.step
    )
    open_units = ~(state.now.started | state.now.done)
    for kind, members in plan(state.work).kinds.items():
      able = [i for i in lanes if kind in i.kinds | i.assists]
      remaining = (members & open_units).bit_count()
      if not able or not remaining:
        continue
      first = (members & -members).bit_length() - 1
      unit = step_units(state.work, state.step)[first]
      work += remaining * min(self.cost(i.name, unit) for i in able)
    return work / len(lanes)
