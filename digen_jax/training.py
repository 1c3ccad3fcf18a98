"""The training run: assemble, place, resume, loop, report."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from digen_jax import assemble, run_files
from digen_jax.checkpoint import Checkpoints
from digen_jax.config import Config, to_dict
from digen_jax.data.prompts import PromptStream, read_prompts
from digen_jax.evaluation import Evaluated, evaluate, select
from digen_jax.media import check_video_writer
from digen_jax.metrics import Progress, check_tracker
from digen_jax.optimizer import make_optimizer, make_schedule
from digen_jax.parallel.mesh import make_meshes
from digen_jax.parallel.rules import check_heads
from digen_jax.pipeline.costs import Costs
from digen_jax.pipeline.execute import UnitError, run_step
from digen_jax.pipeline.scheduler import Lane, start_step
from digen_jax.pipeline.simulate import simulate
from digen_jax.pipeline.units import Kind
from digen_jax.placement import Placement
from digen_jax.program import Program
from digen_jax.report import write_report
from digen_jax.rewards.compose import Composite, compose, parse
from digen_jax.sampler import Sampler
from digen_jax.throughput import lane_throughput, unit_flops
from digen_jax.timeline import Span, lane_accounting
from digen_jax.weights.load import fingerprint

HOST_SLOTS = 4  # reward calls under way at once


def make_lanes(mode: str) -> list[Lane]:
  """The lanes of this process, and the host threads that score."""
  host = Lane("host", frozenset({Kind.SCORE}), slots=HOST_SLOTS)
  if mode == "colocated":
    return [Lane("colocated", frozenset(Kind) - host.kinds), host]
  trainer = frozenset({Kind.TRAIN, Kind.UPDATE, Kind.PUBLISH})
  return [
    Lane("rollout", frozenset({Kind.GENERATE})),
    Lane("trainer", trainer),
    host,
  ]


class Run:
  """A training run in a directory, ready to step."""

  def __init__(self, config: Config, workdir: str | Path):
    """Checks everything and loads everything; writes nothing before that.

    Args:
      config: the run.
      workdir: its directory; an earlier run in it is resumed.

    Raises:
      UserError: anything in the configuration or the files it names that
        cannot work.
    """
    self.config, self.workdir = config, Path(workdir)
    run_files.check_workdir(self.workdir)
    check_tracker(config.tracker)
    if config.sampling.num_frames > 1:
      check_video_writer()
    self.meshes = make_meshes(
      config.pipeline.mode, config.mesh.rollout, config.mesh.trainer
    )
    prompts = read_prompts(config.prompts)
    self.reward = compose(parse(config.reward))
    held_out = read_prompts(config.eval.prompts or config.prompts)
    self.held_out = select(held_out, config)
    _probe(self.reward, prompts, config)
    assembly = assemble.assemble(config)
    model = assembly.model
    for mesh in self.meshes.values():
      heads = model.config.num_attention_heads
      check_heads(mesh, heads, model.family.class_name)
    self.fingerprint = fingerprint(config.checkpoint, config.train.lora_init)
    self.work = assembly.work
    self.stream = PromptStream(
      tuple(prompts), config.seed, config.batch.prompts
    )
    updates = config.steps * config.train.updates_per_batch
    self.schedule = make_schedule(config.train, updates)
    self.placement = Placement(
      assembly.recipe,
      make_optimizer(config.train, updates),
      self.meshes,
      assembly.weights,
    )
    embed = assemble.embedder(assembly, self.workdir / "embeddings")
    conditioning = embed(prompts)
    self.flops = unit_flops(assembly, conditioning.text.shape[1])
    self.negative = assemble.negative_conditioning(assembly, embed)
    self.program = Program(
      config,
      self.work,
      self.placement,
      self.reward,
      conditioning,
      self.negative,
    )
    self.held_out_conditioning = embed(self.held_out)
    self.sampler = Sampler(
      assembly.recipe,
      self.meshes[self.placement.rollout_lane],
      self.placement.frozen_rollout,
      self.placement.decoder,
    )
    self.lanes = make_lanes(config.pipeline.mode)
    self.costs = Costs()
    self.checkpoints = Checkpoints(
      self.workdir / "checkpoints", config.keep_checkpoints
    )
    self.step = self._resume()

  def _resume(self) -> int:
    """Loads the newest checkpoint, if any: the step to go on with."""
    found = self.checkpoints.latest()
    if found is None:
      return 0
    run_files.check_resumable(
      self.config,
      self.fingerprint,
      self.checkpoints.record(found),
      self.workdir,
    )
    self.placement.restore(self.checkpoints.load(found, self.placement.state))
    return found

  def save(self) -> None:
    """Starts a checkpoint of the state before `self.step`."""
    record = {
      "step": self.step,
      "policy_version": self.step,
      "seed": self.config.seed,
      "data_position": self.step * self.config.batch.prompts,
      "checkpoint": self.fingerprint,
      "config": to_dict(self.config),
    }
    self.checkpoints.save(self.step, self.placement.state, record)

  def evaluate(self) -> Evaluated:
    """Held-out reward of the policy, averaged if the run keeps an average."""
    return evaluate(
      self.sampler,
      self.placement.evaluated(),
      self.held_out,
      self.held_out_conditioning,
      self.negative,
      self.reward,
      self.step,
    )

  def train_one_step(self) -> tuple[dict[str, Any], list[Span]]:
    """One global step.

    Returns:
      Its line for metrics.jsonl, and its spans.

    Raises:
      UnitError: a unit failed; the state before the step has been saved where
        it still exists.
    """
    ids = self.stream.indices(self.step)
    prompts = [self.stream.prompts[i] for i in ids]
    self.program.begin_step(self.step, prompts, ids)
    predicted = self._predict()
    start = time.perf_counter()
    try:
      spans, _ = run_step(
        start_step(self.work, self.step),
        self.lanes,
        self.program.starts,
        self.costs,
      )
    except UnitError:
      if not self.program.updated:
        self.save()
      self.checkpoints.wait()
      raise
    end = time.perf_counter()
    row = self._metrics(spans, start, end)
    row["predicted_step_seconds"] = predicted
    self.step += 1
    return row, spans

  def _predict(self) -> float | None:
    """Seconds the step should take; None before anything was measured."""
    pairs = [
      (kind, lane.name) for lane in self.lanes for kind in sorted(lane.kinds)
    ]
    if not self.costs.known(pairs):
      return None
    spans = simulate(start_step(self.work, self.step), self.lanes, self.costs)
    return max(span.end for span in spans)

  def _metrics(
    self, spans: list[Span], start: float, end: float
  ) -> dict[str, Any]:
    samples, work = self.program.samples, self.work
    lanes = list(self.meshes)
    seconds = end - start
    published = [s for s in spans if s.name == Kind.PUBLISH]
    # Every lane takes part in a publish; the timeline shows it on one.
    everywhere = [
      dataclasses.replace(span, lane=lane)
      for span in published
      for lane in lanes
    ]
    accounting = lane_accounting([*spans, *everywhere], lanes, start, end)
    update = self.step * work.updates
    return {
      "step": self.step,
      "policy_version": self.step,
      **self.program.metrics(),
      **{f"reward_{n}_mean": v.mean() for n, v in samples.parts.items()},
      "learning_rate": float(self.schedule(update)),
      "staleness_mean": 0.0,
      "staleness_max": 0,
      "samples": work.samples,
      "step_seconds": seconds,
      "samples_per_second": work.samples / seconds,
      "busy_fraction": {n: accounting[n].busy / seconds for n in lanes},
      "idle_seconds": {n: accounting[n].idle for n in lanes},
      **lane_throughput(spans, self.flops, self.meshes, seconds),
      "generated_by": _count(spans, Kind.GENERATE),
      "trained_by": _count(spans, Kind.TRAIN),
      "sync_seconds": sum(s.end - s.start for s in published),
      "sync_bytes": self.program.publish_bytes,
    }

  def close(self) -> None:
    """Waits for the last checkpoint."""
    self.checkpoints.close()


def _probe(reward: Composite, prompts: list[str], config: Config) -> None:
  """Scores two pictures of noise: a reward that is down shows at once."""
  sampling = config.sampling
  frames = (sampling.num_frames,) if sampling.num_frames > 1 else ()
  shape = (2, *frames, sampling.height, sampling.width, 3)
  images = np.random.default_rng(0).random(shape, np.float32)
  reward.score(images, [prompts[0], prompts[-1]])


def _count(spans: list[Span], kind: Kind) -> dict[str, int]:
  counts: dict[str, int] = {}
  for span in spans:
    if span.name == kind:
      counts[span.lane] = counts.get(span.lane, 0) + 1
  return counts


def train(config: Config, workdir: str | Path) -> dict[str, Any]:
  """Trains to `config.steps`, resuming what is in `workdir`.

  Args:
    config: the run.
    workdir: where everything is written (see the contract of a run's files in
      README.md).

  Returns:
    {"before", "after"}: held-out reward of the starting policy and the last.

  Raises:
    UserError: bad input; the directory is as it was.
    UnitError: a unit of work failed.
  """
  run = Run(config, workdir)
  files = run_files.RunFiles(run.workdir, config, run.meshes, run.step)
  progress = Progress(config.steps, run.step, rewards=files.rewards)
  try:
    if run.step == 0:
      _evaluate(run, files, progress)
      run.save()
    if run.step < config.steps:
      progress.message(f"compiling for {run_files.describe(run.meshes)}")
      run.program.warm_up()
    while run.step < config.steps:
      row, spans = run.train_one_step()
      files.stepped(row, spans)
      progress.update(run.step, row)
      last = run.step == config.steps
      if last or _due(run.step, config.eval_every):
        _evaluate(run, files, progress)
        files.explored(run.program.samples)
      if last or _due(run.step, config.checkpoint_every):
        run.save()
  finally:
    progress.close()
    run.close()
    files.close()
  write_report(run.workdir)
  return files.summary()


def _evaluate(run: Run, files: run_files.RunFiles, progress: Progress) -> None:
  result = run.evaluate()
  files.evaluated(result)
  progress.message(
    f"held-out reward after {run.step} steps: {result.rewards.mean():.3f}"
  )


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0
