"""Whether two lanes have a core each, and whether others get a part of them."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from digen_jax import cluster
from digen_jax.errors import UserError

SOLO = (0.97, 1.03)  # cores that a lane alone may use
OVERLAP = 1.9  # least (A alone + B alone) / both


def cpu_seconds(
  stat: str = "", cores: Iterable[int] = ()
) -> tuple[float, float]:
  """Processor time that others got, and that with what was had here, of cores.

  Both summed since the machine started; a core that has nothing to do wants
  none. Where nothing is told, or no hypervisor takes any, the first is 0.

  Args:
    stat: what `/proc/stat` says (see proc(5)); read by default.
    cores: by default those that this process may use.
  """
  names = {f"cpu{i}" for i in cores or os.sched_getaffinity(0)}
  try:
    stat = stat or Path("/proc/stat").read_text()
  except OSError:
    return 0.0, 0.0
  stolen = wanted = 0
  for line in stat.splitlines():
    name, _, ticks = line.partition(" ")
    if name in names:
      user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, ticks.split()
      )
      stolen += steal
      wanted += user + nice + system + irq + softirq + steal
  hertz = os.sysconf("SC_CLK_TCK")
  return stolen / hertz, wanted / hertz


def spin(island: Any, seconds: float, args: tuple) -> tuple[float, float]:
  """Computes gradients for a while, where the island is.

  Returns:
    Gradients per second, and the cores used.
  """
  count, wall, cpu = 0, time.perf_counter(), time.process_time()
  while (passed := time.perf_counter() - wall) < seconds:
    jax.block_until_ready(island.gradients(0, *args))
    count += 1
  return count / passed, (time.process_time() - cpu) / passed


def check_overlap(
  links: Mapping[str, cluster.RayLink],
  args: Mapping[str, tuple],
  report: Callable[[str], None],
  seconds: float = 2.0,
  rounds: int = 5,
) -> dict[str, Any]:
  """Shows that two lanes are two lanes.

  Args:
    links: to "rollout" and "trainer".
    args: of `Island.gradients`, by lane.
    report: told the result.
    seconds: of each measurement.
    rounds: of three measurements, each lane alone and both: a core's own speed
      changes from second to second on a shared machine.

  Returns:
    {"solo_cores", "overlap"}: cores used by each lane alone; how much more two
    lanes do together than one.

  Raises:
    UserError: a lane alone does not use one core, or both do not do nearly
      twice the work.
  """
  pair = ("rollout", "trainer")

  def start(lane: str) -> Any:
    return links[lane].apply(spin, seconds, args[lane])

  for lane in pair:
    start(lane).result()  # compiled, warm
  alone, both = [], []
  for _ in range(rounds):
    alone.append([start(lane).result() for lane in pair])
    both.append([p.result() for p in [start(lane) for lane in pair]])
  # [rounds, lanes, (gradients per second, cores)] -> means over rounds.
  (rate, cores), (together, _) = (np.mean(x, axis=0).T for x in (alone, both))
  overlap = float((together / rate).sum())
  report(
    f"alone the lanes use {cores[0]:.2f} and {cores[1]:.2f} cores; together "
    f"they do {overlap:.2f} times the work of one"
  )
  if not all(SOLO[0] <= used <= SOLO[1] for used in cores):
    raise UserError(
      f"a lane alone uses {cores[0]:.2f} and {cores[1]:.2f} cores, not one: "
      "pinning does not work here, so the ladder would show nothing"
    )
  if overlap < OVERLAP:
    raise UserError(
      f"two lanes do {overlap:.2f} times the work of one, less than {OVERLAP}: "
      "the cores are shared with something else; try when it has ended"
    )
  return {"solo_cores": cores.tolist(), "overlap": overlap}
