"""The report of a run, from all of its files, some of them, or broken ones."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from digen_jax.errors import UserError
from digen_jax.media import image_grid, save_image
from digen_jax.report import write_report
from digen_jax.run_record import POINTS, curve, load_run, smooth, splits
from digen_jax.svg import Series, lanes_chart, line_chart, number, ticks
from digen_jax.timeline import Span, write_trace

STEPS = 12


def rows(count=STEPS):
  return [
    {
      "step": k,
      "reward_mean": 0.25 + 0.03125 * k,
      "reward_std": 0.125,
      "ratio_max_abs_log": 1e-7 * (k + 1),
      "clip_fraction": 0.1,
      "kl": None if k == 4 else 0.01 * k,
      "grad_norm": 1.0,
      "samples": 64,
      "step_seconds": 2.0,
      "predicted_step_seconds": None if k == 0 else 1.9,
      "busy_fraction": {"rollout": 0.5, "trainer": 0.75},
    }
    for k in range(count)
  ]


def spans():
  """Steps of 4 s: the rollout works 2 s, the trainer 3 s and publishes 0.5."""
  found = []
  for step in range(STEPS):
    t = 5.0 * step  # 1 s between steps, which is nobody's bubble
    for group in range(4):
      args = {"step": step, "group": group, "unit": "0:16", "version": step}
      a = t + 0.5 * group
      found.append(Span("generate", "rollout", a, a + 0.5, args))
      a = t + 0.5 + 0.75 * group
      found.append(Span("train", "trainer", a, a + 0.75, args))
    found.append(Span("publish", "trainer", t + 3.5, t + 4, {"step": step}))
  return found


@pytest.fixture
def workdir(tmp_path):
  run = tmp_path / "my<run>"
  (run / "samples").mkdir(parents=True)
  config = {
    "config": {
      "steps": 40,
      "checkpoint": "/data/tiny-flux",
      "sampling": {"kernel": "flow_sde", "noise_level": 0.7},
      "prompts": "<script>alert(1)</script>",
    },
    "versions": {"jax": "0.10.2"},
    "devices": {"rollout": "TPU v5", "trainer": "TPU v6"},
    "meshes": {"rollout": {"data": 2, "tensor": 2}, "trainer": {"fsdp": 3}},
  }
  (run / "config.json").write_text(json.dumps(config))
  lines = [json.dumps(row) + "\n" for row in rows()]
  (run / "metrics.jsonl").write_text("".join(lines))
  evaluations = [
    {"step": s, "reward_mean": r, "split": "held_out"}
    for s, r in ((0, 0.25), (6, 0.5), (12, 0.625))
  ]
  (run / "evaluation.json").write_text(json.dumps(evaluations))
  write_trace(run / "timeline.json", spans())
  rng = np.random.default_rng(0)
  for step in (0, 6, 12):
    grid = image_grid(rng.random((4, 8, 8, 3)), scale=2)
    save_image(run / "samples" / f"step_{step:06d}.png", grid)
    save_image(run / "samples" / f"groups_{step:06d}.png", grid)
  return run


class Page(HTMLParser):
  """Tags that balance, their attributes, and the text between them."""

  VOID = ("meta", "img", "input", "br")

  def __init__(self, html):
    super().__init__()
    self.open, self.tags, self.text, self.html = [], [], [], html
    self.feed(html)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)

  def attributes(self, tag, name):
    return [a[name] for t, a in self.tags if t == tag and name in a]

  @property
  def headings(self):
    return re.findall(r"<h2>(.*?)</h2>", self.html)


def report(workdir):
  path = write_report(workdir)
  assert path == workdir / "report.html"
  return Page(path.read_text("utf-8"))


def test_everything_is_there(workdir):
  page = report(workdir)
  assert page.headings == [
    "Reward by step",
    "Samples",
    "Lanes",
    "Training",
    "Configuration",
  ]
  text = " ".join(page.text)
  for shown in (
    "step 12 of 40 · tiny-flux · flow_sde · rollout: 4 × TPU v5 · "
    "trainer: 3 × TPU v6",
    "0.625",  # held-out reward after
    "from 0.250",
    "+0.375",
    "768",  # samples
    "32 per second",
    "1.2e-6",  # the largest |log ratio|
    "sampling.noise_level",
    "0.10.2",
    "KL to the reference",
  ):
    assert shown in text, shown
  assert text.count("held-out 0.625") + text.count("noise 0.625") == 1


def test_nothing_is_loaded_from_elsewhere(workdir):
  page = report(workdir)
  rest = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.html)
  assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|fetch", rest)
  for name in ("src", "href"):
    for tag in ("img", "script", "link", "a"):
      for value in page.attributes(tag, name):
        assert value.startswith("data:image/")


def test_text_of_the_run_is_escaped(workdir):
  page = report(workdir)
  assert "<script>alert" not in page.html
  assert "<script>alert(1)</script>" in page.text
  assert "my<run>" in page.text
  assert [t for t, _ in page.tags].count("script") == 1


def test_pictures_before_and_after(workdir):
  page = report(workdir)
  captions = page.attributes("img", "alt")
  assert captions[:3] == ["Before, step 0", "After, step 6", "After, step 12"]
  assert captions[3:] == [f"Samples, step {k}" for k in (0, 6, 12)]
  hidden = [
    (a["data-name"], "hidden" in a) for _, a in page.tags if "data-name" in a
  ]
  assert hidden[:2] == [("step 6", True), ("step 12", False)]


def test_a_large_picture_is_embedded_smaller(workdir):
  noise = np.random.default_rng(0).integers(0, 256, (1000, 2000, 3), np.uint8)
  path = workdir / "samples" / "step_000012.png"
  save_image(path, Image.fromarray(noise))
  assert path.stat().st_size > 5_000_000
  page = report(workdir)
  assert sum("image/jpeg" in s for s in page.attributes("img", "src")) == 1
  assert len(page.html) < 3_000_000


def test_lanes_show_shares_and_bubbles(workdir):
  page = report(workdir)
  titles = page.attributes("i", "title")
  assert "busy 50.0%" in titles and "idle 50.0%" in titles  # rollout
  assert "busy 75.0%" in titles and "sync 12.5%" in titles  # trainer
  names = page.attributes("div", "data-name")
  assert "step 11 · 4 s" in names and "step 4 · 4 s" in names
  assert "step 3 · 4 s" not in names  # only the last eight
  last = page.html.rsplit('data-name="step 11', 1)[1]
  last = last[: last.index("</svg>")]
  assert last.count("<title>generate · 0.5 s") == 4
  assert last.count("<title>idle") == 2  # rollout 2 s, trainer 0.5 s
  assert "<title>idle 2 s" in last and "<title>idle 0.5 s" in last
  assert "group 3 · unit 0:16 · version 11" in last


def test_an_evaluation_amid_stale_units_is_no_time_of_a_step(workdir):
  """They began in step 10; the trainer waits for them when step 11 begins."""
  found = [
    span
    for span in spans()
    if (span.args["step"], span.lane) != (11, "rollout")
  ]
  stale = {"step": 11, "group": 0, "unit": "0:64", "version": 10}
  found.append(Span("generate", "rollout", 53.0, 55.5, stale))
  write_trace(workdir / "timeline.json", found)
  lines = [json.dumps(row | {"step_seconds": 4.25}) for row in rows()]
  (workdir / "metrics.jsonl").write_text("\n".join(lines))
  page = report(workdir)
  names = page.attributes("div", "data-name")
  assert "step 11 · 4.25 s" in names and "step 10 · 4.25 s" in names
  titles = page.attributes("i", "title")
  # Steps of 4.25 s; in the last two the rollout works 3 s and 0.75 s.
  busy = (11 * 2.0 + 1.0 + 0.75) / (12 * 4.25)
  assert f"busy {busy:.1%}" in titles


def test_lanes_show_their_throughput_where_it_is_known(workdir):
  assert "TFLOP/s" not in report(workdir).html
  lines = [
    json.dumps(
      row
      | {"tflops_per_second": {"rollout": 250.0 + k, "trainer": 0.5}}
      | {"mfu": {"rollout": 0.25, "trainer": None}}
    )
    for k, row in enumerate(rows(3))
  ]
  (workdir / "metrics.jsonl").write_text("\n".join(lines))
  html = report(workdir).html
  assert "50% busy<br>251 TFLOP/s a device · MFU 25.0%" in html
  assert "75% busy<br>0.5 TFLOP/s a device</small>" in html


def test_without_a_timeline_the_metrics_tell_the_shares(workdir):
  (workdir / "timeline.json").unlink()
  page = report(workdir)
  assert "Lanes" in page.headings
  assert "busy 75.0%" in page.attributes("i", "title")
  assert "<title>generate" not in page.html


@pytest.mark.parametrize(
  "name", ["config.json", "metrics.jsonl", "evaluation.json", "timeline.json"]
)
@pytest.mark.parametrize("how", ["missing", "torn"])
def test_with_a_file_missing_or_torn(workdir, name, how):
  path = workdir / name
  if how == "missing":
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[:-20])
  page = report(workdir)
  assert "Reward by step" in page.headings
  noted = f"Could not read {name}." in page.text
  assert noted == (how == "torn" and name != "metrics.jsonl")


def test_of_an_empty_directory(tmp_path):
  page = report(tmp_path)
  assert page.headings == ["Reward by step"]
  assert "No step has finished yet." in page.text


def test_of_one_step_without_numbers(tmp_path):
  row = dict.fromkeys(rows(1)[0])
  (tmp_path / "metrics.jsonl").write_text(json.dumps({**row, "step": 0}))
  page = report(tmp_path)
  assert "No step has finished yet." in page.text
  (tmp_path / "metrics.jsonl").write_text(json.dumps(rows(1)[0]))
  page = report(tmp_path)
  assert "measured once" in page.text
  (tmp_path / "evaluation.json").write_text(
    '[{"step": 0, "reward_mean": NaN}, {"step": 1, "reward_mean": 0.5}]'
  )
  assert "NaN" not in report(tmp_path).html


def test_a_curve_ends_where_evaluations_do_not_compare(tmp_path):
  row = {"split": "held_out", "reward_mean": 0.5}
  found = [
    {**row, "step": step, "setting": setting}
    for step, setting in ((0, "a"), (2, "a"), (4, "b"), (6, "b"))
  ]
  (tmp_path / "evaluation.json").write_text(json.dumps(found))
  curves = splits(load_run(tmp_path))
  assert curves == {
    "held-out": [(0, 0.5), (2, 0.5)],
    "held-out (2)": [(4, 0.5), (6, 0.5)],
  }


def test_of_no_directory(tmp_path):
  with pytest.raises(UserError, match=r"no run in .*nowhere"):
    write_report(tmp_path / "nowhere")


def test_long_runs_are_thinned():
  points = curve(rows(10 * POINTS), "reward_mean")
  assert len(points) == POINTS
  assert points[1] == (10, pytest.approx(0.25 + 0.03125 * 14.5))
  assert curve(rows(5), "kl")[4] == (4, None)


def test_smoothing_passes_over_gaps():
  points = [(0, 1.0), (1, None), (2, 3.0), (3, None), (4, None), (5, None)]
  assert smooth(points) == [
    (0, 1.0),
    (1, 2.0),
    (2, 3.0),
    (3, 3.0),
    (4, None),
    (5, None),
  ]


def test_line_chart_draws_to_scale():
  points = [(0, 1.0), (1, 3.0), (2, None), (3, 2.0)]
  chart = line_chart([Series("a<b", "red", points)], 400, 200)
  tree = ElementTree.fromstring(chart)
  (line,) = tree.findall("polyline")
  (dot,) = tree.findall("circle")  # alone between a gap and the end
  (x0, y0), (x1, y1) = (
    map(float, pair.split(",")) for pair in line.get("points").split()
  )
  x3, y3 = float(dot.get("cx")), float(dot.get("cy"))
  assert x1 - x0 == pytest.approx((x3 - x0) / 3, abs=0.2)
  assert y3 == pytest.approx((y0 + y1) / 2, abs=0.2) and y1 < y0
  titles = [t.text for t in tree.iter("title")]
  assert titles == [f"step {x}\na<b {v}" for x, v in zip(range(4), "13–2")]
  by_label = {
    t.text: float(t.get("y")) - 4
    for t in tree.findall("text")
    if t.get("text-anchor") == "end"
  }
  assert by_label["1"] == pytest.approx(y0, abs=0.1)
  assert by_label["2"] == pytest.approx(y3, abs=0.1)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 2.5e-7, 1e9])
def test_line_chart_of_a_constant(value):
  for points in ([(7, value)], [(0, value), (1, value)]):
    for zero in (False, True):
      chart = line_chart([Series("a", "red", points)], 300, 150, zero=zero)
      assert "nan" not in chart and "inf" not in chart
      ElementTree.fromstring(chart)
  assert line_chart([Series("a", "red", [(0, None)])], 300, 150) == ""
  assert line_chart([], 300, 150) == ""


def test_lanes_chart_draws_to_scale():
  units = [
    Span("train", "a", 10.0, 11.0, {"step": 0}),
    Span("train", "a", 13.0, 19.0, {"step": 0}),  # reaches beyond the window
    Span("score", "host", 10.0, 12.0, {"step": 0}),
    Span("score", "host", 11.0, 13.0, {"step": 0}),
  ]
  chart = lanes_chart(units, 10.0, 14.0, 500, scale=8.0)
  bars = ElementTree.fromstring(chart).findall("rect")
  title = {b.find("title").text.split("\n")[0]: b for b in bars}
  width = {name: float(b.get("width")) for name, b in title.items()}
  assert width["train · 6 s"] == pytest.approx(width["train · 1 s"], abs=0.1)
  assert width["idle 2 s"] == pytest.approx(2 * width["train · 1 s"], abs=0.1)
  scores = [b for b in bars if b.find("title").text.startswith("score")]
  assert scores[0].get("y") != scores[1].get("y")  # two slots


def test_ticks_and_numbers():
  assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
  assert ticks(0, 60, 12, whole=True) == [*range(0, 61, 5)]
  assert ticks(0, 2, 12, whole=True) == [0, 1, 2]
  assert ticks(3.2e-7, 8e-7, 3) == pytest.approx([4e-7, 6e-7, 8e-7])
  values = (0.41249, 1234.5, 2.43e-7, 1.0, 120, 0, None, float("nan"), 2e6)
  assert [number(v) for v in values] == [
    "0.412",
    "1,234",
    "2.4e-7",
    "1",
    "120",
    "0",
    "–",
    "–",
    "2e6",
  ]
