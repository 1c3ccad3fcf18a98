"""The training run: assemble, place, resume, loop, report."""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from digen_jax import assemble, auto_split, run_files
from digen_jax.config import Config, Mesh, to_dict
from digen_jax.data.prompts import PromptStream, read_prompts
from digen_jax.errors import LaneLost, UserError
from digen_jax.evaluation import Evaluated, evaluate, select, setting
from digen_jax.lanes import Team, check_lanes, divide, lane_axes, make_team
from digen_jax.links import Link
from digen_jax.media import check_video_writer
from digen_jax.metrics import Progress, check_tracker
from digen_jax.optimizer import make_schedule
from digen_jax.parallel.rules import TRAINER
from digen_jax.pipeline.cost_table import Measured
from digen_jax.pipeline.costs import Costs
from digen_jax.pipeline.execute import START_SECONDS, Executor, UnitError
from digen_jax.pipeline.scheduler import Lane, State, next_step, start_step
from digen_jax.pipeline.search import LIVE, Search
from digen_jax.pipeline.simulate import Assist, Left, always, never
from digen_jax.pipeline.steady import Pays, quick_end, what_pays
from digen_jax.pipeline.units import Kind, Unit, Workload, full_sizes
from digen_jax.program import Program
from digen_jax.report import write_report
from digen_jax.rewards.compose import Composite, compose, parse
from digen_jax.throughput import lane_throughput, unit_flops
from digen_jax.timeline import Span, lane_accounting
from digen_jax.weights.load import fingerprint

SAVED = "(the run's state has been saved: the same command goes on from it)"
LOST = "(the same command goes on from the last checkpoint)"
REVIEW_EVERY = 20  # steps; then it is seen anew what pays of TCSS


class Run:
  """A training run in a directory, ready to step."""

  def __init__(
    self, config: Config, workdir: str | Path, *, resume: bool = True
  ):
    """Checks everything that shapes tell, encodes prompts, loads weights.

    Nothing is written before the checks, and of the run nothing but the
    embeddings and a lock, which keeps other processes out until it is closed.

    Args:
      config: the run.
      workdir: its directory; an earlier run in it is resumed.
      resume: False where nothing is to be trained, and so nothing saved: the
        hosts of lanes need not see `workdir` then.

    Raises:
      UserError: anything in the configuration or the files it names that
        cannot work.
    """
    self.workdir = Path(workdir)
    _check_given(config)
    run_files.check_workdir(self.workdir)
    self._unlock: Callable[[], Any] | None = None
    if (self.workdir / run_files.LOCK).exists():  # else nothing is written yet
      self._lock()
    check_tracker(config.tracker)
    if config.sampling.num_frames > 1:
      check_video_writer()
    axes = lane_axes(config)  # enough devices?
    prompts = read_prompts(config.prompts)
    timeout = config.pipeline.reward_timeout
    self.reward = compose(parse(config.reward), timeout)
    held_out = read_prompts(config.eval.prompts or config.prompts)
    self.held_out = select(held_out, config)
    self.setting = setting(config, self.held_out)
    self.reward.check([*prompts, *self.held_out])
    _probe(self.reward, prompts, config)
    config = run_files.pin_checkpoint(config, self.workdir)
    self.config = config
    self.fingerprint = fingerprint(config.checkpoint, config.train.lora_init)
    run_files.check_earlier(config, self.fingerprint, self.workdir)
    assembly = assemble.assemble(config, weights=False)
    check_lanes(axes, assembly)
    self.work = assembly.work
    _check_stale(config, self.work)
    if self._unlock is None:
      self._lock()
      # Another process may have begun, and ended, in the meantime.
      run_files.check_earlier(config, self.fingerprint, self.workdir)
    self.stream = PromptStream(
      tuple(prompts), config.seed, config.batch.prompts
    )
    updates = config.steps * config.train.updates_per_batch
    # On the host: asking a device would wait for the units it has queued.
    schedule = make_schedule(config.train, updates)
    rates = np.asarray(schedule(jnp.arange(updates)))
    self.learning_rates = np.broadcast_to(rates, updates)
    devices = sum(math.prod(sizes.values()) for sizes in axes.values())
    mesh, search = config.mesh, auto_split.wanted(config, devices)
    found = search and auto_split.recorded(self.workdir, devices, mesh)
    if found:
      mesh, search = found, False
    # Before the denoiser is read: text encoders need not fit beside it.
    embed = assemble.embedder(assembly, self.workdir / "embeddings")
    conditioning = embed(prompts)
    self.flops = unit_flops(assembly, conditioning.text.shape[1])
    self.negative = assemble.negative_conditioning(assembly, embed)
    self.held_out_conditioning = embed(self.held_out)
    del embed
    self.team, self.split = self._place(assembly, mesh), ""

    def program(team: Team, work: Workload) -> Program:
      return Program(
        config,
        work,
        assembly.recipe,
        team,
        self.reward,
        self.stream,
        conditioning,
        self.negative,
      )

    self._program = program
    if search:
      self._choose_split(assembly, devices)
    self.lanes, links = self.team.lanes, self.team.links
    self.hardware = {name: link.hardware for name, link in links.items()}
    self.trainer = links[self.team.trainer]
    self.work = self._fitting()
    self.program = program(self.team, self.work)
    self.costs = Costs(full_sizes(self.work))
    self._search: Assist = always
    if config.pipeline.bts:
      self._search = Search(self.lanes, self.costs, LIVE)
    self.executor = Executor(
      self.lanes,
      self.program.starts,
      self.costs,
      assist=self._assist,
      retries=config.pipeline.retries,
      restarts=config.pipeline.restarts,
      revive=self.program.revive,
    )
    self._ahead: State | None = None
    self._amid = self._failed = False
    self._pays = Pays(stale=True, assists=True)
    self._reviewed = -REVIEW_EVERY
    self.step = self._resume() if resume else 0

  def _lock(self) -> None:
    """Keeps other processes out until the run is closed, or given up."""
    held = run_files.lock(self.workdir)
    self._unlock = weakref.finalize(self, os.close, held)

  def _place(self, assembly: assemble.Assembly, mesh: Mesh) -> Team:
    """Lanes with the weights of the checkpoint, which nothing else keeps."""
    config = dataclasses.replace(self.config, mesh=mesh)
    if config.pipeline.lanes == "local":  # others read it themselves
      where = assemble.training_mesh(config)
      assembly = assemble.with_weights(assembly, mesh=where, rules=TRAINER)
    return make_team(config, assembly)

  def _choose_split(self, assembly: assemble.Assembly, devices: int) -> None:
    """Places the lanes anew where another split is predicted to be faster."""
    config, work = self.config, self._fitting()
    measured = self.measure(work)
    choice = auto_split.choose(measured, work, config.pipeline, devices)
    self.split = str(choice)
    if choice.best.split == choice.equal.split:
      return
    self.team.stop()
    del self.team  # its arrays, before others are placed
    self.team = self._place(assembly, choice.placed(config.mesh))

  def measure(self, work: Workload | None = None) -> list[Measured]:
    """A unit of each kind on each lane, in two sizes; changes nothing.

    Args:
      work: what a step consists of; the run's own if None.
    """
    work = work or self.work
    sizes = dict.fromkeys((work, auto_split.smaller(work)))
    programs = [self._program(self.team, size) for size in sizes]
    return auto_split.measure(programs, step=0)

  def _fitting(self) -> Workload:
    """The work in packs of as many trained steps as fit into memory.

    Raises:
      UserError: not even the smallest that the config allows does.
    """
    pipeline, work = self.config.pipeline, self.work
    kinds = {link.hardware.device_kind for link in self.team.links.values()}
    if kinds == {"cpu"}:
      return work
    packs = [work.pack]
    if pipeline.tsp and not pipeline.timesteps_per_pack:
      packs = [n for n in range(work.pack, 0, -1) if work.window % n == 0]
    for pack in packs:
      trial = dataclasses.replace(work, pack=pack)
      if self._program(self.team, trial).fits(step=0):
        return trial
    size = full_sizes(work)[Kind.TRAIN] // min(work.pack, work.window)
    raise UserError(
      f"a Train unit of {size} samples x {pack} trained steps does not fit into "
      "the memory of a lane that trains: lower config.pipeline.train_size"
      + (" or config.pipeline.timesteps_per_pack" if pack > 1 else "")
      + ", set config.train.remat='block' or dtype.compute='bfloat16', or give "
      "config.mesh.trainer more devices"
    )

  def _assist(self, state: State, lane: Lane, unit: Unit, left: Left) -> bool:
    """Whether an idle lane should help: searched for, or always.

    Not amid stale units where the last review found that it does not pay.
    """
    forbidden = self._pays.forbid(state)
    return not forbidden and self._search(state, lane, unit, left)

  def _resume(self) -> int:
    """Loads the newest checkpoint, if any: the step to go on with."""
    _check_shared(self.team.links, self.workdir)
    self.trainer.call(
      "open_checkpoints",
      (self.workdir / "checkpoints").absolute(),
      self.config.keep_checkpoints,
    ).result()
    found = self.trainer.call("latest").result()
    if found is None:
      return 0
    self.program.restore(found)
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
    self.trainer.call("save", self.step, record).result()

  def warm_up(self) -> None:
    """Compiles for every lane; measures what each costs where that decides."""
    self.program.warm_up(self.step)
    pipeline = self.config.pipeline
    plans = pipeline.tag or pipeline.rat or pipeline.tcss
    if pipeline.mode == "disaggregated" and plans:
      self.program.calibrate(self.step, self.costs)

  def evaluate(self) -> Evaluated:
    """Held-out reward of the policy, averaged if the run keeps an average."""
    while True:
      try:
        return self._evaluate()
      except LaneLost as lost:
        if (handle := self.executor.restart(lost)) is None:
          raise
        concurrent.futures.wait([handle.future], START_SECONDS)
        if not handle.ready():
          raise

  def _evaluate(self) -> Evaluated:
    params = self.trainer.call("averaged")
    sizes = {n: self.hardware[n].size for n in self.team.rollouts}
    if self.config.pipeline.lanes == "local":  # they would take turns
      largest = max(sizes, key=sizes.__getitem__)
      sizes = {largest: sizes[largest]}

    def sample(conditioning: Any, negative: Any, seed: int) -> np.ndarray:
      common = params, conditioning, negative, seed
      pending = [
        self.team.links[lane].call("sample", *common, part)
        for lane, part in divide(len(conditioning.text), sizes).items()
      ]
      return np.concatenate([images.result() for images in pending])

    result = evaluate(
      sample,
      self.held_out,
      self.held_out_conditioning,
      self.negative,
      self.program.rate,
      self.step,
    )
    split = "held_out" if self.config.eval.prompts else "train"
    return dataclasses.replace(result, split=split, setting=self.setting)

  def train_one_step(self) -> tuple[dict[str, Any], list[Span]]:
    """One global step.

    Returns:
      Its line for metrics.jsonl, and its spans.

    Raises:
      UnitError: a unit failed; the state before the step has been saved, or
        after it if all its updates were done; see `Program.make_whole` for
        when there is neither. A note of the error says which.
    """
    start = time.perf_counter()
    self.program.begin_step(self.step)
    state = self._state()
    predicted = self._predict(state)
    self._amid = True
    try:
      spans, state = self.executor.run(state)
    except UnitError as error:
      self.rescue(error)
      raise
    end = time.perf_counter()
    self._ahead = state if state.ahead is not None else None
    row = self._metrics(spans, start, end)
    row["predicted_step_seconds"] = predicted
    self.step += 1
    self._amid = False
    return row, spans

  def rescue(self, error: Exception) -> None:
    """Saves what is whole of the training state; the error gets a note of it.

    Does nothing the second time.

    Args:
      error: what ends the run.
    """
    if self._failed:
      return
    self._failed = True
    try:
      further = self.program.make_whole() if self._amid else 0
      if further is not None:
        self.step += further
        self.save()
      self.trainer.call("wait").result()
    except LaneLost:  # the trainer: nothing is left to save
      return
    except Exception as also:
      said = " ".join(str(also).split())
      error.add_note(f"(the run's state could not be saved: {said})")
      return
    error.add_note(LOST if further is None else SAVED)

  def _state(self) -> State:
    """Where the step begins: stale units of it may be under way or done.

    None are started in the step before a checkpoint, which would lose them,
    nor where the measured costs say that they do not pay. The same costs say
    whether lanes should assist while they may start.
    """
    ends = self.step + 1
    every = self.config.checkpoint_every
    saved = ends == self.config.steps or _due(ends, every)
    if self.work.stale and not saved and self._due_for_review():
      bts = self.config.pipeline.bts
      self._pays = what_pays(self.work, self.lanes, self.costs, bts=bts)
      self._reviewed = self.step
    last = self.step if saved or not self._pays.stale else ends
    if self._ahead is not None and self._ahead.step + 1 == self.step:
      return next_step(self._ahead, last=last)
    return start_step(self.work, self.step, last=last)

  def _due_for_review(self) -> bool:
    """Whether to look again at what the measured costs say of TCSS."""
    return self._measured() and self.step >= self._reviewed + REVIEW_EVERY

  def _measured(self) -> bool:
    """Whether every lane has done all its own work."""
    pairs = [
      (kind, lane.name)
      for lane in self.lanes
      for kind in sorted(lane.kinds - {Kind.SWITCH})
    ]
    return self.costs.known(pairs)

  def _predict(self, state: State) -> float | None:
    """Seconds the step should take; None before anything was measured."""
    if not self._measured():
      return None
    assists: tuple[Assist, ...] = (always,)
    if self._pays.forbid(state):
      assists = (never,)
    elif self.config.pipeline.bts and any(i.assists for i in self.lanes):
      assists = (always, never)
    left = self.executor.left()
    return quick_end(state, self.lanes, self.costs, left, assists=assists)

  def _metrics(
    self, spans: list[Span], start: float, end: float
  ) -> dict[str, Any]:
    samples, work = self.program.samples, self.work
    lanes = list(self.hardware)
    seconds = end - start
    published = [s for s in spans if s.name == Kind.PUBLISH]
    # Every lane takes part in a publish; the timeline shows it on one.
    everywhere = [
      dataclasses.replace(span, lane=lane)
      for span in published
      for lane in lanes
    ]
    ran = [*spans, *everywhere, *self.executor.unfinished()]
    accounting = lane_accounting(ran, lanes, start, end)
    update = self.step * work.updates
    return {
      "step": self.step,
      "policy_version": self.step,
      **self.program.metrics(),
      **{f"reward_{n}_mean": v.mean() for n, v in samples.parts.items()},
      "learning_rate": float(self.learning_rates[update]),
      "samples": work.samples,
      "step_seconds": seconds,
      "samples_per_second": work.samples / seconds,
      "busy_fraction": {n: accounting[n].busy / seconds for n in lanes},
      "idle_seconds": {n: accounting[n].idle for n in lanes},
      **lane_throughput(spans, self.flops, self.hardware, seconds),
      "trained_by": _count(spans, Kind.TRAIN),
      "sync_seconds": sum(s.end - s.start for s in published),
      "sync_bytes": self.program.publish_bytes,
    }

  def close(self) -> None:
    """Waits for the last checkpoint."""
    try:
      self.trainer.call("close").result()
    except LaneLost:
      if not self._failed:  # else it has been told
        raise
    finally:
      self.team.stop()
      self._unlock()


GIVEN = {
  "checkpoint": "a diffusers pipeline, its directory or its name on the hub",
  "prompts": "a text file with a prompt per line",
  "reward": "the name of one, or FILE.py:FUNCTION",
}


def _check_given(config: Config) -> None:
  """Raises UserError for what no run can do without."""
  for name, what in GIVEN.items():
    if not getattr(config, name):
      raise UserError(f"config.{name} is not set: give {what}")


def _check_shared(links: Mapping[str, Link], workdir: Path) -> None:
  """Raises UserError where the host of a lane has another `workdir`."""
  file = (workdir / run_files.LOCK).absolute()
  for lane, link in links.items():
    if not link.call("sees", file).result():
      raise UserError(
        f"the host of lane {lane!r} does not see {file.parent}: put --workdir on "
        "a file system that all hosts of the cluster share"
      )


def _check_stale(config: Config, work: Workload) -> None:
  """Raises UserError where `pipeline.tcss` allows no stale unit."""
  if config.pipeline.tcss and not work.stale:
    units = -(-work.samples // work.generate_size)
    raise UserError(
      f"config.pipeline.tcss={config.pipeline.tcss:g} of the {units} Generate "
      "units of a step is less than one: raise it, set 0, or make more units "
      "(config.pipeline.generate_size)"
    )


@contextlib.contextmanager
def _rescued(run: Run) -> Iterator[None]:
  """Whatever ends the run, what it has trained is saved."""
  try:
    yield
  except Exception as error:
    if run.step:  # else nothing has been trained
      run.rescue(error)
    raise


@contextlib.contextmanager
def _closed(close: Callable[[], None]) -> Iterator[None]:
  """Closes at the end. What failed before is told, not what fails then."""
  try:
    yield
  except BaseException as error:
    try:
      close()
    except Exception as also:
      error.add_note(f"(and at the end: {also})")
    raise
  close()


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
    workdir: where everything is written; README.md says what.

  Returns:
    {"before", "after", "label"}: reward of the starting policy and the last,
    and on what: "held-out", or "train" where no other prompts are given. And
    {"lanes"}: how busy they were in the steps trained now, in a line.

  Raises:
    UserError: bad input; of an earlier run nothing is changed.
    UnitError: a unit of work failed.
  """
  run = Run(config, workdir)
  config = run.config  # its checkpoint is pinned
  # Each of them is closed though another fails: the last checkpoint is waited
  # for though nobody reads the progress.
  with contextlib.ExitStack() as open_things:
    open_things.enter_context(_closed(run.close))
    files = run_files.RunFiles(run.workdir, config, run.hardware, run.step)
    open_things.enter_context(_closed(files.close))
    progress = Progress(config.steps, run.step, rewards=files.rewards)
    open_things.enter_context(_closed(progress.close))
    open_things.enter_context(_rescued(run))
    ends = run.step in (0, config.steps)
    wanted = ends or _due(run.step, config.eval_every)
    # A kill came before it, or what it depends on is another now.
    if wanted and not files.has_evaluation(run.step, run.setting):
      _evaluate(run, files, progress)
    if run.step == 0:
      run.save()
    if run.split:
      progress.message(run.split)
    if run.step < config.steps:
      progress.message(f"compiling for {run_files.describe(run.hardware)}")
      run.warm_up()
    while run.step < config.steps:
      row, spans = run.train_one_step()
      files.stepped(row, spans)
      progress.update(run.step, row)
      last = run.step == config.steps
      # Saved first: an evaluation may fail, and its reward be down.
      if last or _due(run.step, config.checkpoint_every):
        run.save()
      if last or _due(run.step, config.eval_every):
        _evaluate(run, files, progress)
        files.explored(run.program.samples)
  write_report(run.workdir)
  return files.summary(run.setting)


def _evaluate(run: Run, files: run_files.RunFiles, progress: Progress) -> None:
  """Evaluates; the report then shows the run up to here."""
  result = run.evaluate()
  files.evaluated(result)
  write_report(run.workdir)
  progress.message(
    f"{result.label} reward after {run.step} steps: {result.rewards.mean():.3f}"
  )


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0
