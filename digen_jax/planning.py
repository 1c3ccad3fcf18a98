"""What a run would take, before it runs: a config and costs in, a plan out."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from digen_jax import auto_split
from digen_jax.atomic import write_text
from digen_jax.config import Config
from digen_jax.device_costs import GIB
from digen_jax.errors import UserError
from digen_jax.ladder import NAMES, ladder_chart, ladder_rows, ladder_text
from digen_jax.ladder import timeline_panels as panels
from digen_jax.metrics import format_seconds
from digen_jax.page import page, section
from digen_jax.parallel.mesh import lane_sizes, row_devices
from digen_jax.pipeline.cost_table import CostTable, RoleCosts, write_table
from digen_jax.pipeline.planner import (
  RUNGS,
  Prediction,
  Split,
  Techniques,
  equal_split,
  ladder,
  predict,
  why_not,
)
from digen_jax.pipeline.splits import best_splits
from digen_jax.pipeline.units import Workload
from digen_jax.plan_basis import ROLES, Basis, row_axes
from digen_jax.svg import number
from digen_jax.throughput import TERA
from digen_jax.timeline import write_trace


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `launch/plan.py` prints and writes.

  Attributes:
    basis: what it rests on.
    work: what a step consists of.
    devices: how many.
    split: of the config.
    configured: the step of the config as it is; None if it cannot be.
    rungs: the ladder on the config's split and unit sizes, without what
      cannot be.
    unfit: why, a line by name of the rung, or "configured".
    best: the ladder where each rung has the split that serves it best.
    steps: global steps of the run.
    price: of a device for an hour; 0 if it is not known.
  """

  basis: Basis
  work: Workload
  devices: int
  split: Split
  configured: Prediction | None
  rungs: Mapping[str, Prediction]
  unfit: Mapping[str, str]
  best: Mapping[str, Prediction]
  steps: int
  price: float = 0.0

  @property
  def assumed(self) -> tuple[str, ...]:
    """What the costs rest on, a line each."""
    table = self.basis.table
    one_size = () if table.resize else (ONE_SIZE,)
    return (*(self.basis.assumed or (table.source,)), *one_size)

  @property
  def fastest(self) -> str:
    """The rung that is predicted to be the fastest."""
    return min(self.best, key=lambda rung: self.best[rung].step_seconds)

  @property
  def tflop(self) -> dict[str, float]:
    """Of a step by kind, TFLOP; empty where it is not known."""
    flops, samples = self.basis.flops, self.work.samples
    if flops is None:
      return {}
    return {
      "generate": samples * flops.sample / TERA,
      "train": samples * self.work.window * flops.transition / TERA,
    }

  def mfu(self, prediction: Prediction) -> float | None:
    """Part of the devices' peak that a step reaches; None if not known."""
    split, peaks = prediction.split, self.basis.peaks
    if not self.tflop or not peaks:
      return None
    peak = split.rollout * peaks["rollout"] + split.trainer * peaks["trainer"]
    return sum(self.tflop.values()) / prediction.step_seconds / peak


MOSTLY = 0.9  # part of a step that the rewards take where they hold it up
ONE_SIZE = (
  "units of one size were measured: they keep it, and their seconds are taken "
  "to grow with the rows of a device"
)


def configured_split(config: Config, work: Workload, devices: int) -> Split:
  """The split that a config asks for; "auto" is what the other role leaves.

  Raises:
    UserError: more devices than there are, or no number of them.
  """
  axes = lane_sizes(config.mesh.rollout, config.mesh.trainer, devices)
  sizes = {name: math.prod(shape.values()) for name, shape in axes.items()}
  trainer = sizes.pop("trainer")
  rollouts = tuple(sizes.values())
  rollout = sum(rollouts)
  if rollout + trainer > devices:
    raise UserError(
      f"config.mesh asks for {rollout} + {trainer} devices, but the plan is "
      f"for {devices}: raise --devices, or leave config.mesh at 'auto'"
    )
  return dataclasses.replace(
    equal_split(work, devices),
    rollout=rollout,
    trainer=trainer,
    rollout_lanes=len(rollouts),
    uneven=rollouts if len(set(rollouts)) > 1 else (),
  )


# The plan


def make_plan(
  config: Config,
  work: Workload,
  basis: Basis,
  devices: int,
  *,
  most_lanes: int = 1,
  price: float = 0.0,
) -> Plan:
  """Predicts the config as it is, the ladder, and the best splits.

  Args:
    config: the run.
    work: its `assemble.workload`.
    basis: what units cost.
    devices: how many.
    most_lanes: rollout lanes that the devices may be divided among.
    price: of a device for an hour.

  Raises:
    UserError: the devices are fewer than the config asks for, nothing fits
      on them, or rollout lanes share a row in several ways.
  """
  table = basis.table
  row_axes(config, "rollout")  # raises where lanes differ in them
  if not config.pipeline.tsp:  # rungs that have it fold all trained steps
    work = dataclasses.replace(work, pack=work.window)
  split = configured_split(config, work, devices)
  if auto_split.wanted(config, devices) and not basis.apart:
    choice = auto_split.compare(table, work, config.pipeline, devices)
    split = dataclasses.replace(
      split,
      rollout=choice.best.split.rollout,
      trainer=choice.best.split.trainer,
    )
  techniques, rungs = _rungs(config, devices)
  own, unfit = {}, {}
  for name, rung in {**rungs, "configured": techniques}.items():
    own[name] = _packed(config, table, work, split, rung)
    reason = _axes_too_small(config, basis)
    if reason := reason or why_not(table, work, own[name], rung):
      unfit[name] = reason
  fits = {name: rung for name, rung in rungs.items() if name not in unfit}
  splits = best_splits(
    table,
    work,
    devices,
    rungs,
    rollout=split.rollout if basis.apart else 0,
    most_lanes=max(most_lanes, split.rollout_lanes),
    also=(split,) if split.uneven else (),
  )
  return Plan(
    basis=basis,
    work=work,
    devices=devices,
    split=split,
    configured=None
    if "configured" in unfit
    else predict(table, work, own["configured"], techniques),
    rungs=ladder(table, work, own, fits) if fits else {},
    unfit=unfit,
    best=ladder(table, work, splits, {n: rungs[n] for n in splits}),
    steps=config.steps,
    price=price,
  )


def _rungs(
  config: Config, devices: int
) -> tuple[Techniques, dict[str, Techniques]]:
  """What the config switches on, and the rungs of the ladder."""
  techniques = auto_split.techniques_of(config.pipeline)
  slots = config.pipeline.reward_slots
  rungs = {
    name: dataclasses.replace(rung, reward_slots=slots)
    for name, rung in RUNGS.items()
  }
  if devices > 1:
    return techniques, rungs
  alone = dataclasses.replace(techniques, colocated=True)
  return alone, {"colocated": rungs["colocated"]}


def _axes_too_small(config: Config, basis: Basis) -> str:
  """Why devices of the config's own axes hold no row; "" if they do."""
  for role in ROLES if basis.memory else ():
    axes, costs = row_axes(config, role), basis.table.role(role)
    if axes and (own := row_devices(axes)) < costs.shards:
      tensor = costs.shards // costs.sequence
      return (
        f"does not fit: a row of config.mesh.{role} is shared by {own} devices, "
        f"and {costs.shards} are needed: give it a tensor axis of {tensor}"
      )
  return ""


def _packed(
  config: Config,
  table: CostTable,
  work: Workload,
  split: Split,
  techniques: Techniques,
) -> Split:
  """The split with packs as `training.Run` cuts them: to what fits."""
  if config.pipeline.timesteps_per_pack or not techniques.tsp:
    return split
  packs = [n for n in range(split.pack, 0, -1) if work.window % n == 0]
  cuts = [dataclasses.replace(split, pack=pack) for pack in packs]
  fit = (c for c in cuts if not why_not(table, work, c, techniques))
  return next(fit, cuts[-1])


def plan_text(plan: Plan) -> str:
  """A plan for a terminal."""
  work, configured = plan.work, plan.configured
  best = plan.best[plan.fastest]
  left_out = [
    f"{NAMES.get(name, name)}: {reason}"
    for name, reason in plan.unfit.items()
    if name != "configured"
  ]
  ladders = [_text(plan.rungs)] if plan.rungs else []
  parts = [
    f"{plan.devices:,} devices; {work.samples:,} samples a step "
    f"({work.groups:,} prompts × {work.group_size}), {work.window} steps of "
    "each trained",
    "costs:\n" + "\n".join(f"  {line}" for line in plan.assumed),
    *_memory(plan),
    *_flops_text(plan),
    "as configured: "
    + (_describe(plan, configured) if configured else plan.unfit["configured"]),
    "ladder, split and unit sizes of the config:\n"
    + "\n".join([*ladders, *left_out]),
    "ladder, each rung with the split that serves it best:\n"
    + "\n".join([_text(plan.best), *_nowhere(plan)]),
    f"best: {plan.fastest}, {_describe(plan, best)}\n  "
    + as_flags(best.split, best.techniques, plan.basis.table),
  ]
  return "\n\n".join(parts)


def _nowhere(plan: Plan) -> list[str]:
  """Rungs that fit on no split."""
  return [
    f"{NAMES.get(name, name)}: does not fit, whatever the split"
    for name in {**plan.rungs, **plan.unfit}
    if name != "configured" and name not in plan.best
  ]


def _memory(plan: Plan) -> list[str]:
  """What devices hold on the config's split, where that is known, GiB."""
  split, lines = plan.split, []
  lanes = {"rollout": min(split.rollouts), "trainer": split.trainer}
  lanes["colocated"] = split.devices
  for role, held in plan.basis.memory.items():
    devices = max(lanes[role], held.shards)
    room = plan.basis.table.role(role).room(devices)
    parts = {
      "weights": held.weights,
      "gradient of a layer": held.gradient,
      "reference": held.reference,
      "in parts": held.state / devices,
    }
    shown = ", ".join(f"{n} {x / GIB:.1f}" for n, x in parts.items() if x)
    shared = f", {held.shards} to a row" if held.shards > 1 else ""
    lines.append(
      f"  {role} ({devices} devices{shared}): {shown}, activations of a row "
      f"{held.row / GIB:.1f}; of {held.usable / GIB:.1f}; a Train unit may "
      f"have {room:,.0f} rows"
    )
  return ["memory of a device, GiB:\n" + "\n".join(lines)] if lines else []


def _flops_text(plan: Plan) -> list[str]:
  """What a step computes, where that is known."""
  if not plan.tflop:
    return []
  factor, unit = (1e3, "PFLOP") if plan.tflop["train"] > 1e4 else (1, "TFLOP")
  generate, train = (number(x / factor) for x in plan.tflop.values())
  return [
    f"FLOPs of a step: {generate} {unit} generating, {train} {unit} training "
    "(no padding, nothing computed twice)"
  ]


def _text(rungs: Mapping[str, Prediction]) -> str:
  return ladder_text(*_ladder(rungs))


def _ladder(rungs: Mapping[str, Prediction]) -> tuple[dict[str, float], float]:
  seconds = {name: p.step_seconds for name, p in rungs.items()}
  return seconds, next(iter(rungs.values())).bound_seconds


def _describe(plan: Plan, prediction: Prediction) -> str:
  """Lanes, seconds, busy parts, and what the whole run takes."""
  split, whole = prediction.split, plan.steps * prediction.step_seconds
  if prediction.techniques.colocated:
    lanes = f"{split.devices} devices for both roles"
  else:
    lanes = f"{split.rollout} devices generate, {split.trainer} train"
    if split.uneven:
      lanes += f" (rollout lanes of {', '.join(map(str, split.uneven))})"
    elif split.rollout_lanes > 1:
      lanes += f" ({split.rollout_lanes} rollout lanes)"
  busy = prediction.busy
  low, high = min(busy.values()), max(busy.values())
  shown = ", ".join(f"{name} {part:.0%}" for name, part in busy.items())
  if len(busy) > 4:
    shown = f"{len(busy)} lanes, {low:.0%} to {high:.0%}"
  mfu = plan.mfu(prediction)
  text = (
    f"{number(prediction.step_seconds)} s a step ({lanes}; busy: {shown}"
    + (f"; MFU {mfu:.1%}" if mfu is not None else "")
    + f"); {format_seconds(whole)} for {plan.steps:,} steps"
  )
  if plan.price:
    cost = whole / 3600 * plan.devices * plan.price
    text += f", {number(cost)} at {plan.price:g} a device hour"
  scoring = prediction.scoring_seconds
  slots = prediction.techniques.reward_slots
  units = -(-plan.work.samples // split.generate_size)
  if scoring > MOSTLY * prediction.step_seconds and units > slots:
    text += (
      f"; the rewards alone take {number(scoring)} s of a step: more "
      f"config.pipeline.reward_slots than {slots} would shorten it"
    )
  return text


def as_flags(split: Split, techniques: Techniques, table: CostTable) -> str:
  """Flags of `launch/train.py` that ask for a split and its techniques."""
  trainer = "colocated" if techniques.colocated else "trainer"
  counts = [split.rollout] if techniques.colocated else split.rollouts
  rollouts = [_mesh(count, "data", table.rollout) for count in counts]
  meshes = {
    "rollout": f"[{','.join(rollouts)}]" if len(rollouts) > 1 else rollouts[0],
    "trainer": _mesh(split.trainer, "fsdp", table.role(trainer)),
  }
  mode = "colocated" if techniques.colocated else "disaggregated"
  values = {
    "pipeline.mode": mode,
    "pipeline.gap": techniques.gap,
    "pipeline.tsp": techniques.tsp,
    "pipeline.tag": techniques.tag,
    "pipeline.rat": techniques.rat,
    "pipeline.bts": techniques.bts,
    "pipeline.tcss": techniques.tcss,
    **{f"mesh.{role}": _quoted(mesh) for role, mesh in meshes.items()},
    "pipeline.generate_size": split.generate_size,
    "pipeline.train_size": split.train_size,
    "pipeline.timesteps_per_pack": split.pack,
  }
  return " ".join(f"--config.{name}={value}" for name, value in values.items())


def _mesh(devices: int, axis: str, costs: RoleCosts) -> str:
  """Of a lane, as a flag has it."""
  if not devices:  # of one in all, which does everything
    return "auto"
  if costs.shards == 1:
    return str(devices)
  axes = {
    axis: devices // costs.shards,
    "sequence": costs.sequence,
    "tensor": costs.shards // costs.sequence,
  }
  shown = (f"'{n}':{size}" for n, size in axes.items() if size > 1 or n == axis)
  return f"{{{','.join(shown)}}}"


def _quoted(flag: str) -> str:
  """As a shell takes it."""
  return flag if flag.isdigit() else f'"{flag}"'


def plan_dict(plan: Plan) -> dict[str, Any]:
  """A plan as plain values, for `plan.json`."""

  def rung(prediction: Prediction) -> dict[str, Any]:
    return {
      "step_seconds": prediction.step_seconds,
      "bound_seconds": prediction.bound_seconds,
      "busy_fraction": prediction.busy,
      "mfu": plan.mfu(prediction),
      "split": dataclasses.asdict(prediction.split),
      "techniques": dataclasses.asdict(prediction.techniques),
    }

  def rungs(predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    if not predictions:
      return {}
    return {
      row["rung"]: rung(predictions[row["rung"]]) | row
      for row in ladder_rows(*_ladder(predictions))
    }

  return {
    "devices": plan.devices,
    "samples": plan.work.samples,
    "assumptions": list(plan.assumed),
    "tflop": plan.tflop,
    "memory": {
      role: dataclasses.asdict(held) for role, held in plan.basis.memory.items()
    },
    "does_not_fit": dict(plan.unfit),
    "configured": rung(plan.configured) if plan.configured else None,
    "ladder": rungs(plan.rungs),
    "best": rungs(plan.best),
    "fastest": plan.fastest,
  }


def check_out(out: str | Path) -> None:
  """UserError where a plan cannot be written, or would replace a timeline."""
  out = Path(out)
  if out.exists() and not out.is_dir():
    raise UserError(f"--out={out} is a file; name a directory")
  if (out / "metrics.jsonl").exists():
    raise UserError(
      f"--out={out} is the directory of a run, whose measured timeline.json the "
      "plan's would replace: name another, such as "
      f"{out / 'plan'}"
    )


def write_plan(plan: Plan, out: str | Path) -> None:
  """Writes plan.json, plan.html, timeline.json (best split) and costs.json."""
  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  write_text(out / "plan.json", json.dumps(plan_dict(plan), indent=2) + "\n")
  write_text(out / "plan.html", plan_page(plan))
  write_trace(out / "timeline.json", plan.best[plan.fastest].spans)
  write_table(out / "costs.json", plan.basis.table)


def plan_page(plan: Plan) -> str:
  """A plan as a page: both ladders, and the timeline of every rung."""
  title = f"Plan for {plan.devices:,} devices"
  best, table = plan.best[plan.fastest], plan.basis.table
  header = (
    f"<header><h1>{title}</h1><p>{plan.work.samples:,} samples a step · "
    f"{escape(plan.basis.table.source)}</p></header>"
  )
  said = (
    f'<p class="note">{escape(_describe(plan, best))}</p>'
    f"<pre>{escape(as_flags(best.split, best.techniques, table))}</pre>"
  )
  lines = "".join(f"<li>{escape(line)}</li>" for line in plan.assumed)
  left_out = _notes(f"{n}: {reason}" for n, reason in plan.unfit.items())
  own = ""
  if plan.rungs:
    own = ladder_chart(*_ladder(plan.rungs)) + panels(plan.rungs)
  facts = "\n".join([*_memory(plan), *_flops_text(plan)])
  parts = (
    ("As configured", own + left_out),
    (
      "Each rung with the split that serves it best",
      ladder_chart(*_ladder(plan.best))
      + _notes(_nowhere(plan))
      + said
      + panels(plan.best),
    ),
    ("What it takes", f"<pre>{escape(facts)}</pre>") if facts else (),
    ("What the costs rest on", f'<ul class="facts">{lines}</ul>'),
  )
  shown = "".join(section(*part) for part in parts if part)
  return page(title, header + shown)


def _notes(lines: Iterable[str]) -> str:
  return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
