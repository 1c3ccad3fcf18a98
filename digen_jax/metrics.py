"""Numbers of a run: `metrics.jsonl`, TensorBoard, trackers, and a terminal.

`metrics.jsonl` is the record: one object per global step, on disk before
`write` returns. TensorBoard events and trackers are copies for looking at.
"""

import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from digen_jax.atomic import write_text
from digen_jax.errors import UserError

# Every row of metrics.jsonl has these, in this order; more may follow.
FIELDS = (
  "step",
  "policy_version",
  "reward_mean",
  "reward_std",
  "zero_std_groups",
  "advantage_abs_mean",
  "ratio_mean",
  "ratio_max_abs_log",
  "clip_fraction",
  "kl",
  "grad_norm",
  "learning_rate",
  "staleness_mean",
  "staleness_max",
  "samples",
  "step_seconds",
  "samples_per_second",
  "busy_fraction",
  "generated_by",
  "trained_by",
  "sync_seconds",
  "sync_bytes",
  "predicted_step_seconds",
)
# TensorBoard shows tags by their first part. First match wins.
SECTIONS = (
  ("reward", "reward"),
  ("zero_std", "reward"),
  ("advantage", "reward"),
  ("busy", "lanes"),
  ("idle", "lanes"),
  ("tflops", "lanes"),
  ("mfu", "lanes"),
  ("generated", "lanes"),
  ("trained", "lanes"),
  ("sync", "time"),
  ("step_", "time"),
  ("predicted", "time"),
  ("samples", "time"),
  ("", "policy"),
)
EXTRAS = {"wandb": "track"}  # tracker -> the extra that installs it


class Tracker(Protocol):
  """Somewhere to send numbers."""

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Sends the numbers of a step, by tag."""
    ...

  def close(self) -> None:
    """Sends what is still waiting."""
    ...


class MetricsWriter:
  """Writes the rows of a run, and copies them to TensorBoard and a tracker."""

  def __init__(
    self,
    workdir: str | Path,
    *,
    tracker: str = "",
    config: Mapping[str, Any] | None = None,
    step: int = 0,
  ):
    """Opens `metrics.jsonl` to append to; see `truncate_metrics`.

    Args:
      workdir: directory of the run.
      tracker: "" or "wandb".
      config: what to show in the tracker beside the numbers.
      step: the step that a resumed run goes on with; TensorBoard forgets what
        it has of this step and later ones; the evaluation made before this
        step, which has its number, is to be handed over again.

    Raises:
      UserError: the tracker is unknown or not installed.
    """
    check_tracker(tracker)
    workdir = Path(workdir)
    self._trackers: list[Tracker] = [_TensorBoard(workdir, step)]
    if tracker:
      self._trackers.append(_Wandb(workdir, config))
    self._file = open(  # noqa: SIM115 (closed by `close`)
      workdir / "metrics.jsonl", "a", encoding="utf-8", newline="\n"
    )

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends the row of a global step; on disk when this returns.

    Args:
      row: every one of `FIELDS`, possibly more. Numbers may be numpy's or 0-d
        arrays; what is not finite is written as null.

    Raises:
      ValueError: a field is missing.
    """
    missing = [name for name in FIELDS if name not in row]
    if missing:
      raise ValueError(f"metrics row lacks {', '.join(missing)}")
    ordered = {name: plain(row[name]) for name in FIELDS}
    ordered |= {n: plain(v) for n, v in row.items() if n not in ordered}
    self._file.write(json.dumps(ordered, allow_nan=False) + "\n")
    self._file.flush()
    os.fsync(self._file.fileno())
    self._log(ordered["step"], scalars(ordered))

  def evaluation(self, step: int, row: Mapping[str, Any]) -> None:
    """Copies an evaluation to TensorBoard and the tracker.

    Args:
      step: global steps trained.
      row: a row of `evaluation.json`: {"reward_mean", "split", ...}.
    """
    split = row.get("split", "held_out")
    values = flatten({k: plain(v) for k, v in row.items() if k != "step"})
    self._log(step, {f"eval/{split}/{k}": v for k, v in values.items()})

  def close(self) -> None:
    """Closes the file and the copies."""
    self._file.close()
    for tracker in self._trackers:
      tracker.close()

  def _log(self, step: int, values: Mapping[str, float]) -> None:
    for tracker in self._trackers:
      tracker.log(step, values)


def plain(value: Any) -> Any:
  """`value` as JSON can hold it: nested dicts, lists, numbers, null, strings.

  Numpy scalars and 0-d arrays become Python numbers, NaN and infinities None.
  """
  if isinstance(value, Mapping):
    return {str(name): plain(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if hasattr(value, "tolist"):  # numpy and JAX
    return plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
  """The numbers of a nested row by path: {"busy_fraction/rollout": 0.9, ...}.

  Strings, lists, booleans and nulls are left out.
  """
  flat: dict[str, float] = {}
  for name, value in row.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{name}/")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
      flat[prefix + name] = value
  return flat


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a metrics row by tag, e.g. {"reward/reward_mean": 0.4}."""

  def section(name: str) -> str:
    return next(s for start, s in SECTIONS if name.startswith(start))

  return {
    f"{section(name)}/{name}": value
    for name, value in flatten(row).items()
    if name != "step"
  }


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`, torn lines left out; [] if there is none."""
  path = Path(path)
  if not path.exists():
    return []
  rows = []
  for line in path.read_text("utf-8", errors="replace").splitlines():
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue
    if isinstance(row, dict) and "step" in row:
      rows.append(row)
  return rows


def truncate_metrics(path: str | Path, step: int) -> list[dict[str, Any]]:
  """Drops the rows that a run resumed at `step` writes again.

  A torn last line, as a kill may leave it, goes as well. The file is replaced
  at once or not at all.

  Returns:
    The rows that stay.
  """
  rows = [row for row in read_metrics(path) if row["step"] < step]
  if Path(path).exists():
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
  return rows


def check_tracker(name: str) -> None:
  """Checks that a tracker can be used; imports nothing.

  Raises:
    UserError: it is unknown, or not installed.
  """
  if not name:
    return
  if name not in EXTRAS:
    raise UserError(
      f"config.tracker={name!r} is unknown: use '' or one of {list(EXTRAS)}"
    )
  if importlib.util.find_spec(name) is None:
    raise UserError(
      f"config.tracker={name!r} needs the package {name}: pip install "
      f"'digen-jax[{EXTRAS[name]}]', or set config.tracker=''"
    )


class _TensorBoard(Tracker):
  """Event files under `tensorboard/`."""

  def __init__(self, workdir: Path, step: int):
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=step, flush_secs=10
    )

  def log(self, step: int, values: Mapping[str, float]) -> None:
    for tag, value in values.items():
      self._writer.add_scalar(tag, np.float32(value), step)

  def close(self) -> None:
    self._writer.close()


class _Wandb(Tracker):
  """Weights & Biases; a resumed run goes on in the same place."""

  def __init__(self, workdir: Path, config: Mapping[str, Any] | None):
    import wandb

    identity = workdir / "wandb_run_id"
    if not identity.exists():
      write_text(identity, uuid.uuid4().hex)
    self._run = wandb.init(
      project="digen-jax",
      name=workdir.absolute().name,
      id=identity.read_text("utf-8"),
      resume="allow",
      dir=str(workdir),
      config=dict(config or {}),
    )
    # Steps done again after a kill would be refused as wandb's own counter.
    self._run.define_metric("global_step")
    self._run.define_metric("*", step_metric="global_step")

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({"global_step": step, **values})

  def close(self) -> None:
    self._run.finish()


class Progress:
  """Where a run stands: one line that renews itself, or lines of a log.

  On a terminal the line is redrawn in place. Elsewhere a line is printed for
  the first step, then at most every few seconds, and at the end.
  """

  WINDOW = 8  # steps that the shown reward and pace are means of
  LOG_SECONDS = 10.0

  def __init__(
    self,
    total: int,
    start: int = 0,
    *,
    rewards: Sequence[float | None] = (),
    stream: TextIO | None = None,
  ):
    """Shows the step that is under way.

    Args:
      total: global steps of the whole run.
      start: steps done before this process began.
      rewards: mean reward of those steps, for the change since the start.
      stream: where to write; by default standard error.
    """
    self._total = total
    self._stream = stream or sys.stderr
    self._terminal = self._stream.isatty()
    self._bar = "━╌" if _can_write("━╌", self._stream) else "#."
    self._rewards = [r for r in rewards if r is not None]
    self._seconds: list[float] = []
    self._first: tuple[int, float] | None = None  # steps done, and when
    self._logged, self._log_next = "", -math.inf
    self._line = f"step {start}/{total}  ..."
    if self._terminal:
      self._write(self._line)

  def update(self, step: int, row: Mapping[str, Any]) -> None:
    """Shows that `step` steps are done.

    Args:
      step: how many.
      row: the last one's metrics: `reward_mean`, `step_seconds` and `samples`
        are used.
    """
    reward = plain(row["reward_mean"])
    if reward is not None:
      self._rewards.append(reward)
    self._seconds = [*self._seconds, float(row["step_seconds"])][-self.WINDOW :]
    seconds = statistics.fmean(self._seconds)
    clock = time.monotonic()
    self._first = self._first or (step, clock)
    steps = step - self._first[0]
    # Evaluations and checkpoints are between the steps.
    pace = (clock - self._first[1]) / steps if steps else 0.0
    now = statistics.fmean(self._rewards[-self.WINDOW :] or [math.nan])
    first = statistics.fmean(self._rewards[: self.WINDOW] or [math.nan])
    self._line = format_progress(
      step,
      self._total,
      reward=now,
      change=now - first,
      samples_per_second=float(row["samples"]) / seconds,
      step_seconds=seconds,
      left_seconds=(self._total - step) * max(seconds, pace),
      width=shutil.get_terminal_size().columns - 1 if self._terminal else None,
      bar=self._bar,
    )
    if self._terminal:
      self._write("\r\x1b[K" + self._line)
    elif clock >= self._log_next:
      self._log()

  def message(self, text: str) -> None:
    """Prints a line of its own; the progress bar goes on below it."""
    if self._terminal:
      self._write(f"\r\x1b[K{text}\n{self._line}")
    else:
      self._write(text + "\n")

  def close(self) -> None:
    """Ends the line, or logs the last one."""
    if self._terminal and self._line:
      self._write("\n")
    elif self._line:
      self._log()
    self._line = ""

  def _log(self) -> None:
    if self._line != self._logged:
      self._write(self._line + "\n")
    self._logged = self._line
    self._log_next = time.monotonic() + self.LOG_SECONDS

  def _write(self, text: str) -> None:
    self._stream.write(text)
    self._stream.flush()


def pace_reporter(
  what: str, *, seconds: float = 5.0, stream: TextIO | None = None
) -> Callable[[int, int], None]:
  """A function of (done, total) that prints a line every few seconds.

  Args:
    what: what is counted, e.g. "encoded prompts".
    seconds: between lines; what takes less is not spoken of.
    stream: where to write; by default standard error.
  """
  began = time.monotonic()
  last = began

  def report(done: int, total: int) -> None:
    nonlocal last
    now = time.monotonic()
    if now - last < seconds and not (done == total and last > began):
      return
    last = now
    rate = done / max(now - began, 1e-9)
    print(
      f"{what} {done}/{total}  {rate:.3g}/s  "
      f"{format_seconds((total - done) / rate)} left",
      file=stream or sys.stderr,
      flush=True,
    )

  return report


def _can_write(text: str, stream: TextIO) -> bool:
  try:
    text.encode(getattr(stream, "encoding", None) or "ascii")
  except UnicodeEncodeError:
    return False
  return True


def format_progress(
  step: int,
  total: int,
  *,
  reward: float,
  change: float,
  samples_per_second: float,
  step_seconds: float,
  left_seconds: float,
  width: int | None = None,
  bar: str = "━╌",
) -> str:
  """One line on where a run stands.

  Args:
    step: steps done.
    total: steps of the run.
    reward: mean reward of the last steps; NaN if there is none.
    change: its difference to that of the first ones.
    samples_per_second: of the last steps.
    step_seconds: mean duration of the last steps.
    left_seconds: until the last one should end.
    width: columns of the terminal, which a bar may fill and which the line
      never exceeds; None for a log line without a bar.
    bar: what a done and an open stretch of the bar are drawn with.
  """
  head = f"step {step:>{len(str(total))}}/{total}"
  gain = "?" if math.isnan(reward) else f"{reward:.3f} ({change:+.3f})"
  facts = (
    f"reward {gain}  {samples_per_second:.3g} samples/s  "
    f"{step_seconds:.3g} s/step  "
    f"{format_seconds(left_seconds)} left"
  )
  if width is None:
    return f"{head}  {facts}"
  room = min(width - len(head) - len(facts) - 4, 30)
  if room < 5:
    return f"{head}  {facts}"[: max(width, 0)]
  done = round(room * step / total)
  return f"{head}  {bar[0] * done}{bar[1] * (room - done)}  {facts}"


def format_seconds(seconds: float) -> str:
  """E.g. "42 s", "3:07", "2:05:00"; "?" if unknown."""
  if not math.isfinite(seconds):
    return "?"
  whole = round(seconds)
  if whole < 60:
    return f"{whole} s"
  minutes, rest = divmod(whole, 60)
  if minutes < 60:
    return f"{minutes}:{rest:02d}"
  return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
