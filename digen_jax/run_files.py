"""The files of a run: what is written to a workdir, and when."""

import dataclasses
import errno
import fcntl
import json
import logging
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from digen_jax import media
from digen_jax.atomic import write_text
from digen_jax.checkpoint import Checkpoints
from digen_jax.config import Config, to_dict
from digen_jax.errors import UserError
from digen_jax.evaluation import Evaluated
from digen_jax.links import Hardware
from digen_jax.metrics import MetricsWriter, truncate_metrics
from digen_jax.timeline import Span, Timeline
from digen_jax.weights.hub import pinned

_log = logging.getLogger(__name__)

LOCK = ".lock"  # held by the process that runs in a directory
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# What a resumed run must share with the one it goes on with: it decides what
# the arrays of a checkpoint mean, or what has been drawn so far.
FIXED = (
  "seed",
  "batch",
  "train.lora_rank",
  "train.lora_alpha",
  "train.lora_targets",
  "train.ema_decay",
  "train.updates_per_batch",
)


def check_workdir(workdir: Path) -> None:
  """Raises UserError where a run cannot be written."""
  if workdir.exists() and not workdir.is_dir():
    raise UserError(
      f"--workdir={workdir} is a file; name a directory, new or of an earlier "
      "run to resume"
    )
  parent = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise UserError(
      f"--workdir={workdir} cannot be made: {parent} is no directory that can "
      "be written to"
    )


def lock(workdir: Path) -> int:
  """Keeps other processes from running in a directory.

  Returns:
    A file descriptor; others may run there when it is closed, or when this
    process has ended, however it does.

  Raises:
    UserError: another process has it.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  file = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EACCES, errno.EAGAIN):
      os.close(file)
      raise UserError(
        f"another process runs in {workdir}: wait for it, end it, or choose "
        "another --workdir"
      ) from error
    # A file system without locks.
    _log.warning("%s cannot be locked (%s)", workdir, error)
  return file


def pin_checkpoint(config: Config, workdir: Path) -> Config:
  """The config with the commit of a checkpoint that is on the hub.

  That which an earlier run in the directory began with, else the newest: what
  is on the hub may change before a run is resumed, sampled or exported.

  Args:
    config: of the run.
    workdir: its directory.

  Raises:
    UserError: the checkpoint is not found.
  """
  name, file = config.checkpoint, workdir / "config.json"
  earlier = ""
  if file.exists() and not Path(name).is_dir():
    earlier = json.loads(file.read_text("utf-8"))["config"]["checkpoint"]
  known = earlier.startswith(f"{name}@")
  checkpoint = earlier if known else pinned(name)
  return dataclasses.replace(config, checkpoint=checkpoint)


def check_earlier(config: Config, fingerprint: str, workdir: Path) -> None:
  """Raises UserError where a directory holds the checkpoints of another run.

  Args:
    config: of the run that is to go on.
    fingerprint: of what it starts from, which may have moved.
    workdir: where it is to go on.
  """
  directory = workdir / "checkpoints"
  if not directory.is_dir():
    return
  checkpoints = Checkpoints(directory, writes=False)
  step = checkpoints.latest()
  if step is not None:
    check_resumable(config, fingerprint, checkpoints.record(step), workdir)
  checkpoints.close()


def check_resumable(
  config: Config,
  fingerprint: str,
  record: Mapping[str, Any],
  workdir: Path,
) -> None:
  """Raises UserError where a checkpoint belongs to another run.

  Args:
    config: of the run that is to go on.
    fingerprint: of what it starts from, which may have moved.
    record: of the checkpoint to go on from.
    workdir: where that was found.
  """
  now = json.loads(json.dumps(to_dict(config)))  # as the record was
  for name in FIXED:
    old, new = record["config"], now
    for key in name.split("."):
      old, new = old.get(key), new.get(key)
    if old != new:
      raise UserError(
        f"{workdir} holds a run with config.{name}={old!r}, not {new!r}: "
        "resume it with that value, or choose another --workdir"
      )
  if record["checkpoint"] != fingerprint:
    raise UserError(
      f"{workdir} holds a run that started from "
      f"{_start(record['config'])}, and {_start(now)} holds other files: "
      "resume it with the same, or choose another --workdir"
    )
  if record["step"] > config.steps:
    raise UserError(
      f"{workdir} holds a run of {record['step']} steps, more than "
      f"config.steps={config.steps}: raise config.steps to go on, or choose "
      "another --workdir"
    )


def _start(config: Mapping[str, Any]) -> str:
  lora = config["train"].get("lora_init")
  return config["checkpoint"] + (f" with {lora}" if lora else "")


def describe(hardware: Mapping[str, Hardware]) -> str:
  """E.g. "rollout data=1, trainer fsdp=1"."""
  return ", ".join(
    f"{name} "
    + (
      " ".join(f"{axis}={n}" for axis, n in lane.shape.items() if n > 1)
      or "1 device"
    )
    for name, lane in hardware.items()
  )


# Of a step's metrics, what tells how well it used the lanes.
LANES = ("busy_fraction", "step_seconds", "predicted_step_seconds")


def _lanes(steps: Sequence[Mapping[str, Any]]) -> str:
  """E.g. "rollout 91% busy, trainer 88% busy; 3.2 s a step, predicted 3.1 s";
  medians, "" of no step."""
  if not steps:
    return ""
  busy = {
    lane: statistics.median(step["busy_fraction"][lane] for step in steps)
    for lane in steps[0]["busy_fraction"]
  }
  text = ", ".join(f"{lane} {part:.0%} busy" for lane, part in busy.items())
  text += f"; {_median(steps, 'step_seconds')} s a step"
  predicted = _median(steps, "predicted_step_seconds")
  return text + (f", predicted {predicted} s" if predicted else "")


def _median(steps: Sequence[Mapping[str, Any]], name: str) -> str:
  values = [step[name] for step in steps if step[name] is not None]
  return f"{statistics.median(values):.3g}" if values else ""


class RunFiles:
  """Writes config.json, metrics, timeline, evaluations and pictures."""

  def __init__(
    self,
    workdir: Path,
    config: Config,
    hardware: Mapping[str, Hardware],
    step: int,
  ):
    """Opens a run's directory at `step`: what an interrupted run wrote after
    its last checkpoint is dropped, and will be written again."""
    self.workdir, self.config = workdir, config
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    placed = {
      "devices": {n: h.device_kind for n, h in hardware.items()},
      "meshes": {n: dict(h.shape) for n, h in hardware.items()},
    }
    self._write_json(
      "config.json",
      {
        "config": to_dict(config),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        **placed,
        "placed_at_step": self._placed_at(placed, step),
      },
    )
    rows = truncate_metrics(workdir / "metrics.jsonl", step)
    self.rewards = [row.get("reward_mean") for row in rows]
    self._metrics = MetricsWriter(
      workdir, tracker=config.tracker, config=to_dict(config), step=step
    )
    self._timeline = Timeline(workdir / "timeline.json", step)
    self._steps: list[dict[str, Any]] = []  # how long, and how busy
    self._evaluations = [
      row for row in self._read_evaluations() if row["step"] <= step
    ]
    for row in self._evaluations:
      if row["step"] == step:
        self._metrics.evaluation(step, row)

  def _placed_at(self, placed: dict[str, Any], step: int) -> int:
    """The first step that ran where this one does: a run may have moved."""
    path = self.workdir / "config.json"
    if not step or not path.exists():
      return step
    earlier = json.loads(path.read_text("utf-8"))
    stayed = all(earlier.get(key) == value for key, value in placed.items())
    return earlier.get("placed_at_step", 0) if stayed else step

  def _read_evaluations(self) -> list[dict[str, Any]]:
    path = self.workdir / "evaluation.json"
    return json.loads(path.read_text()) if path.exists() else []

  def stepped(self, row: dict[str, Any], spans: list[Span]) -> None:
    """After every global step."""
    self._metrics.write(row)
    self._timeline.add(spans)
    self._steps.append({key: row.get(key) for key in LANES})

  def has_evaluation(self, step: int, setting: str) -> bool:
    """Whether the policy of a step has been evaluated in this setting."""
    return any(
      row["step"] == step and row.get("setting") == setting
      for row in self._evaluations
    )

  def evaluated(self, result: Evaluated) -> None:
    """After an evaluation: its row and its pictures."""
    self._timeline.flush()
    made = result.step, result.setting
    rows = [
      r for r in self._evaluations if (r["step"], r.get("setting")) != made
    ]
    self._evaluations = [*rows, result.row()]
    self._write_json("evaluation.json", self._evaluations)
    self._metrics.evaluation(result.step, result.row())
    shown = slice(self.config.eval.images)
    labels = [
      f"{reward:.2f} {prompt}"
      for reward, prompt in zip(result.rewards[shown], result.prompts[shown])
    ]
    file = self.workdir / "samples" / f"step_{result.step:06d}.png"
    grid = media.image_grid(result.images[shown], labels=labels)
    media.save_image(file, grid)
    if result.images.ndim == 5:
      video = media.video_grid(result.images[shown], labels)
      media.save_video(file.with_suffix(".mp4"), video, self.config.eval.fps)

  def explored(self, samples: Any) -> None:
    """Best and worst samples of a step's first groups, with their rewards."""
    media.save_image(
      self.workdir / "samples" / f"groups_{samples.step:06d}.png",
      media.best_and_worst(samples.images, samples.rewards, samples.prompts),
    )

  def summary(self, setting: str) -> dict[str, Any]:
    """Held-out reward of the last evaluation in a setting, and of the first;
    and the lanes in the steps that were trained here, in a line."""
    rows = [r for r in self._evaluations if r.get("setting") == setting]
    first, last = rows[0], rows[-1]
    return {
      "before": first["reward_mean"],
      "after": last["reward_mean"],
      "label": last["split"].replace("_", "-"),
      "lanes": _lanes(self._steps),
    }

  def _write_json(self, name: str, value: Any) -> None:
    write_text(self.workdir / name, json.dumps(value, indent=2) + "\n")

  def close(self) -> None:
    """Writes what is held back."""
    self._timeline.flush()
    self._metrics.close()
