"""The ladder of techniques as text and as pictures: seconds against a bound."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Protocol

from digen_jax.page import legend, picker, wide
from digen_jax.svg import Bar, bar_chart, lanes_chart, number
from digen_jax.timeline import Span

NAMES = {
  "colocated": "colocated",
  "sequential": "sequential",
  "gap": "+ GAP",
  "tsp": "+ TSP",
  "tag": "+ TAG/BTS",
  "rat": "+ RAT",
  "tcss": "+ TCSS",
}
BAR = 32  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"
SHOWN_SPANS = 3000  # of a timeline; more are no picture


def ladder_rows(
  seconds: Mapping[str, float], bound: float
) -> list[dict[str, Any]]:
  """What a ladder says, a row per rung.

  Args:
    seconds: of a step, by rung.
    bound: seconds that no schedule can beat.

  Returns:
    Rows of rung, step_seconds, ratio_to_sequential, ratio_to_colocated (both
    how many times faster; None where there is no such rung), bound_fraction.
  """

  def ratio(name: str, value: float) -> float | None:
    return seconds[name] / value if name in seconds else None

  return [
    {
      "rung": name,
      "step_seconds": value,
      "ratio_to_sequential": ratio("sequential", value),
      "ratio_to_colocated": ratio("colocated", value),
      "bound_fraction": bound / value,
    }
    for name, value in seconds.items()
  ]


def ladder_text(seconds: Mapping[str, float], bound: float) -> str:
  """A ladder for a terminal: numbers, and bars as long as steps take."""
  rows = ladder_rows(seconds, bound)
  longest = max(*seconds.values(), bound)
  lines = [
    f"{'':<12}{'s a step':>10}{'× seq.':>9}{'× coloc.':>10}{'bound':>8}",
    *(
      f"{NAMES.get(row['rung'], row['rung']):<12}"
      f"{number(row['step_seconds']):>10}"
      f"{_times(row['ratio_to_sequential']):>9}"
      f"{_times(row['ratio_to_colocated']):>10}"
      f"{row['bound_fraction']:>8.0%}  {_bar(row['step_seconds'] / longest)}"
      for row in rows
    ),
    f"{'bound':<12}{number(bound):>10}{'':>27}  {_bar(bound / longest)}",
  ]
  return "\n".join(line.rstrip() for line in lines)


def _times(ratio: float | None) -> str:
  return "–" if ratio is None else f"{ratio:.2f}"


def _bar(part: float) -> str:
  eighths = round(8 * BAR * part)
  return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def ladder_chart(seconds: Mapping[str, float], bound: float) -> str:
  """A ladder as HTML: bars, and the bound as a dashed line."""
  bars = [
    Bar(
      NAMES.get(row["rung"], row["rung"]),
      row["step_seconds"],
      f"{number(row['step_seconds'])} s · {row['bound_fraction']:.0%}"
      + (
        f" · {row['ratio_to_sequential']:.2f}×"
        if row["ratio_to_sequential"]
        else ""
      ),
      "var(--muted)" if row["rung"] == "colocated" else "var(--train-curve)",
    )
    for row in ladder_rows(seconds, bound)
  ]
  note = (
    f'<p class="note">Seconds of a step, part of the bound ({number(bound)} s, '
    "dashed: all work, no bubbles), and how many times faster than "
    "sequential.</p>"
  )
  return wide(bar_chart(bars, 1080, mark=bound, unit=" s")) + note


class Timed(Protocol):
  """Steps of a rung, simulated (`planner.Prediction`) or measured.

  Attributes:
    step_seconds: of one of them.
    spans: of all of them.
    busy: part of the time that each lane is.
  """

  step_seconds: float
  spans: Sequence[Span]
  busy: Mapping[str, float]


def timeline_panels(rungs: Mapping[str, Timed]) -> str:
  """The timeline of each rung, one to choose, on one time scale."""
  windows = {name: _window(timed) for name, timed in rungs.items()}
  scale = max(end - start for start, end in windows.values())
  panels, names = [], []
  for rung, timed in rungs.items():
    start, end = windows[rung]
    near = [s for s in timed.spans if s.start < end and s.end > start]
    if len(near) > SHOWN_SPANS:
      continue
    names += [s.name for s in near]
    busy = ", ".join(f"{n} {b:.0%}" for n, b in timed.busy.items())
    chart = lanes_chart(_in_order(near), start, end, 1080, scale=scale)
    title = f"{NAMES.get(rung, rung)} · {number(timed.step_seconds)} s"
    note = f'<p class="note">busy: {escape(busy)}</p>'
    panels.append((title, wide(chart) + note))
  if not panels:
    return ""
  colors = [(name, f"var(--{name})") for name in dict.fromkeys(names)]
  return legend([*colors, ("idle", "var(--hatch)")]) + picker(panels)


def _window(timed: Timed) -> tuple[float, float]:
  """A step; where steps overlap, one from the middle."""
  ends = [s.end for s in timed.spans if s.name == "publish"]
  if len(ends) < 3:
    return 0.0, ends[0]
  return ends[-3], ends[-2]


def _in_order(spans: Sequence[Span]) -> list[Span]:
  """Rollout lanes first, then the trainer, then the host."""
  order = {"rollout": 0, "colocated": 0, "trainer": 1, "host": 2}
  return sorted(
    spans, key=lambda s: (order.get(s.lane.rstrip("0123456789"), 0), s.lane)
  )
