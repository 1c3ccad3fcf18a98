"""The files of a run, read back for a report."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from digen_jax.metrics import read_metrics
from digen_jax.timeline import Span, read_trace

POINTS = 400  # more steps than this are averaged before they are drawn
Curve = list[tuple[float, float | None]]


@dataclasses.dataclass(frozen=True)
class RunRecord:
  """What is in the directory of a run.

  Attributes:
    name: of the directory.
    config: content of config.json.
    rows: of metrics.jsonl.
    evaluations: of evaluation.json: {"step", "reward_mean", "split"}.
    spans: of timeline.json.
    images: series name -> (step, path) of samples/NAME_STEP.png, in order.
    unreadable: names of files that could not be read.
  """

  name: str
  config: Mapping[str, Any]
  rows: Sequence[Mapping[str, Any]]
  evaluations: Sequence[Mapping[str, Any]]
  spans: Sequence[Span]
  images: Mapping[str, Sequence[tuple[int, Path]]]
  unreadable: Sequence[str]


def load_run(workdir: Path) -> RunRecord:
  """Reads the files of a run; those that are missing count as empty."""
  unreadable = []

  def read(name: str, empty: Any) -> Any:
    path = workdir / name
    try:
      return json.loads(path.read_text("utf-8")) if path.exists() else empty
    except ValueError:
      unreadable.append(name)
      return empty

  try:
    spans = read_trace(workdir / "timeline.json")
  except (ValueError, KeyError):
    spans = []
    unreadable.append("timeline.json")
  evaluations = [row for row in read("evaluation.json", []) if "step" in row]
  images: dict[str, list[tuple[int, Path]]] = {}
  for path in sorted((workdir / "samples").glob("*.png")):
    if match := re.fullmatch(r"(.+?)_?(\d+)", path.stem):
      images.setdefault(match[1], []).append((int(match[2]), path))
  return RunRecord(
    name=workdir.absolute().name,
    config=read("config.json", {}),
    rows=read_metrics(workdir / "metrics.jsonl"),
    evaluations=sorted(evaluations, key=lambda row: row["step"]),
    spans=spans,
    images={name: sorted(found) for name, found in images.items()},
    unreadable=unreadable,
  )


def splits(run: RunRecord) -> dict[str, Curve]:
  """(step, reward) of the evaluations, by what they were made on.

  Where a run went on with another reward or other prompts a curve ends, and
  one with a number begins.
  """
  found: dict[str, Curve] = {}
  settings: dict[str, list[Any]] = {}
  for row in run.evaluations:
    split = str(row.get("split", "held-out")).replace("_", "-")
    value = row.get("reward_mean")
    point = (row["step"], value if is_number(value) else None)
    known = settings.setdefault(split, [])
    if row.get("setting") not in known:
      known.append(row.get("setting"))
    number = known.index(row.get("setting")) + 1
    name = split if number == 1 else f"{split} ({number})"
    found.setdefault(name, []).append(point)
  return found


def column(
  rows: Sequence[Mapping[str, Any]], name: str
) -> list[tuple[float, float]]:
  """(step, value) of the rows that have a number there."""
  return [(r["step"], r[name]) for r in rows if is_number(r.get(name))]


def is_number(value: Any) -> bool:
  """Whether `value` is a finite number."""
  return (
    isinstance(value, (int, float))
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def curve(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
  """(step, value or None); long runs averaged to `POINTS` stretches."""
  points = [
    (r["step"], r[name] if is_number(r.get(name)) else None) for r in rows
  ]
  size = -(-len(points) // POINTS) or 1
  thin = []
  for i in range(0, len(points), size):
    known = [y for _, y in points[i : i + size] if y is not None]
    thin.append((points[i][0], statistics.fmean(known) if known else None))
  return thin


def smooth(points: Curve) -> Curve:
  """Centred moving average over about a tenth of the points."""
  half = max(1, len(points) // 20)
  averaged = []
  for i, (x, _) in enumerate(points):
    near = [
      y for _, y in points[max(0, i - half) : i + half + 1] if y is not None
    ]
    averaged.append((x, statistics.fmean(near) if near else None))
  return averaged
