"""Plans: what a config would take, from ledgers and tables."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from digen_jax import plan_basis, planning
from digen_jax.auto_split import techniques_of
from digen_jax.config import Dtype, from_config_dict
from digen_jax.device_costs import DEVICES, ledger_table, memories
from digen_jax.errors import UserError
from digen_jax.models import costs as model_costs
from digen_jax.parallel.mesh import lane_sizes
from digen_jax.pipeline import steady
from digen_jax.pipeline.cost_table import (
  CostTable,
  Rate,
  read_table,
  write_table,
)
from digen_jax.pipeline.planner import (
  RUNGS,
  why_not,
)
from digen_jax.pipeline.simulate import simulate
from digen_jax.pipeline.units import Workload
from digen_jax.plan_basis import Basis
from digen_jax.svg import number
from tests.small_costs import ROLE, TABLE, WORK, small_config

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "plan.py"
CONFIG = ROOT / "configs" / "tiny_shapes.py"


H100 = DEVICES["H100"]


def test_ledgers_and_figures_of_a_device_come_to_seconds():
  job = plan_basis.job_of(small_config(), "flux-dev")
  table = ledger_table(job, H100, H100, 16)
  flops = model_costs.forward(job.denoiser).flops
  assert flops == pytest.approx(74.4e12, rel=1e-3)
  # A device holds a copy in bfloat16, and a trainer's a part.
  assert (table.rollout.shards, table.trainer.shards) == (1, 1)
  assert table.rollout.generate.row == pytest.approx(20 * flops / (989e12 / 2))
  # Forward, recomputation but for the ends, and twice the forward.
  assert table.trainer.train.row == pytest.approx(
    4 * flops / (989e12 * 0.4), rel=0.01
  )
  # What is published is bfloat16, and each device sends its part.
  weights = 2 * job.parameters
  assert table.trainer.publish.row == pytest.approx(weights / 50e9)
  # Gathered in every step; for a gradient twice, and that comes in float32.
  assert table.trainer.generate.fixed == pytest.approx(20 * weights / 450e9)
  assert table.rollout.generate.fixed == 0
  assert table.trainer.train.fixed == pytest.approx(4 * weights / 450e9)
  # In float32 a copy of Qwen-Image takes two devices.
  wide = plan_basis.job_of(small_config(), "qwen-image")
  wide = dataclasses.replace(wide, itemsize=4)
  flops = model_costs.forward(wide.denoiser).flops
  shared = ledger_table(wide, H100, H100, 16).rollout
  assert shared.shards == 2
  # Its devices divide a forward pass; each of them decodes the whole row.
  half = dataclasses.replace(wide, itemsize=2)
  alone = ledger_table(half, H100, H100, 16).rollout
  assert alone.shards == 1
  assert shared.decode.row == pytest.approx(2 * alone.decode.row)
  assert shared.generate.row == pytest.approx(
    20 * wide.passes * flops / (989e12 / 2 / 2) / 0.9
  )
  lora = dataclasses.replace(job, lora_rank=16)
  small = ledger_table(lora, H100, H100, 16)
  assert small.trainer.shards == 1
  assert small.trainer.train.row < table.trainer.train.row
  assert small.trainer.publish.fixed < 0.1 * table.trainer.publish.fixed
  assert small.trainer.room(8) > table.trainer.room(8)
  with pytest.raises(UserError, match=r"11\.9e9 weights does not fit"):
    ledger_table(job, DEVICES["TPU v5e"], DEVICES["TPU v5e"], 16)


def test_computing_in_float32_is_slower_and_larger():
  job = plan_basis.job_of(small_config(), "flux-dev")
  job = dataclasses.replace(job, lora_rank=16)
  wide = dataclasses.replace(job, itemsize=4)
  tables = [ledger_table(j, H100, H100, 32) for j in (job, wide)]
  for role in ("rollout", "trainer"):
    half, full = (table.role(role) for table in tables)
    assert half.shards == full.shards == 1
    assert full.generate.row == pytest.approx(2 * half.generate.row)
    assert full.train.row == pytest.approx(2 * half.train.row)
  memory = [memories(j, H100, H100, 32) for j in (job, wide)]
  half, full = (m["trainer"] for m in memory)
  assert full.weights == 2 * half.weights
  half, full = (m["rollout"] for m in memory)
  parameters = job.parameters + job.trained
  assert (half.weights, full.weights) == (2 * parameters, 4 * parameters)
  assert full.row == pytest.approx(2 * half.row)


def test_memory_counts_copies_as_lanes_hold_them():
  job = plan_basis.job_of(small_config(), "sd3.5-medium")
  size, blocks = 2 * job.parameters, job.denoiser.depth  # bfloat16
  plain = memories(job, H100, H100, 16)
  assert {m.shards for m in plain.values()} == {1}
  # Two layers, beside what is published where both are on one lane.
  layers = 2 * size / blocks
  assert plain["rollout"].weights == size
  assert plain["trainer"].weights == layers
  assert plain["colocated"].weights == size + layers
  assert {m.gradient for m in plain.values()} == {2 * size / blocks}
  # A gradient; weights, two moments, two gradients, and weights as read.
  assert [m.state / size for m in plain.values()] == [2, 11, 11]
  more = dataclasses.replace(job, average=True, reference=True)
  found = memories(more, H100, H100, 16)
  assert [m.state / size for m in found.values()] == [2, 14, 14]
  assert [m.reference / size for m in found.values()] == [1, 0, 0]
  assert found["rollout"].rows < plain["rollout"].rows
  more = dataclasses.replace(job, held=3, borrows=True)
  found = memories(more, H100, H100, 16)
  assert [m.state / size for m in found.values()] == [8, 17, 17]
  assert found["rollout"].weights == 2 * size
  assert found["trainer"].weights == layers
  more = dataclasses.replace(job, average=True, reference=True)
  lora = dataclasses.replace(more, lora_rank=8)
  found = memories(lora, H100, H100, 16)["trainer"]
  assert found.state == pytest.approx(14 * 2 * lora.trained + size)
  assert found.weights == layers


def test_a_residual_stream_is_whole_on_every_device_of_a_row():
  job = plan_basis.job_of(small_config(), "sd3.5-medium")
  one = memories(job, H100, H100, 16)["rollout"]
  four = memories(job, H100, H100, 16, {"rollout": {"tensor": 4}})["rollout"]
  stream = job.passes * model_costs.saved_bytes(job.denoiser, remat="block")
  assert four.shards == 4 and four.weights == one.weights / 4
  assert four.row - stream == pytest.approx((one.row - stream) / 4)
  assert four.row > stream > 0.5 * one.row


def ledger_plan(config, devices=16, model="flux-dev", **options):
  basis = plan_basis.from_ledgers(config, H100, H100, devices, model)
  work = Workload(4, 8, 8, pack=config.pipeline.timesteps_per_pack or 8)
  return planning.make_plan(config, work, basis, devices, **options)


def test_a_plan_and_its_files(tmp_path):
  config = small_config(tag=True, rat=True, tcss=0.5)
  assert techniques_of(config.pipeline) == RUNGS["tcss"]
  plan = ledger_plan(config, price=2.0)
  text = planning.plan_text(plan)
  assert f"best: {plan.fastest}" in text and "at 2 a device hour" in text
  planning.write_plan(plan, tmp_path)
  written = json.loads((tmp_path / "plan.json").read_text())
  assert list(written["ladder"]) == list(RUNGS)
  best = written["best"][written["fastest"]]
  assert best["step_seconds"] <= written["configured"]["step_seconds"]
  assert read_table(tmp_path / "costs.json") == plan.basis.table
  page = (tmp_path / "plan.html").read_text()
  assert page.count('class="panel"') == 2 * len(RUNGS)
  trace = json.loads((tmp_path / "timeline.json").read_text())
  assert any(e["name"] == "generate" for e in trace["traceEvents"])


def test_a_plan_says_what_a_step_computes_and_what_devices_hold():
  config = small_config()
  mesh = dataclasses.replace(
    config.mesh, rollout={"data": 8}, trainer={"fsdp": 2, "tensor": 4}
  )
  plan = ledger_plan(dataclasses.replace(config, mesh=mesh))
  job = plan_basis.job_of(small_config(), "flux-dev")
  forward = model_costs.forward(job.denoiser).flops
  decode = model_costs.forward(job.decoder).flops
  # 32 samples of 20 steps, 8 of them trained: forward, and twice that.
  generate, train = 32 * (20 * forward + decode), 32 * 8 * 3 * forward
  assert plan.tflop["generate"] == pytest.approx(generate / 1e12)
  assert plan.tflop["train"] == pytest.approx(train / 1e12)
  seconds = plan.configured.step_seconds
  mfu = (generate + train) / seconds / (16 * 989e12)
  assert plan.mfu(plan.configured) == pytest.approx(mfu)
  assert 0.1 < mfu < 0.5
  text = planning.plan_text(plan)
  assert f"MFU {mfu:.1%}" in text
  shown = number(generate / 1e15)
  assert f"FLOPs of a step: {shown} PFLOP generating" in text
  size = 2 * job.parameters / 2**30
  layer = size / job.denoiser.depth
  assert (
    f"trainer (8 devices, 4 to a row): weights {2 * layer / 4:.1f}, gradient "
    f"of a layer {2 * layer / 4:.1f}, in parts {11 * size / 8:.1f}"
  ) in text
  assert "'tensor':4" in text  # the flags ask for what the plan assumes


def test_a_config_that_does_not_fit_is_told_and_not_timed():
  config = small_config(timesteps_per_pack=8)
  video = dict(height=480, width=832, num_frames=81)
  sampling = dataclasses.replace(config.sampling, **video)
  config = dataclasses.replace(config, sampling=sampling)
  plan = ledger_plan(config, model="wan2.1-14b")
  said = plan.unfit["configured"]
  assert "a Train unit has 64 rows" in said and "holds" in said
  assert plan.configured is None and "tsp" not in plan.rungs
  text = planning.plan_text(plan)
  assert f"as configured: {said}\n" in text
  assert "+ TSP: does not fit" in text
  for name, best in plan.best.items():
    assert why_not(plan.basis.table, plan.work, best.split, RUNGS[name]) == ""
  assert planning.plan_dict(plan)["configured"] is None
  # Left to the run, packs are cut to what divides the trained steps and fits.
  tight = dataclasses.replace(ROLE, max_rows=26)
  table = CostTable(tight, tight)
  work = Workload(4, 8, 8, pack=8)
  plan = planning.make_plan(small_config(), work, Basis(table), 2)
  assert plan.configured.split.pack == 2  # 3 would fit
  assert plan.rungs["tsp"].split.pack == 2


def test_devices_that_divide_tokens_hold_more_rows():
  """A sequence axis divides activations and work, and no weights."""
  config, found = small_config(), {}
  for name, axes in (
    ("whole", {}),
    ("tokens", {"sequence": 2}),
    ("heads", {"tensor": 2}),
    ("both", {"sequence": 2, "tensor": 2}),
  ):
    rollout = {"data": 8 // math.prod(axes.values()), **axes}
    trainer = {"fsdp": rollout["data"], **axes}
    mesh = dataclasses.replace(config.mesh, rollout=rollout, trainer=trainer)
    plan = ledger_plan(dataclasses.replace(config, mesh=mesh))
    found[name] = plan.basis.memory["rollout"]
    assert not plan.unfit and plan.split.rollout == 8
    flags = planning.as_flags(plan.split, RUNGS["tcss"], plan.basis.table)
    asked = re.findall(r'mesh\.(\w+)="(\{.*?\})"', flags)
    if axes:
      sent = from_config_dict({"mesh": dict(asked)}).mesh
      assert (sent.rollout, sent.trainer) == (rollout, trainer)
    else:
      assert not asked and "--config.mesh.rollout=8" in flags
  assert found["tokens"].weights == found["whole"].weights
  # All keys and values are on every device.
  assert 0.5 < found["tokens"].row / found["whole"].row < 0.7
  assert found["heads"].weights == found["whole"].weights / 2
  assert found["both"].weights == found["heads"].weights
  assert 0.5 < found["both"].row / found["heads"].row < 0.7
  assert found["both"].shards == 4 and found["both"].sequence == 2


def test_devices_that_divide_tokens_gather_all_weights():
  """Those that divide heads gather a part each."""
  job = plan_basis.job_of(small_config(), "flux-dev")
  gathered = {
    axis: ledger_table(
      job, H100, H100, 16, {"trainer": {axis: 2}}
    ).trainer.generate.fixed
    for axis in ("tensor", "sequence")
  }
  assert gathered["sequence"] == pytest.approx(2 * gathered["tensor"])


def test_a_table_whose_sequence_axis_is_no_part_of_a_row_is_refused(tmp_path):
  path = tmp_path / "costs.json"
  write_table(path, CostTable(dataclasses.replace(ROLE, shards=4), ROLE))
  assert read_table(path).rollout.sequence == 1
  wrong = dataclasses.replace(ROLE, shards=4, sequence=3)
  write_table(path, CostTable(wrong, ROLE))
  with pytest.raises(UserError, match=r"rollout\.sequence, 3, must divide"):
    read_table(path)


def test_a_mesh_that_holds_no_row_is_told():
  config = small_config()
  config = dataclasses.replace(config, dtype=Dtype("float32"))
  mesh = dataclasses.replace(config.mesh, rollout=8, trainer=8)
  plan = ledger_plan(dataclasses.replace(config, mesh=mesh), model="qwen-image")
  assert "a row of config.mesh.rollout is shared by 1" in str(plan.unfit)
  assert plan.configured is None and not plan.rungs
  assert plan.best
  mesh = dataclasses.replace(
    mesh, rollout={"data": 2, "tensor": 4}, trainer={"fsdp": 2, "tensor": 4}
  )
  plan = ledger_plan(dataclasses.replace(small_config(), mesh=mesh))
  assert plan.basis.table.rollout.shards == 4
  assert not plan.unfit and plan.configured.split.rollout == 8


def test_a_rung_that_fits_nowhere_leaves_the_others():
  """A lane with both roles holds the published weights beside its parts."""
  small = dataclasses.replace(H100, memory=36.0)
  basis = plan_basis.from_ledgers(small_config(), small, small, 8, "flux-dev")
  assert basis.table.trainer.room(8) > 0 == basis.table.colocated.room(8)
  none = dataclasses.replace(TABLE.trainer, max_rows=0.5)
  basis = Basis(dataclasses.replace(TABLE, colocated=none))
  work = Workload(4, 8, 8, pack=8)
  plan = planning.make_plan(small_config(), work, basis, 8)
  assert list(plan.best) == [name for name in RUNGS if name != "colocated"]
  assert "memory of the colocated lane" in plan.unfit["colocated"]
  said = "does not fit, whatever the split"
  assert said in planning.plan_text(plan) and said in planning.plan_page(plan)
  colocated = small_config(mode="colocated")
  plan = planning.make_plan(colocated, work, basis, 8)
  assert plan.configured is None and plan.best
  tiny = dataclasses.replace(H100, memory=16.0)
  with pytest.raises(UserError, match="does not fit"):
    plan_basis.from_ledgers(small_config(), tiny, tiny, 8, "flux-dev")


def test_a_plan_for_thousands_of_devices(monkeypatch):
  """Of a thousand groups, in a million simulated units: half a minute."""
  units = 0

  def counted(*args, **options):
    nonlocal units
    spans = simulate(*args, **options)
    units += len(spans)
    return spans

  monkeypatch.setattr(steady, "simulate", counted)
  config = small_config(tag=True, rat=True, tcss=0.5)
  basis = plan_basis.from_ledgers(config, H100, H100, 4096, "flux-dev")
  work = Workload(1024, 8, 8, pack=8, gap=True, stale=512)
  plan = planning.make_plan(config, work, basis, 4096)
  assert set(plan.best) == set(plan.rungs) == set(RUNGS)
  assert plan.configured.split.devices == 4096
  assert units < 1_500_000
  # It says what holds the steps up.
  (rewards,) = [line for line in planning.plan_text(plan).splitlines()
                if line.startswith("best: ")]  # fmt: skip
  best = plan.best[plan.fastest]
  assert best.scoring_seconds == pytest.approx(1024 * 8 * 0.1 / 4)
  assert best.step_seconds == pytest.approx(best.scoring_seconds)
  assert "the rewards alone take 205 s of a step: more" in rewards
  assert "the rewards alone" not in planning._describe(plan, plan.configured)


def test_threads_that_would_have_nothing_to_do_are_not_advised():
  """A unit of a step for each of the four: they take as long as one does."""
  table = dataclasses.replace(TABLE, score=Rate(900.0))
  for size, said in ((8, False), (4, True)):
    config = small_config(generate_size=size)
    work = Workload(4, 8, 8, generate_size=size, train_size=8, pack=8)
    plan = planning.make_plan(config, work, Basis(table), 8)
    text = planning._describe(plan, plan.configured)
    assert ("the rewards alone take" in text) == said


def test_lanes_that_differ_are_among_the_best():
  """Where the five cannot be divided evenly, and a unit fills no lane."""
  mesh = {"rollout": [1, 4], "trainer": 3}
  config = from_config_dict({"mesh": mesh})
  role = dataclasses.replace(
    ROLE, generate=Rate(4.0, 0.0), train=Rate(0.0, 1e-3)
  )
  basis = Basis(CostTable(role, role, resize=False), apart=True)
  plan = planning.make_plan(config, WORK, basis, 8)
  assert plan.configured.split.uneven == (1, 4)
  assert list(plan.configured.lanes) == ["rollout0", "rollout1", "trainer"]
  assert plan.best["gap"].split.uneven == (1, 4)
  assert "rollout lanes of 1, 4" in planning.plan_text(plan)


def test_two_kinds_of_device_keep_their_roles():
  slow = dataclasses.replace(ROLE, generate=Rate(0.0, 40.0))
  table = CostTable(slow, slow)
  work = dataclasses.replace(WORK, generate_size=16)
  for apart in (False, True):
    basis = Basis(table, apart=apart)
    plan = planning.make_plan(small_config(), work, basis, 8)
    halves = [p.split.rollout == 4 for p in plan.best.values()]
    assert all(halves[1:]) == apart
    assert (plan.configured.split.rollout == 4) == apart
  basis = plan_basis.from_ledgers(
    small_config(), DEVICES["A100"], H100, 32, "sd3.5-medium"
  )
  assert basis.apart and basis.peaks == {"rollout": 312, "trainer": 989}


def start(*args):
  return subprocess.run(
    [sys.executable, SCRIPT, f"--config={CONFIG}", *args],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def test_a_plan_as_users_start_it(tmp_path):
  done = start(
    "--device=H100",
    "--devices=8",
    "--price=2.5",
    "--config.batch.prompts=2",
    "--config.batch.group_size=4",
    "--config.pipeline.generate_size=4",
    "--config.pipeline.train_size=4",
    f"--out={tmp_path / 'plan'}",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("8 devices; 8 samples a step")
  for said in ("memory of a device", "FLOPs of a step", "MFU", "best: "):
    assert said in done.stdout
  written = json.loads((tmp_path / "plan" / "plan.json").read_text())
  assert written["does_not_fit"] == {}


@pytest.mark.parametrize(
  ("args", "said"),
  [
    (
      ["--model=wan2.1-14b"],
      "--model=wan2.1-14b does nothing without --device",
    ),
    (["--device=H100", "--mfu=40"], "--mfu=40 is a part of the peak"),
    (["--device=H100", "--mfu=0"], "--mfu=0 is a part of the peak"),
    (["--price=-1"], "--price=-1 is what a device costs an hour"),
    (["--rollout_lanes=0"], "--rollout_lanes=0 must be at least 1"),
  ],
)
def test_flags_that_do_nothing_or_cannot_be(args, said):
  done = start(*args)
  assert done.returncode == 2
  assert said in done.stderr and done.stderr.count("\n") == 1


def test_plans_for_one_device_and_for_too_many(tmp_path):
  config = small_config()
  plan = planning.make_plan(config, WORK, Basis(TABLE), 1)
  assert plan.fastest == "colocated"
  config = from_config_dict({"mesh": {"rollout": 6, "trainer": {"fsdp": 4}}})
  with pytest.raises(UserError, match=r"6 \+ 4 devices"):
    planning.make_plan(config, WORK, Basis(TABLE), 8)
  lanes = [{"data": 1, "tensor": 2}, {"data": 2}]
  config = from_config_dict({"mesh": {"rollout": lanes, "trainer": 3}})
  with pytest.raises(UserError, match="lanes that share a row in different"):
    plan_basis.row_axes(config, "rollout")
  config = from_config_dict({"mesh": {"rollout": "six"}})
  with pytest.raises(UserError, match=r"mesh\.rollout takes a device count"):
    planning.make_plan(config, WORK, Basis(TABLE), 8)
  with pytest.raises(UserError, match="no figures of a device"):
    plan_basis.find_device("H10")
  with pytest.raises(UserError, match="no published model"):
    plan_basis.job_of(config, "flux")


@pytest.mark.parametrize(
  ("rollout", "trainer", "split"),
  [
    ([2, 2], 4, (4, 4)),
    ([{"data": 2}] * 3, "auto", (6, 2)),
    (["auto"] * 2, 4, (4, 4)),
    (["auto"] * 2, "auto", (4, 4)),
    ([1, 2], 5, (3, 5)),
    (["auto"] * 2, 3, (5, 3)),
    ([{"data": 4}, "auto"], 1, (7, 1)),
  ],
)
def test_several_rollout_lanes_are_planned(rollout, trainer, split):
  mesh = {"rollout": rollout, "trainer": trainer}
  config = from_config_dict({"mesh": mesh})
  plan = planning.make_plan(config, WORK, Basis(TABLE), 8)
  assert (plan.split.rollout, plan.split.trainer) == split
  axes = lane_sizes(config.mesh.rollout, config.mesh.trainer, 8)
  *sizes, _ = [math.prod(shape.values()) for shape in axes.values()]
  assert plan.split.rollouts == tuple(sizes)
  lanes = [f"rollout{i}" for i in range(len(rollout))]
  assert list(plan.configured.lanes) == [*lanes, "trainer"]
  flags = planning.as_flags(plan.split, RUNGS["tcss"], TABLE)
  asked = re.search(r'mesh\.rollout="(\[.*?\])"', flags)[1]
  assert "--config.pipeline.bts=True" in flags  # the config may say no
  again = from_config_dict({"mesh": {"rollout": asked, "trainer": split[1]}})
  assert planning.configured_split(again, WORK, 8) == plan.split


@pytest.mark.parametrize(
  "tsp, pack, trained", [(True, 1, 1), (True, 2, 2), (False, 1, 8)]
)
def test_packs_are_planned_as_configured(tsp, pack, trained):
  config = small_config(tsp=tsp, timesteps_per_pack=pack, reward_slots=3)
  work = Workload(4, 8, 8, pack=pack)
  plan = planning.make_plan(config, work, Basis(TABLE), 2)
  assert plan.rungs["tsp"].split.pack == trained
  assert plan.rungs["tsp"].techniques.reward_slots == 3
  assert plan.configured.split.pack == trained


def test_a_published_model_is_planned_at_the_size_of_the_config():
  own = plan_basis.from_ledgers(small_config(), H100, H100, 8, "flux-dev")
  half = small_config()
  sampling = dataclasses.replace(half.sampling, height=512, width=512)
  half = dataclasses.replace(half, sampling=sampling)
  less = plan_basis.from_ledgers(half, H100, H100, 8, "flux-dev")
  assert "1 x 512 x 512" in less.assumed[0]
  assert less.flops.sample < own.flops.sample
  toy = dataclasses.replace(
    half, sampling=dataclasses.replace(sampling, height=32, width=32)
  )
  found = plan_basis.from_ledgers(toy, H100, H100, 8, "flux-dev")
  assert "1 x 1024 x 1024" in found.assumed[0]
  # What the config leaves open is the model's.
  found = plan_basis.from_ledgers(half, H100, H100, 8, "qwen-image")
  assert found.assumed[0].endswith("1 x 512 x 512; guidance 4.0")
  found = plan_basis.from_ledgers(half, H100, H100, 8, "wan2.1-1.3b")
  assert "81 x 512 x 512" in found.assumed[0]


def test_a_plan_does_not_replace_what_a_run_measured(tmp_path):
  planning.check_out(tmp_path)
  planning.check_out(tmp_path / "new")
  (tmp_path / "metrics.jsonl").touch()
  with pytest.raises(UserError, match=r"directory of a run.*such as .*/plan"):
    planning.check_out(tmp_path)
  with pytest.raises(UserError, match="is a file"):
    planning.check_out(tmp_path / "metrics.jsonl")
