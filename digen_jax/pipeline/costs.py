"""Measured cost of a unit: running medians per (kind, lane, size)."""

import collections
import statistics
from collections.abc import Iterable, Mapping

from digen_jax.pipeline.units import Kind, Unit

WINDOW = 16  # one slow unit (a neighbour, a page-in) must not flip a plan
NOT_PADDED: Mapping[Kind, int] = {}


class Costs:
  """What units have cost lately, in seconds.

  A size that was never measured is scaled from the nearest one that was; a
  kind and lane never measured cost nothing.
  """

  def __init__(self, full: Mapping[Kind, int] = NOT_PADDED):
    """Nothing is known yet.

    Args:
      full: by kind, the size that shorter units are padded to.
    """
    self._full = full
    self._seen: dict[tuple[Kind, str], dict[int, collections.deque]] = {}
    self._medians: dict[tuple[Kind, str], dict[int, float]] = {}

  def observe(self, lane: str, unit: Unit, seconds: float) -> None:
    """Records one execution."""
    key, size = (unit.kind, lane), self._size(unit)
    sizes = self._seen.setdefault(key, {})
    recent = sizes.setdefault(size, collections.deque(maxlen=WINDOW))
    recent.append(seconds)
    # Searches ask far more often than units end.
    self._medians.setdefault(key, {})[size] = statistics.median(recent)

  def __call__(self, lane: str, unit: Unit) -> float:
    """Expected seconds of `unit` on `lane`."""
    medians = self._medians.get((unit.kind, lane))
    if not medians:
      return 0.0
    size = self._size(unit)
    if size in medians:
      return medians[size]
    nearest = min(medians, key=lambda other: abs(other - size))
    seconds = medians[nearest]
    return seconds * size / nearest if nearest else seconds

  def known(self, pairs: Iterable[tuple[Kind, str]]) -> bool:
    """Whether every (kind, lane) has been measured."""
    return all(pair in self._seen for pair in pairs)

  def _size(self, unit: Unit) -> int:
    return max(unit.size, self._full.get(unit.kind, 0))
