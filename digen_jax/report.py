"""`report.html`: a run on one page that loads nothing from elsewhere.

It is made from the files of a run, and from as many of them as there are: a
run that has only begun, or was made without pictures, has a report as well.
"""

import base64
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from digen_jax.errors import UserError
from digen_jax.metrics import format_seconds
from digen_jax.page import legend, page, picker, section, wide
from digen_jax.run_record import (
  RunRecord,
  column,
  curve,
  is_number,
  load_run,
  smooth,
  splits,
)
from digen_jax.svg import Series, lanes_chart, line_chart, number
from digen_jax.timeline import (
  lane_accounting,
  merge,
  write_text,
)

SHOWN_STEPS = 8  # of the timeline
SHOWN_SPANS = 6000
SHOWN_IMAGES = 8  # of a series of sample grids
IMAGE_BYTES = 1 << 20  # a larger picture is embedded smaller, as JPEG
PANELS = (
  ("ratio_max_abs_log", "Largest |log ratio|, first update"),
  ("clip_fraction", "Clipped fraction"),
  ("kl", "KL to the reference"),
  ("grad_norm", "Gradient norm"),
  ("reward_std", "Reward standard deviation"),
  ("step_seconds", "Seconds per step"),
)


def write_report(workdir: str | Path) -> Path:
  """Writes `report.html` into the directory of a run, and returns its path.

  Raises:
    UserError: there is no such directory.
  """
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise UserError(
      f"no run in {workdir}: there is no such directory; name the --workdir of "
      "a run"
    )
  path = workdir / "report.html"
  write_text(path, render(load_run(workdir)))
  return path


def render(run: RunRecord) -> str:
  """The page."""
  sections = (
    ("Reward by step", _rewards(run)),
    ("Samples", _samples(run)),
    ("Lanes", _lanes(run)),
    ("Training", _panels(run)),
    ("Configuration", _config(run.config)),
  )
  body = "".join(section(title, content) for title, content in sections)
  if run.unreadable:
    body += f'<p class="note">Could not read {", ".join(run.unreadable)}.</p>'
  return page(run.name, f"{_header(run)}{_figures(run)}{body}")


def _header(run: RunRecord) -> str:
  config = run.config.get("config", run.config)
  total, done = config.get("steps"), run.rows[-1]["step"] + 1 if run.rows else 0
  facts = [f"step {done:,}" + (f" of {total:,}" if total else "")]
  if checkpoint := config.get("checkpoint"):
    facts.append(Path(str(checkpoint)).name)
  facts += [
    str(config[section][name])
    for section, name in (("sampling", "kernel"), ("pipeline", "mode"))
    if name in config.get(section, {})
  ]
  meshes = run.config.get("meshes", {})
  facts += [
    f"{lane}: {math.prod(meshes.get(lane, {}).values())} × {kind}"
    for lane, kind in run.config.get("devices", {}).items()
  ]
  return (
    f"<header><h1>{escape(run.name)}</h1>"
    f"<p>{escape(' · '.join(facts))}</p></header>"
  )


def _figures(run: RunRecord) -> str:
  """Key figures, as cards."""
  cards = []
  for split, points in splits(run).items():
    name = f"{split} reward".capitalize()
    cards.append(_change_card(name, [y for _, y in points]))
  rewards = column(run.rows, "reward_mean")
  if rewards:
    few = max(1, min(10, len(rewards) // 4))
    ends = [rewards[:few], rewards[-few:]][: len(rewards)]
    means = [statistics.fmean(y for _, y in part) for part in ends]
    cards.append(_change_card("Training reward", means))
  if seconds := [y for _, y in column(run.rows, "step_seconds")]:
    samples = sum(y for _, y in column(run.rows, "samples"))
    cards += [
      ("Seconds per step", number(statistics.median(seconds)), "median"),
      (
        "Samples",
        f"{samples:,}",
        f"{number(samples / sum(seconds))} per second",
      ),
      (
        "Time in steps",
        format_seconds(sum(seconds)),
        f"{len(seconds):,} step{'s' * (len(seconds) > 1)}",
      ),
    ]
  if ratios := column(run.rows, "ratio_max_abs_log"):
    worst = max(y for _, y in ratios)
    cards.append(("Largest |log ratio|", number(worst), "first updates"))
  return (
    '<div class="cards">'
    + "".join(
      f'<div class="card"><span>{escape(name)}</span><b>{value}</b>'
      f"<small>{about}</small></div>"
      for name, value, about in cards
    )
    + "</div>"
  )


def _change_card(name: str, values: Sequence[Any]) -> tuple[str, str, str]:
  values = [v for v in values if v is not None]
  if not values:
    return name, "–", "not measured"
  if len(values) == 1:
    return name, f"{values[0]:.3f}", "measured once"
  change = values[-1] - values[0]
  kind = "up" if change >= 0 else "down"
  return (
    name,
    f"{values[-1]:.3f}",
    f'from {values[0]:.3f} <em class="{kind}">{change:+.3f}</em>',
  )


def _rewards(run: RunRecord) -> str:
  """Training and held-out reward against steps."""
  train = curve(run.rows, "reward_mean")
  series = []
  if len(train) >= 8:
    series = [
      Series("this step", "var(--train-curve)", train, faint=True),
      Series("training, smoothed", "var(--train-curve)", smooth(train)),
    ]
  elif train:
    series = [Series("training", "var(--train-curve)", train, marked=True)]
  colors = ("var(--eval-curve)", "var(--update)", "var(--publish)")
  for i, (split, points) in enumerate(splits(run).items()):
    label = f"{split}, fixed noise"
    series.append(
      Series(label, colors[i % len(colors)], points, marked=len(points) < 60)
    )
  chart = line_chart(series, 1080, 350)
  if not chart:
    return '<p class="note">No step has finished yet.</p>'
  return legend([(s.label, s.color) for s in series if not s.faint]) + wide(
    chart
  )


def _samples(run: RunRecord) -> str:
  """First and last picture of every series, the ones between to choose."""
  parts = []
  for name, found in sorted(
    run.images.items(), key=lambda item: item[0] != "step"
  ):
    shown = _spread(found, SHOWN_IMAGES)
    if name == "step" and len(shown) > 1:
      first = _figure(shown[0], "Before")
      later = [(f"step {s}", _figure((s, p), "After")) for s, p in shown[1:]]
      parts.append(f'<div class="pair">{first}{picker(later)}</div>')
    elif name == "step":
      parts.append(_figure(shown[0], "Fixed prompts and noise"))
    else:
      title = {"groups": "Best and worst of each group"}.get(name, name)
      panels = [(f"step {s}", _figure((s, p), "Samples")) for s, p in shown]
      parts.append(
        f"<details><summary>{escape(title)}</summary>{picker(panels)}</details>"
      )
  return "".join(parts)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
  """At most `most` items, evenly spread, with the first and the last."""
  if len(items) <= most:
    return list(items)
  return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _figure(image: tuple[int, Path], title: str) -> str:
  step, path = image
  caption = f"{title}, step {step}"
  return (
    f"<figure><figcaption>{escape(caption)}</figcaption>"
    f'<img alt="{escape(caption)}" src="{_data_url(path)}"></figure>'
  )


def _data_url(path: Path) -> str:
  data, kind = path.read_bytes(), "png"
  if len(data) > IMAGE_BYTES:
    buffer = io.BytesIO()
    with Image.open(path) as image:
      image = image.convert("RGB")
      image.thumbnail((1600, 4000))
      image.save(buffer, format="JPEG", quality=85)
    data, kind = buffer.getvalue(), "jpeg"
  return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _lanes(run: RunRecord) -> str:
  """Where the time went: shares per lane, and the last steps unit by unit."""
  shares = _shares(run)
  if not shares:
    return ""
  bars = "".join(
    f'<div class="share"><b>{escape(lane)}</b><span>'
    + "".join(
      f'<i class="{kind}" style="width:{100 * part:.2f}%" '
      f'title="{kind} {part:.1%}"></i>'
      for kind, part in parts.items()
    )
    + f"</span><small>{_busy(run, lane, parts['busy'])}</small></div>"
    for lane, parts in shares.items()
  )
  if not run.spans:
    return bars
  names = list(dict.fromkeys(span.name for span in run.spans))
  colors = legend(
    [(name, f"var(--{name})") for name in names] + [("idle", "var(--hatch)")]
  )
  return bars + colors + picker(_timelines(run))


def _busy(run: RunRecord, lane: str, share: float) -> str:
  """Busy share of a lane, and its FLOP/s where the metrics have them."""
  text = f"{share:.0%} busy"
  rates, parts = (
    [x for r in run.rows if is_number(x := (r.get(name) or {}).get(lane))]
    for name in ("tflops_per_second", "mfu")
  )
  if rates:
    text += f"<br>{number(statistics.median(rates))} TFLOP/s a device"
  if parts:
    text += f" · MFU {statistics.median(parts):.1%}"
  return text


def _shares(run: RunRecord) -> dict[str, dict[str, float]]:
  """Fractions of the wall time of all kept steps, by lane."""
  if not run.spans:
    lanes: dict[str, list[float]] = {}
    for row in run.rows:
      for lane, value in (row.get("busy_fraction") or {}).items():
        lanes.setdefault(lane, []).append(value or 0.0)
    means = {lane: statistics.fmean(values) for lane, values in lanes.items()}
    return {n: {"busy": m, "idle": 1 - m} for n, m in means.items()}
  lanes = dict.fromkeys(span.lane for span in run.spans)
  shares = {lane: dict.fromkeys(KINDS, 0.0) for lane in lanes}
  # Between steps (evaluation, checkpoints) no lane has work: not idle time.
  windows = merge(_extents(run).values())
  wall = sum(end - start for start, end in windows)
  for start, end in windows:
    for lane, parts in lane_accounting(run.spans, lanes, start, end).items():
      for kind in KINDS:
        shares[lane][kind] += getattr(parts, kind) / wall
  return shares


KINDS = ("busy", "switch", "sync", "idle")


def _extents(run: RunRecord) -> dict[int, tuple[float, float]]:
  """(start, end) of every step.

  Stale units began in the step before, and an evaluation may lie between: how
  long the step took is in its metrics.
  """
  extents: dict[int, tuple[float, float]] = {}
  for span in run.spans:
    step = span.args["step"]
    if span.args.get("version", step) == step:
      low, high = extents.get(step, (span.start, span.end))
      extents[step] = min(low, span.start), max(high, span.end)
  for step, seconds in column(run.rows, "step_seconds"):
    if step in extents:
      low, high = extents[step]
      extents[step] = min(low, high - seconds), high
  return dict(sorted(extents.items()))


def _timelines(run: RunRecord) -> list[tuple[str, str]]:
  """A panel for each of the last steps, on one time scale."""
  spans, extents = run.spans, list(_extents(run).items())
  most = max(1, SHOWN_SPANS * len(extents) // max(len(spans), 1))
  extents = extents[-SHOWN_STEPS:]
  extents = extents[-most:]
  seconds = max(end - start for _, (start, end) in extents)
  panels = []
  for step, (start, end) in extents:
    near = [s for s in spans if s.start < end and s.end > start]
    chart = lanes_chart(near, start, end, 1080, scale=seconds)
    panels.append((f"step {step} · {number(end - start)} s", wide(chart)))
  return panels


def _panels(run: RunRecord) -> str:
  """Small charts of how training goes."""
  parts = []
  for name, title in PANELS:
    points = curve(run.rows, name)
    series = [Series("measured", "var(--train-curve)", points)]
    if name == "step_seconds":
      predicted = curve(run.rows, "predicted_step_seconds")
      series.append(Series("predicted", "var(--eval-curve)", predicted))
      title += " (in red: predicted)"
    if chart := line_chart(series, 350, 170, zero=True):
      parts.append(
        f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"
      )
  return f'<div class="multiples">{"".join(parts)}</div>' if parts else ""


def _config(config: Mapping[str, Any]) -> str:
  if not config:
    return ""
  rows = "".join(
    f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
    for name, value in _leaves(config, "")
  )
  return (
    "<details><summary>Every setting, library and device</summary>"
    f"<table>{rows}</table></details>"
  )


def _leaves(value: Any, prefix: str) -> list[tuple[str, str]]:
  if isinstance(value, Mapping) and value:
    return [
      leaf
      for name, item in value.items()
      for leaf in _leaves(item, f"{prefix}.{name}" if prefix else str(name))
    ]
  return [(prefix, value if isinstance(value, str) else json.dumps(value))]
