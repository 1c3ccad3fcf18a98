"""Spans, their accounting, and the trace file."""

import json

import numpy as np
import pytest

from digen_jax.atomic import replacing, write_text
from digen_jax.timeline import (
  Span,
  Timeline,
  lane_accounting,
  last_steps,
  merge,
  read_trace,
  slots,
  write_trace,
)


def span(name, lane, start, end, step=0, **args):
  return Span(name, lane, start, end, {"step": step, **args})


def test_accounting_by_hand():
  spans = [
    span("generate", "a", 1.0, 3.0),
    span("train", "a", 2.0, 4.0),  # overlaps: 3 s busy, not 4
    span("switch", "a", 3.5, 4.5),  # half of it while busy
    span("publish", "a", 4.25, 6.0),  # a quarter second while switching
    span("update", "a", 9.0, 20.0),  # one second lies within
    span("generate", "b", 0.0, 100.0),
  ]
  found = lane_accounting(spans, ["a", "b", "c"], 0.0, 10.0)
  a = found["a"]
  assert (a.busy, a.switch, a.sync, a.idle) == (4.0, 0.5, 1.5, 4.0)
  assert (found["b"].busy, found["b"].idle) == (10.0, 0.0)
  assert (found["c"].busy, found["c"].idle) == (0.0, 10.0)


@pytest.mark.parametrize("seed", range(8))
def test_accounting_adds_up_to_the_wall_time(seed):
  rng = np.random.default_rng(seed)
  names = ("generate", "score", "train", "update", "publish", "switch")
  spans = [
    span(str(rng.choice(names)), str(rng.choice(["a", "b"])), t, t + d)
    for t, d in zip(rng.uniform(-2, 12, 60), rng.exponential(0.3, 60))
  ]
  found = lane_accounting(spans, ["a", "b"], 0.0, 10.0)
  grid = np.linspace(0, 10, 20_001)[:-1] + 2.5e-4
  for lane, x in found.items():
    assert x.busy + x.idle + x.switch + x.sync == pytest.approx(10.0, abs=1e-9)
    kinds = {"publish": "sync", "switch": "switch"}
    covered = np.zeros(len(grid), bool)
    for kind in ("busy", "switch", "sync"):
      hit = np.zeros(len(grid), bool)
      for s in spans:
        if s.lane == lane and kinds.get(s.name, "busy") == kind:
          hit |= (grid >= s.start) & (grid < s.end)
      expected = (hit & ~covered).sum() * 5e-4
      assert getattr(x, kind) == pytest.approx(expected, abs=0.05)
      covered |= hit


def test_merge():
  assert merge([(3, 4), (0, 1), (1, 2), (5, 5), (3.5, 6)]) == [(0, 2), (3, 6)]
  assert merge([]) == []


def test_slots_of_a_lane_with_several_at_once():
  spans = [
    span("score", "host", 0.0, 2.0),
    span("score", "host", 1.0, 3.0),
    span("score", "host", 2.0, 2.5),
    span("train", "trainer", 1.0, 2.0),
    span("score", "host", 2.2, 4.0),
  ]
  assert slots(spans) == [0, 1, 0, 0, 2]


def test_trace_is_what_chrome_reads(tmp_path):
  path = tmp_path / "timeline.json"
  args = {"step": 7, "group": 2, "unit": "32:48", "version": 7}
  spans = [
    Span("generate", "rollout", 0.25, 0.75, args),
    Span("train", "trainer", 0.5, 1.5, args),
  ]
  write_trace(path, spans)
  trace = json.loads(path.read_text())
  units = [e for e in trace["traceEvents"] if e["ph"] == "X"]
  assert [(e["name"], e["pid"], e["ts"], e["dur"]) for e in units] == [
    ("generate", 0, 250_000.0, 500_000.0),
    ("train", 1, 500_000.0, 1_000_000.0),
  ]
  assert all(e["args"] == args and e["tid"] == 0 for e in units)
  names = {
    e["pid"]: e["args"]["name"]
    for e in trace["traceEvents"]
    if e["name"] == "process_name"
  }
  assert names == {0: "rollout", 1: "trainer"}
  assert read_trace(path) == spans
  assert [p.name for p in tmp_path.iterdir()] == ["timeline.json"]


def test_trace_is_bounded_and_says_so(tmp_path):
  path = tmp_path / "timeline.json"
  spans = [span("train", "t", k, k + 0.5, step=k) for k in range(10)]
  write_trace(path, spans, keep_steps=3)
  assert [s.args["step"] for s in read_trace(path)] == [7, 8, 9]
  assert "last 3" in json.loads(path.read_text())["otherData"]["steps_kept"]
  assert [s.args["step"] for s in read_trace(path, before_step=9)] == [7, 8]
  assert last_steps([], 3) == []
  assert read_trace(tmp_path / "none.json") == []


def test_timeline_goes_on_after_a_resumption(tmp_path):
  path = tmp_path / "timeline.json"
  first = Timeline(path)
  for step in range(4):  # a clock that began long ago
    first.add([span("train", "t", 500 + step, 500.5 + step, step=step)])
  first.flush()
  second = Timeline(path, step=2)  # steps 2 and 3 are done again
  second.add([span("train", "t", 9.0, 9.5, step=2)])
  second.add([span("train", "t", 10.0, 10.5, step=3)])
  second.flush()
  found = read_trace(path)
  assert [s.args["step"] for s in found] == [0, 1, 2, 3]
  assert [s.start for s in found] == pytest.approx([0.0, 1.0, 1.5, 2.5])
  assert [s.end for s in found] == pytest.approx([0.5, 1.5, 2.0, 3.0])


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
  path = tmp_path / "a.txt"
  write_text(path, "old")
  with pytest.raises(RuntimeError), replacing(path) as temporary:
    temporary.write_text("ne")
    raise RuntimeError
  assert path.read_text() == "old"
  with replacing(path) as temporary:
    temporary.write_text("new")
    assert path.read_text() == "old"
  assert path.read_text() == "new"
  assert list(tmp_path.iterdir()) == [path]
