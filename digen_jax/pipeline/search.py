"""BTS: at each bubble, how many units an idle lane should take from others.

Taking too few leaves the lane idle; taking one too many keeps it from its own
work when that arrives. So each bubble asks the simulator, with the costs as
they are now: for a number of units n, the lane takes the next n units that are
not its own and none after them; when does the step end? If the best n is not
0 the lane takes one unit, and the next bubble asks again.

The search over n is cut short where nothing can be gained (a lower bound is
reached) and by a budget; each state is decided once. It never chooses what
the simulation does not show to be faster, so within the accuracy of the costs
it is never slower than not assisting.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

from digen_jax.pipeline.scheduler import Lane, State
from digen_jax.pipeline.simulate import Cost, Left, simulate
from digen_jax.pipeline.units import Kind, Unit, plan, step_units

GAIN = 1e-3  # relative; less than this is rounding, not time
MEMORY = 4096  # decided states that are remembered


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a decision may cost.

  Attributes:
    simulations: at most so many per bubble.
    seconds: and no new one after this long.
  """

  simulations: int = 24
  seconds: float = math.inf


class Search:
  """Decides whether an idle lane assists; pass it to `simulate` or `run_step`.

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
    self._decided: collections.OrderedDict[tuple, bool] = (
      collections.OrderedDict()
    )

  def __call__(self, state: State, lane: Lane, unit: Unit, left: Left) -> bool:
    """Whether `lane` should take `unit` now.

    Args:
      state: where the run stands.
      lane: idle.
      unit: not its own work; the next it could take.
      left: seconds that the units under way still need.
    """
    key = (state.now, state.running, lane.name)
    if key not in self._decided:
      if len(self._decided) >= MEMORY:
        self._decided.popitem(last=False)
      self._decided[key] = self._decide(state, lane, unit, left)
    return self._decided[key]

  def _decide(self, state: State, lane: Lane, unit: Unit, left: Left) -> bool:
    idle = self._seconds(state, lane, 0, left)
    target = min(idle * (1 - GAIN), idle)
    if self._bound(state, left) >= target:
      return False
    deadline = self._clock() + self.budget.seconds
    for tried, quota in enumerate(self._quotas(state, unit), start=2):
      if self._seconds(state, lane, quota, left) < target:
        return True
      if tried >= self.budget.simulations or self._clock() > deadline:
        break
    return False

  def _quotas(self, state: State, unit: Unit) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... to all that is left of the kind."""
    members = plan(state.work).kinds[unit.kind] & ~state.now.started
    count = (members & ~state.now.done).bit_count()
    quotas, n = [], 1
    while n < count:
      quotas += [n] if n % 2 or n < 4 else [n, n + n // 2]
      n = n + 1 if n < 4 else 2 * n
    return [q for q in quotas if q < count] + [count]

  def _seconds(self, state: State, lane: Lane, quota: int, left: Left) -> float:
    """Seconds to the end of the step if `lane` takes `quota` units."""
    taken = 0

    def assist(_: State, who: Lane, unit: Unit, left: Left) -> bool:
      nonlocal taken
      del unit, left
      if who.name != lane.name:
        return True
      taken += 1
      return taken <= quota

    spans = simulate(state, self.lanes, self.cost, assist=assist, left=left)
    return max(span.end for span in spans)

  def _bound(self, state: State, left: Left) -> float:
    """No plan ends before all work is done at every lane's best speed."""
    work = sum(left.get(running, 0.0) for running in state.running)
    open_units = ~(state.now.started | state.now.done)
    lanes = [lane for lane in self.lanes if Kind.SCORE not in lane.kinds]
    for kind, members in plan(state.work).kinds.items():
      able = [i for i in lanes if kind in i.kinds | i.assists]
      remaining = (members & open_units).bit_count()
      if not able or not remaining:
        continue
      first = (members & -members).bit_length() - 1
      unit = step_units(state.work, state.step)[first]
      work += remaining * min(self.cost(i.name, unit) for i in able)
    return work / len(lanes)
