"""Measured cost of a unit: running medians per (kind, lane, size)."""

import collections
import statistics
from collections.abc import Iterable

from digen_jax.pipeline.units import Kind, Unit

WINDOW = 16  # one slow unit (a neighbour, a page-in) must not flip a plan


class Costs:
  """What units have cost lately, in seconds.

  A size that was never measured is scaled from the nearest one that was; a
  kind and lane never measured cost nothing.
  """

  def __init__(self) -> None:
    self._seen: dict[tuple[Kind, str], dict[int, collections.deque]] = {}

  def observe(self, lane: str, unit: Unit, seconds: float) -> None:
    """Records one execution."""
    sizes = self._seen.setdefault((unit.kind, lane), {})
    sizes.setdefault(unit.size, collections.deque(maxlen=WINDOW)).append(
      seconds
    )

  def __call__(self, lane: str, unit: Unit) -> float:
    """Expected seconds of `unit` on `lane`."""
    sizes = self._seen.get((unit.kind, lane))
    if not sizes:
      return 0.0
    nearest = min(sizes, key=lambda size: abs(size - unit.size))
    seconds = statistics.median(sizes[nearest])
    return seconds * unit.size / nearest if nearest else seconds

  def known(self, pairs: Iterable[tuple[Kind, str]]) -> bool:
    """Whether every (kind, lane) has been measured."""
    return all(pair in self._seen for pair in pairs)
