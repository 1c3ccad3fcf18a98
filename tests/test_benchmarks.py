"""The benchmarks themselves, at sizes that say nothing about speed."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from digen_jax.benchmarks import (
  cases,
  ladder,
  ladder_summary,
  loading,
  memory,
  models,
  output,
  overlap,
  reference,
)
from digen_jax.benchmarks.ladder import FRESH, workload_config
from digen_jax.errors import UserError
from digen_jax.models import abstract_model, lora
from digen_jax.pipeline.scheduler import Lane, start_step
from digen_jax.pipeline.steady import Pays
from digen_jax.pipeline.units import Kind, Unit, Workload, step_units
from digen_jax.timeline import Span
from digen_jax.weights import load, safetensors

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SCRIPT = Path(__file__).parents[1] / "launch" / "benchmark.py"


def test_a_table_is_aligned_markdown():
  rows = [dict(name="a", GB=0.01234), dict(name="longer", GB=None)]
  assert output.markdown(rows).splitlines() == [
    "| name   | GB     |",
    "|--------|--------|",
    "| a      | 0.0123 |",
    "| longer | –      |",
  ]


def test_unknown_names_are_refused(tmp_path):
  command = [sys.executable, SCRIPT, "nothing", f"--workdir={tmp_path}"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2
  assert "'nothing' is no benchmark: name one of" in done.stderr


@pytest.mark.parametrize(
  ("name", "flag", "words"),
  [
    # Its own: then it is the file in the way that ends it.
    ("learning", "--steps=3", "file"),
    ("learning", "--seeds=1", "file"),
    ("models", "--size=tiny", "file"),
    ("loading", "--steps=3", "--steps is a flag of learning, not of loading"),
    ("published", "--quick", "--quick is a flag of ladder, not of published"),
    ("memory", "--repetitions=2", "--repetitions is a flag of ladder, not of"),
  ],
)
def test_flags_of_one_benchmark(name, flag, words, tmp_path):
  (tmp_path / "file").touch()
  out = f"--out={tmp_path}/file/record.json"
  command = [sys.executable, SCRIPT, name, f"--workdir={tmp_path}", flag, out]
  done = subprocess.run(command, capture_output=True, text=True)
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: ") and words in line


def test_the_synthetic_checkpoint_is_one(tmp_path):
  largest = loading.write_checkpoint(tmp_path, 0.012, heads=1)
  files = safetensors.find_files(tmp_path)
  assert len(files) == loading.FILES
  sizes = [file.stat().st_size for file in files]
  assert largest == max(sizes) < 0.5 * sum(sizes)
  assert 0.008e9 < sum(sizes) < 0.016e9
  values = [x for file in files for x in load_file(file).values()]
  assert all(np.isfinite(x.astype(np.float32)).all() for x in values)
  model = load.load_model(tmp_path, dtype="bfloat16")
  assert sum(x.nbytes for x in jax.tree.leaves(model.params)) == sum(
    x.nbytes for x in values
  )


def test_loading_reports_memory_and_speed(tmp_path):
  rows = loading.run(tmp_path, gigabytes=0.012, repetitions=1, heads=1)
  assert [row["devices"] for row in rows] == [None, 1, loading.SHARDED]
  assert all(row["GB/s"] > 0 for row in rows)
  assert rows[0]["time / safetensors"] == 1.0
  record = json.loads((tmp_path / "loading.json").read_text())
  assert record["rows"] == rows
  assert record["versions"]["jax"] == jax.__version__
  # The checkpoint is gone.
  assert {x.name for x in tmp_path.iterdir()} == {"loading.md", "loading.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.CASES)
def test_tiny_models_are_measured(name):
  """What the processes do, in this one."""
  config = cases.CASES[name].config(tiny=True)
  assert config.num_layers <= 3
  for step in models.STEPS:
    ours = models._child(models.Task(name, step, "digen_jax", "auto"))
    assert (ours["size"], ours["platform"]) == ("tiny", "cpu")
    theirs = models._child(
      models.Task(name, step, "diffusers", "tiny", platform="cpu")
    )
    assert ours["seconds"] > 0 < theirs["seconds"]
    assert ours["flops"] > 0
  parity = models._child(models.Task(name, "parity", "diffusers", "tiny"))
  assert 0 < parity["difference"] < 1e-4


@pytest.mark.parametrize("name", cases.CASES)
def test_both_frameworks_train_the_same_adapters(name):
  case = cases.CASES[name]
  module = reference.build(case.raw(tiny=True), torch.float32)
  module.requires_grad_(False)
  models._adapt_torch(module)
  theirs = sum(p.numel() for p in module.parameters() if p.requires_grad)
  model = abstract_model(case.family, case.config(tiny=True))
  adapted = jax.eval_shape(
    lambda params: (
      lora.adapt(
        dataclasses.replace(model, params=params),
        rank=models.RANK,
        alpha=1.0,
        targets=models.TARGETS,
        key=jax.random.key(0),
      ).params
    ),
    model.params,
  )
  trainable, _ = lora.split_trainable(adapted, "lora")
  assert theirs == sum(x.size for x in jax.tree.leaves(trainable)) > 0


@pytest.mark.parametrize("name", cases.CASES)
def test_published_sizes_are_parsed(name):
  case = cases.CASES[name]
  config = case.config(tiny=False, remat="block")
  for number in range(len(case.workloads)):
    work = case.workload(number, tiny=False)
    assert work.latents[-1] == config.latent_channels
  assert config.num_layers >= 19


@pytest.mark.slow
def test_models_writes_a_table(tmp_path):
  rows = models.run(tmp_path, families=["wan"], repetitions=1)
  assert [(row["step"], row["by"]) for row in rows] == [
    (step, by) for step in models.STEPS for by in ("digen_jax", "diffusers")
  ]
  record = json.loads((tmp_path / "models.json").read_text())
  assert record["left_out"] == []
  assert (tmp_path / "models.md").read_text().startswith("| model")


class _Rung:
  """Takes as long, and loses as much, as it is told."""

  config = workload_config("balanced", 2, 2)

  def __init__(self, *runs):
    self.runs, self.steps = list(runs), []

  def run(self, first):
    self.steps.append(first)
    seconds, stolen = self.runs.pop(0)
    return ladder_summary.Ran([seconds] * 3, [], [], FRESH, 0.0, stolen, {})


def test_a_core_that_runs_slower_for_a_while_is_told_from_a_slower_rung():
  work = Workload(groups=4, group_size=2, window=2, pack=2)
  rung = types.SimpleNamespace(work=work)
  seconds = {Kind.GENERATE: 3.0, Kind.TRAIN: 2.0, Kind.UPDATE: 1.0}

  def ran(step, speed, version=1):
    spans = [
      Span(
        unit.kind.value,
        "rollout" if unit.kind == Kind.GENERATE else "trainer",
        0.0,
        speed * seconds.get(unit.kind, 0.0),
        {"size": unit.size, "step": 1, "version": version},
      )
      for unit in step_units(work, 1)
    ]
    return ladder_summary.Ran([step * speed], spans, [], FRESH, 0.0, 0.0, {})

  found = {
    name: [ran(8.0, 1.0), ran(8.0, 2.0)] for name in ladder_summary.RUNGS
  }
  found["tag"] = [ran(10.0, 0.5, version=0), ran(10.0, 1.0, version=0)]
  rungs = dict.fromkeys(found, rung)
  assert ladder_summary._ratios_to_before(found, "tag") == [1.6, 1.6]
  ratios = ladder_summary._ratios_at_equal_costs(rungs, found, "tag")
  assert ratios == pytest.approx([0.8, 0.8])
  # Packs of another size: the Generate units tell how fast the core was.
  rungs["tsp"] = types.SimpleNamespace(work=dataclasses.replace(work, pack=1))
  for one in found["tsp"]:
    one.spans[:] = [
      dataclasses.replace(s, end=9.0) if s.name == "train" else s
      for s in one.spans
    ]
  ratios = ladder_summary._ratios_at_equal_costs(rungs, found, "tag")
  assert ratios == pytest.approx([0.8, 0.8])
  moved = ladder_summary._moved(found["tag"])
  assert list(moved.values()) == [0.0, 0.0, 4.0]
  assert ladder_summary._moved(found["rat"])["stale"] == 0.0


def test_the_ladder_as_a_page():
  def ran(seconds):
    spans = [
      Span("train", "trainer", 7.0 + k, 7.5 + k, {"step": k}) for k in range(3)
    ] + [
      Span("publish", "trainer", 7.5 + k, 7.6 + k, {"step": k})
      for k in range(3)
    ]
    accounting = {"trainer": {"busy": 0.5 * seconds}}
    return ladder_summary.Ran(
      [seconds] * 3, spans, [], FRESH, 0.0, 0.0, accounting
    )

  names = ladder_summary.RUNGS
  table = {
    "bound_seconds": 0.5,
    "rungs": {n: {"median_seconds": 2.0 - i / 4} for i, n in enumerate(names)},
  }
  found = {n: [ran(9.0), ran(1.0)] for n in names}
  html = ladder_summary.ladder_page(
    {"balanced": ladder_summary.picture(table, found)}
  )
  assert "<h2>balanced</h2>" in html
  assert "0.5 s · 100% · 3.50×" in html  # TCSS, of the bound, to sequential
  assert 'data-name="+ TCSS · 1 s"' in html and "trainer 50%" in html
  last = html.rsplit('data-name="+ TCSS', 1)[1]
  assert last[: last.index("</svg>")].count("<title>train · 0.5 s") == 1


def test_what_others_disturbed_is_run_again_next_to_its_neighbours():
  rungs = {
    "gap": _Rung((2.0, 0.0), (2.0, 0.01), (3.0, 0.2), (2.0, 0.0)),
    "tsp": _Rung((9.0, 0.3), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)),
  }
  told = []
  ran, aside = ladder._repeat(rungs, 3, told.append)
  assert [r.seconds[0] for r in ran["tsp"]] == [1.0, 1.0, 1.0]
  assert [r.seconds[0] for r in ran["gap"]] == [2.0, 2.0, 2.0]
  assert ladder_summary._ratios_to_before(ran, "tsp") == [2.0, 2.0, 2.0]
  steps = sorted(rungs["gap"].steps + rungs["tsp"].steps)
  assert steps == list(range(0, 8 * ladder.STEPS, ladder.STEPS))
  assert "30.0 % of the processor taken away" in told[1]
  assert [r.seconds[0] for r in aside["gap"] + aside["tsp"]] == [3.0, 9.0]


def test_the_ladders_pack_is_that_of_the_shortest_step():
  """Neither that of the cheapest row, nor the largest."""
  row = {1: 4.0, 2: 3.0, 4: 2.9}
  work = types.SimpleNamespace(train_size=10)
  made = [types.SimpleNamespace(seconds=s) for s in (9.0, 5.0, 7.0)]

  def rung(name, pack):
    def predict(cost, pays):
      assert cost("rollout", Unit(Kind.GENERATE, 0)) == 5.0
      return cost("trainer", Unit(Kind.TRAIN, 0)) / pack + 2 * pack

    measure = lambda step, what: [made.pop(0)]  # noqa: E731
    return types.SimpleNamespace(
      work=work,
      program=types.SimpleNamespace(measure=measure),
      row_seconds=lambda packs: row,
      predict=predict,
    )

  # 40 + 2, 30 + 4, 29 + 8
  told = []
  assert ladder._best_pack(rung, 4, told.append) == 2
  assert "2 -> 3000.00, 34.00" in told[0]


def test_a_machine_that_is_never_quiet_ends_the_ladder_all_the_same():
  rung = _Rung((1.0, 0.5), (1.0, 0.3), *[(1.0, 0.5)] * 4)
  ran, aside = ladder._repeat({"gap": rung}, 3, lambda line: None)
  assert len(aside["gap"]) == 3
  assert not rung.runs  # as many again, and no more
  assert [r.stolen for r in ran["gap"]] == [0.3, 0.5, 0.5]  # the quietest


def _overlap(alone, together, cores=1.0):
  """`check_overlap` of two lanes that do so much a second."""
  under_way = []

  def apply(function, seconds, args):
    under_way.append(function)
    beside = under_way  # whoever else starts before the first is waited for

    def result():
      nonlocal under_way
      under_way = []
      return (together if len(beside) == 2 else alone), cores

    return types.SimpleNamespace(result=result)

  links = dict.fromkeys(("rollout", "trainer"), types.SimpleNamespace())
  for link in links.values():
    link.apply = apply
  return overlap.check_overlap(links, dict.fromkeys(links), lambda line: None)


def test_lanes_that_share_a_core_are_refused():
  found = _overlap(10.0, 9.8)
  assert found == {"solo_cores": [1.0, 1.0], "overlap": pytest.approx(1.96)}
  with pytest.raises(UserError, match=r"two lanes do 1\.20 times the work"):
    _overlap(10.0, 6.0)
  with pytest.raises(UserError, match=r"uses 1\.90 and 1\.90 cores, not one"):
    _overlap(10.0, 9.8, cores=1.9)


def test_processor_time_that_others_get_is_read():
  stat = (
    "cpu  9 9 9 9 9 9 9 9 9 9\n"
    "cpu0 100 20 30 900 50 1 2 40 7 0\n"
    "cpu1 200 0 0 900 50 0 0 60 0 0\n"
    "cpu2 900 900 900 900 900 900 900 900 0 0\n"
    "intr 17\n\n"
  )
  hertz = os.sysconf("SC_CLK_TCK")
  stolen, wanted = overlap.cpu_seconds(stat, [0, 1])
  assert stolen * hertz == pytest.approx(100)
  assert wanted * hertz == pytest.approx(193 + 260)
  stolen, wanted = overlap.cpu_seconds()
  assert 0 <= stolen <= wanted
  assert wanted > 0 or not Path("/proc/stat").exists()


def test_an_unknown_family_is_refused_before_anything_is_compiled(tmp_path):
  for benchmark in (memory, models):
    with pytest.raises(UserError, match="--families: flx unknown; there are"):
      benchmark.run(tmp_path, families=["flux", "flx"])


@pytest.mark.slow
def test_a_device_holds_its_part_of_a_full_size_step(tmp_path):
  lora, full = memory.run(tmp_path, families=["sd3"])
  assert (lora["trained"], full["trained"]) == ("adapters", "all")
  whole = full["all weights, GB"]  # in bfloat16
  assert 0.9 * whole / 8 < lora["stored on a device, GB"] < 1.2 * whole / 8
  assert 1.8 * whole / 8 < full["stored on a device, GB"] < 2.2 * whole / 8
  assert max(lora["temporaries, GB"], full["temporaries, GB"]) < whole


def test_rungs_assist_amid_stale_units_only_where_that_pays(monkeypatch):
  monkeypatch.setattr(ladder, "Search", lambda *_: lambda *_: True)
  rung = types.SimpleNamespace(team=types.SimpleNamespace(lanes=()))
  work = Workload(groups=4, group_size=2, window=1, stale=2)
  asked = Lane("trainer", frozenset()), Unit(Kind.GENERATE, 0), {}
  for last, assists, answer in (
    (1, True, True),
    (1, False, False),
    (0, False, True),
  ):
    pays = Pays(stale=True, assists=assists)
    assist = ladder._Rung.assist(rung, None, None, pays)
    assert assist(start_step(work, 0, last=last), *asked) == answer
