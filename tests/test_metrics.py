"""metrics.jsonl, TensorBoard, trackers and the progress line."""

import io
import json
import math
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from digen_jax import metrics
from digen_jax.config import Config
from digen_jax.errors import UserError
from digen_jax.metrics import (
  FIELDS,
  MetricsWriter,
  Progress,
  check_tracker,
  flatten,
  format_progress,
  format_seconds,
  plain,
  read_metrics,
  scalars,
  truncate_metrics,
)
from digen_jax.run_files import RunFiles


def row(step, **changes):
  values = dict.fromkeys(FIELDS, 0.5)
  values |= {
    "step": step,
    "policy_version": step,
    "samples": 64,
    "step_seconds": 2.0,
    "samples_per_second": 32.0,
    "busy_fraction": {"rollout": 0.75, "trainer": 0.9},
    "generated_by": {"rollout": 8},
    "trained_by": {"trainer": 8},
    "predicted_step_seconds": None,
  }
  return values | changes


def test_rows_have_the_fields_in_order_and_no_nan(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(
    row(
      0,
      kl=float("nan"),
      grad_norm=np.float32("inf"),
      reward_mean=jnp.float32(0.25),
      samples=np.int64(64),
      reward_shapes_mean=np.float32(0.5),
    )
  )
  line = (tmp_path / "metrics.jsonl").read_text()  # before it is closed
  writer.close()
  assert line.endswith("}\n") and "NaN" not in line and "Infinity" not in line
  found = json.loads(line)
  assert list(found) == [*FIELDS, "reward_shapes_mean"]
  assert found["kl"] is None and found["grad_norm"] is None
  assert found["reward_mean"] == 0.25 and found["samples"] == 64
  assert found["busy_fraction"] == {"rollout": 0.75, "trainer": 0.9}


def test_a_missing_field_is_named(tmp_path):
  writer = MetricsWriter(tmp_path)
  bad = row(0)
  del bad["kl"], bad["sync_bytes"]
  with pytest.raises(ValueError, match="lacks kl, sync_bytes"):
    writer.write(bad)
  writer.close()
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_kill_loses_no_finished_row(tmp_path):
  code = (
    "import os, sys; sys.path.insert(0, 'tests')\n"
    "from test_metrics import row\n"
    "from digen_jax.metrics import MetricsWriter\n"
    "writer = MetricsWriter(sys.argv[1])\n"
    "for step in range(5): writer.write(row(step))\n"
    "os.kill(os.getpid(), 9)\n"
  )
  root = Path(__file__).parent.parent
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False
  )
  assert done.returncode == -9
  assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [
    *range(5)
  ]


def test_truncation_drops_redone_and_torn_rows(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = [json.dumps({"step": k, "kl": 0.125 * k}) for k in range(6)]
  path.write_text("\n".join(lines) + '\n{"step": 6, "kl": 0.')
  kept = truncate_metrics(path, 4)
  assert [r["step"] for r in kept] == [0, 1, 2, 3]
  assert path.read_text() == "".join(line + "\n" for line in lines[:4])
  writer = MetricsWriter(tmp_path, step=4)
  writer.write(row(4))
  writer.close()
  assert [r["step"] for r in read_metrics(path)] == [0, 1, 2, 3, 4]


def test_truncation_of_a_torn_line_alone(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 0}\n{"step": 1, "a": "\xe2\x80')
  assert truncate_metrics(path, 100) == [{"step": 0}]
  assert path.read_text() == '{"step": 0}\n'
  assert truncate_metrics(tmp_path / "none.jsonl", 3) == []
  assert not (tmp_path / "none.jsonl").exists()


def test_plain_and_flatten():
  value = {"a": np.arange(2), "b": (np.float64("nan"), True), 3: jnp.int32(4)}
  assert plain(value) == {"a": [0, 1], "b": [None, True], "3": 4}
  nested = {"a": {"b": 1.0, "c": {"d": 2}}, "e": None, "f": "x", "g": True}
  assert flatten(nested) == {"a/b": 1.0, "a/c/d": 2}


def test_tags_are_grouped():
  tags = scalars(row(3))
  assert tags["reward/reward_mean"] == 0.5
  assert tags["lanes/busy_fraction/rollout"] == 0.75
  assert tags["time/step_seconds"] == 2.0
  assert scalars({"mfu": {"a": 0.5}}) == {"lanes/mfu/a": 0.5}
  assert tags["policy/ratio_max_abs_log"] == 0.5
  assert "time/predicted_step_seconds" not in tags  # null
  assert not any(tag.endswith("/step") for tag in tags)


def _events(directory):
  """(step, {tag: value}) from TensorBoard's record files, by their format."""
  from tensorboardX.proto.event_pb2 import Event

  found = []
  for path in sorted(directory.glob("events*")):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (size,) = struct.unpack_from("<Q", data, at)
      event = Event.FromString(data[at + 12 : at + 12 + size])
      at += 16 + size
      for value in event.summary.value:
        found.append((event.step, value.tag, value.simple_value))
  return found


def test_tensorboard_has_the_numbers(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(row(3, reward_mean=0.625))
  writer.evaluation(
    4, {"step": 4, "split": "held_out", "reward_mean": 0.75, "prompts": 64}
  )
  writer.close()
  events = _events(tmp_path / "tensorboard")
  assert (3, "reward/reward_mean", 0.625) in events
  assert (3, "lanes/busy_fraction/rollout", 0.75) in events
  assert (4, "eval/held_out/reward_mean", 0.75) in events


def _purges(directory):
  """Steps from which on TensorBoard forgets what earlier files say."""
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  (path,) = directory.glob("events*")
  data, at, found = path.read_bytes(), 0, []
  while at < len(data):
    (size,) = struct.unpack_from("<Q", data, at)
    event = Event.FromString(data[at + 12 : at + 12 + size])
    at += 16 + size
    if event.session_log.status == SessionLog.START:
      found.append(event.step)
  return found


@pytest.mark.parametrize("step", [0, 4])
def test_tensorboard_forgets_what_is_done_again(step, tmp_path):
  MetricsWriter(tmp_path, step=step).close()
  assert _purges(tmp_path / "tensorboard") == [step]


@pytest.mark.parametrize(("step", "kept"), [(0, [(0, 0.5)]), (4, [(4, 0.75)])])
def test_the_evaluation_at_the_resumed_step_stays(step, kept, tmp_path):
  rows = [
    {"step": s, "split": "held_out", "reward_mean": r}
    for s, r in ((0, 0.5), (4, 0.75), (6, 0.875))
  ]
  (tmp_path / "evaluation.json").write_text(json.dumps(rows))
  RunFiles(tmp_path, Config(), {}, step).close()
  events = _events(tmp_path / "tensorboard")
  tag = "eval/held_out/reward_mean"
  assert [(s, value) for s, t, value in events if t == tag] == kept


def test_a_tracker_that_is_missing_or_unknown(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"digen-jax\[track\]"):
    MetricsWriter(tmp_path, tracker="wandb")
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(UserError, match="'mlfow' is unknown"):
    check_tracker("mlfow")
  check_tracker("")


def test_wandb_gets_the_numbers_and_resumes(tmp_path, monkeypatch):
  calls = []

  class Run:
    def define_metric(self, *args, **kwargs):
      pass

    def log(self, values):
      calls.append(values)

    def finish(self):
      calls.append("finished")

  inits = []
  module = types.ModuleType("wandb")
  module.init = lambda **kwargs: inits.append(kwargs) or Run()
  monkeypatch.setitem(sys.modules, "wandb", module)
  monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: module)
  for step in (0, 1):
    writer = MetricsWriter(tmp_path, tracker="wandb", config={"seed": 1})
    writer.write(row(step, reward_mean=0.25))
    writer.close()
  assert calls[0]["reward/reward_mean"] == 0.25 and calls[1] == "finished"
  assert [c["global_step"] for c in calls[::2]] == [0, 1]
  assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow"
  assert inits[0]["config"] == {"seed": 1}


def test_progress_line():
  line = format_progress(
    12,
    200,
    reward=0.412,
    change=0.066,
    samples_per_second=58.26,
    step_seconds=2.25,
    left_seconds=423.0,
  )
  assert line == (
    "step  12/200  reward 0.412 (+0.066)  58.3 samples/s  2.25 s/step  "
    "7:03 left"
  )


@pytest.mark.parametrize("width", [0, 10, 79, 90, 120, 300])
def test_progress_line_fits_the_terminal(width):
  facts = dict(
    reward=-0.5,
    change=-0.25,
    samples_per_second=1e4,
    step_seconds=100.0,
    left_seconds=5000.0,
  )
  line = format_progress(50, 100, **facts, width=width)
  assert len(line) <= width
  if width >= 90:
    assert line.count("━") == pytest.approx(line.count("╌"), abs=1)
    assert "1:23:20 left" in line


def test_progress_line_without_a_reward():
  facts = dict(
    change=math.nan, samples_per_second=1.0, step_seconds=1.0, left_seconds=1.0
  )
  assert "reward ?  " in format_progress(1, 2, reward=math.nan, **facts)


def test_seconds():
  shown = [format_seconds(s) for s in (0.4, 59.4, 59.6, 3599, 7500, math.nan)]
  assert shown == ["0 s", "59 s", "1:00", "59:59", "2:05:00", "?"]


class Terminal(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True


def test_progress_on_a_terminal_is_one_line(monkeypatch):
  monkeypatch.setenv("COLUMNS", "120")
  stream = Terminal()
  progress = Progress(10, stream=stream)
  for step in range(10):
    progress.update(step + 1, row(step, reward_mean=step / 10))
  progress.message("evaluated")
  progress.close()
  text = stream.getvalue()
  assert text.count("\n") == 2  # the message, and the end
  last = text.split("\x1b[K")[-1]
  assert last.startswith("evaluated\nstep 10/10  ━") and last.endswith("\n")
  # means of the last eight and of the first eight rewards
  assert "reward 0.550 (+0.200)" in last and "32 samples/s" in last


def test_progress_in_a_log(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  stream = io.StringIO()
  progress = Progress(100, start=90, rewards=[0.0] * 90, stream=stream)
  for step in range(90, 100):
    progress.update(step + 1, row(step, reward_mean=1.0))
    now[0] += 4.0
  progress.close()
  progress.close()
  lines = stream.getvalue().splitlines()
  steps = [int(line.split()[1].split("/")[0]) for line in lines]
  assert steps == [91, 94, 97, 100]
  assert "\r" not in stream.getvalue() and "━" not in stream.getvalue()
  assert "reward 1.000 (+1.000)" in lines[-1]  # since the start of the run
  # A step takes two of the four seconds; what lies between the steps counts, too.
  assert "2 s/step  24 s left" in lines[1]


def test_progress_where_only_ascii_can_be_written(monkeypatch):
  monkeypatch.setenv("COLUMNS", "120")
  raw = io.BytesIO()
  stream = io.TextIOWrapper(raw, encoding="ascii")
  monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
  progress = Progress(2, stream=stream)
  progress.update(1, row(0))
  progress.close()
  assert b"##" in raw.getvalue() and b".." in raw.getvalue()


def test_pace(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  stream = io.StringIO()
  report = metrics.pace_reporter("encoded", seconds=5, stream=stream)
  for done in (10, 20, 30, 100):
    now[0] += 4
    report(done, 100)
  assert stream.getvalue().splitlines() == [
    "encoded 20/100  2.5/s  32 s left",
    "encoded 100/100  6.25/s  0 s left",
  ]
  now[0] = 0.0
  report = metrics.pace_reporter("encoded", seconds=5, stream=stream)
  now[0] = 1.0
  report(3, 3)
  assert len(stream.getvalue().splitlines()) == 2
