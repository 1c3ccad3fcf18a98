"""Line charts and lane timelines as SVG text, for a page that loads nothing.

Colours are CSS custom properties of the page (`var(--ink)`, ...), so that one
drawing serves a light and a dark page. What the pointer rests on explains
itself in a `<title>`.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from html import escape

from digen_jax.timeline import Span, merge, slots

LABEL_WIDTH = 6.2  # pixels of a character of an axis label, about


@dataclasses.dataclass(frozen=True)
class Series:
  """A line of a chart.

  Attributes:
    label: its name in legend and titles.
    color: a CSS colour.
    points: (x, y) in order of x; a y of None is a gap.
    faint: drawn thin and pale, without legend: the noise behind a smooth line.
    marked: with a dot at every point.
  """

  label: str
  color: str
  points: Sequence[tuple[float, float | None]]
  faint: bool = False
  marked: bool = False


@dataclasses.dataclass(frozen=True)
class Frame:
  """The plot area of a drawing, pixels, and the values at its edges."""

  left: float
  right: float
  top: float
  bottom: float
  x_range: tuple[float, float]
  y_range: tuple[float, float]

  def x(self, value: float) -> float:
    """Pixel column of a value."""
    low, high = self.x_range
    return self.left + (value - low) / (high - low) * (self.right - self.left)

  def y(self, value: float) -> float:
    """Pixel row of a value."""
    low, high = self.y_range
    return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list:
  """Round numbers in [low, high], about `count` of them.

  Args:
    low: smallest value.
    high: largest value, above `low`.
    count: how many are wanted.
    whole: only integers.
  """
  rough = (high - low) / max(count, 1)
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
  if whole:
    step = max(1, round(step))
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def number(value: float | None) -> str:
  """Three significant digits: "0.412", "1,230", "2.4e-7"; a dash for None."""
  if value is None or not math.isfinite(value):
    return "–"
  if value == 0:
    return "0"
  if 1e-3 <= abs(value) < 1e6:
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
  mantissa, exponent = f"{value:.1e}".split("e")
  return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def line_chart(
  series: Sequence[Series],
  width: int,
  height: int,
  *,
  zero: bool = False,
) -> str:
  """Values against steps, with a title over every step; "" without a value.

  Args:
    series: the lines; x are whole steps.
    width: of the drawing, pixels; it scales to its container.
    height: of the drawing.
    zero: let the y axis begin at zero.
  """
  xs = [x for s in series for x, y in s.points if y is not None]
  ys = [y for s in series for _, y in s.points if y is not None]
  if not xs:
    return ""
  low, high = _widened(min([*ys, 0.0] if zero else ys), max(ys), zero)
  y_ticks = ticks(low, high, max(2, round(height / 45)))
  labels = [number(t) for t in y_ticks]
  left = 12 + LABEL_WIDTH * max(len(label) for label in labels)
  frame = Frame(
    left,
    width - 12,
    10,
    height - 22,
    (min(xs) - 0.5, max(xs) + 0.5)
    if min(xs) == max(xs)
    else (min(xs), max(xs)),
    (low, high),
  )
  parts = [
    _axes(frame, list(zip(y_ticks, labels))),
    *(_line(s, frame) for s in series),
    _titles(series, frame),
  ]
  return _drawing(width, height, parts)


def _widened(low: float, high: float, zero: bool) -> tuple[float, float]:
  """The range with some air around it."""
  if low == high:
    pad = abs(high) * 0.1 or 1.0
    return (0.0, high + pad) if zero and low == 0 else (low - pad, high + pad)
  pad = 0.06 * (high - low)
  return (low if zero and low == 0 else low - pad), high + pad


def _drawing(width: float, height: float, parts: Sequence[str]) -> str:
  return (
    f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
    + "".join(parts)
    + "</svg>"
  )


def _axes(frame: Frame, y_ticks: Sequence[tuple[float, str]]) -> str:
  parts = []
  for value, label in y_ticks:
    y = frame.y(value)
    parts.append(
      f'<line class="grid" x1="{frame.left:.1f}" x2="{frame.right:.1f}" '
      f'y1="{y:.1f}" y2="{y:.1f}"/>'
      f'<text class="tick" x="{frame.left - 6:.1f}" y="{y + 4:.1f}" '
      f'text-anchor="end">{label}</text>'
    )
  return "".join([*parts, _x_axis(frame, whole=True)])


def _x_axis(frame: Frame, whole: bool = False, unit: str = "") -> str:
  count = max(2, round((frame.right - frame.left) / 90))
  parts = [
    f'<line class="axis" x1="{frame.left:.1f}" x2="{frame.right:.1f}" '
    f'y1="{frame.bottom:.1f}" y2="{frame.bottom:.1f}"/>'
  ]
  for value in ticks(*frame.x_range, count, whole):
    x = frame.x(value)
    parts.append(
      f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" '
      f'y1="{frame.bottom:.1f}" y2="{frame.bottom + 4:.1f}"/>'
      f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 16:.1f}" '
      f'text-anchor="middle">{number(value)}{unit}</text>'
    )
  return "".join(parts)


def _line(series: Series, frame: Frame) -> str:
  """Polylines between gaps; a point between two gaps is a dot."""
  runs: list[list[tuple[float, float]]] = [[]]
  for x, y in series.points:
    if y is None:
      runs.append([])
    else:
      runs[-1].append((frame.x(x), frame.y(y)))
  style = f'style="--c:{series.color}"'
  faint = " faint" if series.faint else ""
  parts = []
  for run in runs:
    if len(run) > 1:
      points = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
      parts.append(f'<polyline class="line{faint}" {style} points="{points}"/>')
    if len(run) == 1 or series.marked:
      parts += [
        f'<circle class="dot{faint}" {style} cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        for x, y in run
      ]
  return "".join(parts)


def _titles(series: Sequence[Series], frame: Frame) -> str:
  """Invisible columns, one per x, which the pointer finds."""
  values: dict[float, list[str]] = {}
  for s in series:
    for x, y in s.points:
      values.setdefault(x, []).append(f"{s.label} {number(y)}")
  xs = sorted(values)
  edges = [
    frame.left,
    *((frame.x(a) + frame.x(b)) / 2 for a, b in itertools.pairwise(xs)),
    frame.right,
  ]
  return "".join(
    f'<rect class="hit" x="{a:.1f}" y="{frame.top}" width="{b - a:.1f}" '
    f'height="{frame.bottom - frame.top:.1f}"><title>'
    + escape("\n".join([f"step {x:g}", *values[x]]))
    + "</title></rect>"
    for x, a, b in zip(xs, edges, edges[1:])
  )


def lanes_chart(
  spans: Sequence[Span], start: float, end: float, width: int, scale: float
) -> str:
  """Lanes as rows, units as bars, bubbles hatched.

  Needs the pattern `#bubble` (see `BUBBLE`) and a CSS colour `--NAME` for every
  name of a span.

  Args:
    spans: what ran; only what lies in [start, end] is drawn.
    start: left edge, seconds.
    end: right edge, seconds.
    width: of the drawing, pixels.
    scale: seconds that the width stands for, at least end - start: drawings of
      one scale can be compared.
  """
  lanes = list(dict.fromkeys(span.lane for span in spans))
  rows = dict(zip(map(id, spans), slots(spans)))
  left = 18 + 7 * max((len(lane) for lane in lanes), default=0)
  frame = Frame(left, width - 14, 4, 0, (0.0, scale), (0, 1))
  parts, top = [], 6.0
  for lane in lanes:
    own = [
      s for s in spans if s.lane == lane and s.start < end and s.end > start
    ]
    scores = all(s.name == "score" for s in own)
    height = 26 if scores else 40
    parts.append(
      f'<text class="lane" x="{left - 10:.1f}" y="{top + height / 2 + 4:.1f}" '
      f'text-anchor="end">{escape(lane)}</text>'
    )
    if not scores:
      parts += _bubbles(own, frame, start, end, (top, height))
    count = max((rows[id(s)] for s in own), default=0) + 1
    parts += [
      _unit(
        span,
        dataclasses.replace(frame, top=top + rows[id(span)] * height / count),
        (start, end),
        height / count,
      )
      for span in own
    ]
    top += height + 8
  frame = dataclasses.replace(frame, bottom=top)
  parts.append(_x_axis(frame, unit=" s"))
  return _drawing(width, top + 24, parts)


@dataclasses.dataclass(frozen=True)
class Bar:
  """A row of a bar chart.

  Attributes:
    label: to the left of it.
    value: its length.
    text: behind it.
    color: a CSS colour.
  """

  label: str
  value: float
  text: str = ""
  color: str = "var(--train-curve)"


def bar_chart(
  bars: Sequence[Bar], width: int, *, mark: float | None = None, unit: str = ""
) -> str:
  """Values as horizontal bars from zero, one below the other; "" without any.

  Args:
    bars: from top to bottom.
    width: of the drawing, pixels; it scales to its container.
    mark: a value at which a dashed line crosses all bars.
    unit: of the axis, behind its numbers.
  """
  if not bars:
    return ""
  left = 18 + 7 * max(len(bar.label) for bar in bars)
  right = width - 16 - LABEL_WIDTH * max(len(bar.text) for bar in bars)
  most = max([bar.value for bar in bars] + [mark or 0.0]) or 1.0
  frame = Frame(left, right, 6, 10 + 30 * len(bars), (0.0, most), (0, 1))
  parts = []
  for i, bar in enumerate(bars):
    top, end = 8 + 30 * i, frame.x(bar.value)
    parts.append(
      f'<text class="lane" x="{left - 10:.1f}" y="{top + 16}" '
      f'text-anchor="end">{escape(bar.label)}</text>'
      f'<rect class="bar" style="fill:{bar.color}" x="{left:.1f}" y="{top}" '
      f'width="{max(end - left, 0.75):.1f}" height="22" rx="2">'
      f"<title>{escape(bar.label)} {number(bar.value)}{unit}</title></rect>"
      f'<text class="tick" x="{end + 8:.1f}" y="{top + 16}">'
      f"{escape(bar.text)}</text>"
    )
  parts.append(_x_axis(frame, unit=unit))
  if mark is not None:
    x = frame.x(mark)
    parts.append(
      f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" '
      f'y2="{frame.bottom}"><title>{number(mark)}{unit}</title></line>'
    )
  return _drawing(width, frame.bottom + 24, parts)


BUBBLE = (
  '<svg width="0" height="0" style="position:absolute" aria-hidden="true">'
  '<defs><pattern id="bubble" width="6" height="6" '
  'patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
  '<rect width="6" height="6" style="fill:var(--idle)"/>'
  '<rect width="2" height="6" style="fill:var(--hatch)"/>'
  "</pattern></defs></svg>"
)


def _bubbles(
  spans: Sequence[Span],
  frame: Frame,
  start: float,
  end: float,
  row: tuple[float, float],
) -> list[str]:
  """The stretches of a lane in which nothing runs."""
  busy = merge((max(s.start, start), min(s.end, end)) for s in spans)
  edges = [start, *(t for pair in busy for t in pair), end]
  return [
    f'<rect fill="url(#bubble)" x="{frame.x(a - start):.2f}" y="{row[0]:.1f}" '
    f'width="{frame.x(b) - frame.x(a):.2f}" height="{row[1]}">'
    f"<title>idle {number(b - a)} s</title></rect>"
    for a, b in zip(edges[::2], edges[1::2])
    if b > a
  ]


def _unit(
  span: Span, frame: Frame, window: tuple[float, float], height: float
) -> str:
  start, end = window
  x = frame.x(max(span.start, start) - start)
  width = max(frame.x(min(span.end, end) - start) - x, 0.75)
  about = " · ".join(
    f"{name} {value}" for name, value in span.args.items() if value is not None
  )
  text = ""
  if width > 22 and height > 16 and span.name in ("generate", "train"):
    text = (
      f'<text class="unit" x="{x + width / 2:.1f}" '
      f'y="{frame.top + height / 2 + 4:.1f}">{span.args.get("group", "")}</text>'
    )
  return (
    f'<rect class="bar" style="fill:var(--{escape(span.name)})" '
    f'x="{x:.2f}" y="{frame.top:.1f}" width="{width:.2f}" '
    f'height="{height:.1f}" rx="1.5"><title>{escape(span.name)} · '
    f"{number(span.end - span.start)} s\n{escape(about)}</title></rect>{text}"
  )
