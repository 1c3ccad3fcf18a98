"""What ran where and when: spans, their accounting, and `timeline.json`.

The file is a Chrome trace (it opens in Perfetto and chrome://tracing): one "X"
event per unit of work, one process per lane. It is bounded: only the last
steps are kept, and `otherData` in the file says how many.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from digen_jax.atomic import write_text

NAMES = ("generate", "score", "train", "update", "publish", "switch")
KEEP_STEPS = 64
MICRO = 1e6
RESOLUTION = 1e-6  # seconds; the file is rounded to less than that


@dataclasses.dataclass(frozen=True)
class Span:
  """A unit of work that ran on a lane.

  Attributes:
    name: one of `NAMES`.
    lane: where it ran, e.g. "rollout".
    start: seconds, on the clock of the run.
    end: seconds.
    args: {"step", "group", "unit", "version"} and possibly more.
  """

  name: str
  lane: str
  start: float
  end: float
  args: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Accounting:
  """Where the time of a lane went, seconds; the four add up to the wall time.

  Attributes:
    busy: generating, scoring, training, updating.
    idle: the bubbles.
    switch: changing layout between roles.
    sync: publishing weights.
  """

  busy: float
  idle: float
  switch: float
  sync: float


def lane_accounting(
  spans: Iterable[Span], lanes: Iterable[str], start: float, end: float
) -> dict[str, Accounting]:
  """Splits the wall time of every lane.

  Spans that overlap on a lane count once: as busy before switch before sync.
  What lies outside of [start, end] does not count.

  Args:
    spans: what ran, in any order.
    lanes: names of the lanes to account for; one without spans is idle.
    start: beginning of the wall time, seconds.
    end: its end.
  """
  spans = list(spans)
  return {
    lane: _account([s for s in spans if s.lane == lane], start, end)
    for lane in lanes
  }


def _account(spans: list[Span], start: float, end: float) -> Accounting:
  kinds = {"publish": "sync", "switch": "switch"}
  covered: list[tuple[float, float]] = []
  seconds, before = {}, 0.0
  for kind in ("busy", "switch", "sync"):
    covered += [
      (max(s.start, start), min(s.end, end))
      for s in spans
      if kinds.get(s.name, "busy") == kind
    ]
    total = sum(b - a for a, b in merge(covered))
    seconds[kind], before = total - before, total
  return Accounting(idle=max(end - start - before, 0.0), **seconds)


def merge(
  intervals: Iterable[tuple[float, float]],
) -> list[tuple[float, float]]:
  """The union of intervals, as disjoint ones in order; empty ones are left out."""
  merged: list[tuple[float, float]] = []
  for a, b in sorted(intervals):
    if b <= a:
      continue
    if merged and a <= merged[-1][1]:
      merged[-1] = (merged[-1][0], max(merged[-1][1], b))
    else:
      merged.append((a, b))
  return merged


def slots(spans: Sequence[Span]) -> list[int]:
  """For each span the lowest row on which nothing else of its lane runs then.

  A lane that does one thing at a time has all its spans on row 0.
  """
  rows = [0] * len(spans)
  free: dict[str, list[float]] = {}
  for i in sorted(range(len(spans)), key=lambda i: spans[i].start):
    ends = free.setdefault(spans[i].lane, [])
    begin = spans[i].start + RESOLUTION
    row = next((r for r, end in enumerate(ends) if end <= begin), len(ends))
    ends[row:] = [spans[i].end, *ends[row + 1 :]]
    rows[i] = row
  return rows


def write_trace(
  path: str | Path, spans: Iterable[Span], *, keep_steps: int = KEEP_STEPS
) -> None:
  """Writes `timeline.json`; a reader sees the old file or the new one.

  Args:
    path: the file.
    spans: what ran.
    keep_steps: only the spans of this many last steps are written.
  """
  spans = last_steps(spans, keep_steps)
  lanes = list(dict.fromkeys(span.lane for span in spans))
  pids = {lane: pid for pid, lane in enumerate(lanes)}
  events: list[dict[str, Any]] = [
    {"ph": "M", "name": name, "pid": pid, "tid": 0, "args": args}
    for lane, pid in pids.items()
    for name, args in (
      ("process_name", {"name": lane}),
      ("process_sort_index", {"sort_index": pid}),
    )
  ]
  events += [
    {
      "ph": "X",
      "name": span.name,
      "cat": span.name,
      "pid": pids[span.lane],
      "tid": row,
      "ts": round(span.start * MICRO, 3),
      "dur": round((span.end - span.start) * MICRO, 3),
      "args": dict(span.args),
    }
    for span, row in zip(spans, slots(spans))
  ]
  trace = {
    "traceEvents": events,
    "displayTimeUnit": "ms",
    "otherData": {"steps_kept": f"the last {keep_steps}, earlier ones dropped"},
  }
  write_text(path, json.dumps(trace, separators=(",", ":")))


def read_trace(path: str | Path, before_step: int | None = None) -> list[Span]:
  """Reads back what `write_trace` wrote.

  Args:
    path: the file; one that does not exist holds no spans.
    before_step: leave out the spans of this step and later ones, which a run
      that resumes at this step does again.
  """
  path = Path(path)
  if not path.exists():
    return []
  events = json.loads(path.read_text("utf-8"))["traceEvents"]
  lanes = {
    event["pid"]: event["args"]["name"]
    for event in events
    if event["ph"] == "M" and event["name"] == "process_name"
  }
  spans = [
    Span(
      event["name"],
      lanes[event["pid"]],
      event["ts"] / MICRO,
      (event["ts"] + event["dur"]) / MICRO,
      event["args"],
    )
    for event in events
    if event["ph"] == "X"
  ]
  if before_step is None:
    return spans
  return [span for span in spans if span.args["step"] < before_step]


def last_steps(spans: Iterable[Span], count: int) -> list[Span]:
  """The spans of the `count` highest steps, in the order given."""
  spans = list(spans)
  steps = sorted({span.args["step"] for span in spans})[-count:]
  return [s for s in spans if steps and s.args["step"] >= steps[0]]


class Timeline:
  """The growing `timeline.json` of a run, across its resumptions.

  The clock of the file begins at 0 with the first step and goes on, after a
  resumption, where the last kept step ended.
  """

  def __init__(
    self,
    path: str | Path,
    step: int = 0,
    *,
    keep_steps: int = KEEP_STEPS,
  ):
    """Takes over what an earlier process wrote about the steps before `step`.

    Args:
      path: the file.
      step: the first step that will be added.
      keep_steps: how many last steps the file holds.
    """
    self._path, self._keep = Path(path), keep_steps
    self.spans = read_trace(path, step)
    self._shift: float | None = None
    self._next_write = 0.0

  def add(self, spans: Sequence[Span]) -> None:
    """Appends the spans of a step, whose clock may have any origin.

    The file is rewritten, but not so often as to take more than a twentieth of
    the time; `flush` writes what is missing.
    """
    if not spans:
      return
    if self._shift is None:
      ended = max((span.end for span in self.spans), default=0.0)
      self._shift = ended - min(span.start for span in spans)
    moved = [
      dataclasses.replace(
        span, start=span.start + self._shift, end=span.end + self._shift
      )
      for span in spans
    ]
    self.spans = last_steps([*self.spans, *moved], self._keep)
    began = time.monotonic()
    if began >= self._next_write:
      self.flush()
      ended = time.monotonic()
      self._next_write = ended + 19 * (ended - began)

  def flush(self) -> None:
    """Writes the file."""
    write_trace(self._path, self.spans, keep_steps=self._keep)
