"""A denoising step and a training step of every family, beside diffusers.

Every figure is taken in a process of its own, so that frameworks do not share
a device's memory and its peak is that of one step: random bfloat16 weights are
made on the device, the step is compiled and run once, then timed. Where a
workload does not fit, the next smaller one is tried. On CPU the models are
tiny, and so is what their figures say.

denoise: one transition of the sampler for one sample, no guidance: one forward.
train: the gradient of the GRPO loss in LoRA adapters of every attention and
feed-forward layer for one transition, blocks recomputed; by diffusers, the
gradient of a mean square in the same adapters with gradient checkpointing.

FLOPs are those of the mathematics (`models/costs.py`): neither what is
recomputed nor, for adapters, their own.
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from digen_jax.benchmarks import output
from digen_jax.benchmarks.cases import (
  CASES,
  Case,
  chosen,
  inputs,
  random_params,
)
from digen_jax.errors import UserError

ROOT = Path(__file__).parents[2]
RANK = 32
TARGETS = ("attn", "ff")
# The same layers by the names that PEFT matches.
PEFT_TARGETS = (
  r".*\.(attn\d?\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)"
  r"|(ff|ff_context|ffn|img_mlp|txt_mlp)\.net\.(0\.proj|2))"
)
STEPS = ("denoise", "train")
OUT_OF_MEMORY = "out of memory"
TERA, GIGA = 1e12, 1e9
LIMIT_S = 1800  # of one process


@dataclasses.dataclass(frozen=True)
class Task:
  """What one process measures.

  Attributes:
    case: key of `CASES`.
    step: "denoise", "train", or "parity" for outputs instead of times.
    framework: who computes it, "digen_jax" or "diffusers".
    size: "tiny", "full", or "auto".
    workload: number of the case's workload.
    repetitions: timed runs.
    platform: JAX's name of the devices, which diffusers is to use, too.
  """

  case: str
  step: str
  framework: str
  size: str
  workload: int = 0
  repetitions: int = 1
  platform: str = ""


def run(
  workdir: str | Path,
  *,
  families: Sequence[str] | None = None,
  size: str = "auto",
  repetitions: int = 3,
) -> list[dict[str, Any]]:
  """Measures, prints and keeps the table; returns its rows.

  Args:
    workdir: for the results.
    families: keys of `cases.CASES`; None means all.
    size: of the models: "tiny", "full", or "auto": tiny on CPU.
    repetitions: timed runs of every step.

  Raises:
    UserError: an unknown family.
  """
  rows, where, left_out = [], {}, []
  for name in chosen(families):
    parity = _measure(Task(name, "parity", "diffusers", size))
    found = {"parity": parity}
    for step in STEPS:
      ours, theirs = _pair(Task(name, step, "digen_jax", size, 0, repetitions))
      found |= {f"{step}, digen_jax": ours, f"{step}, diffusers": theirs}
      if "seconds" not in ours:
        continue
      where = ours["where"]
      difference = parity.get("difference") if step == "denoise" else None
      rows.append(_row(name, step, ours, ours, theirs, difference))
      if "seconds" in theirs:
        rows.append(_row(name, step, theirs, ours))
    for what, result in found.items():
      if "skipped" in result:
        left_out.append(f"{name}, {what}: {result['skipped']}")
        print(f"left out: {left_out[-1]}")
    if rows:  # after every family: a run may be cut short
      output.write(workdir, "models", rows, {"left_out": left_out}, where)
    print(f"{name}: done", flush=True)
  if not rows:
    raise UserError(f"nothing was measured: {'; '.join(left_out)}")
  output.save(workdir, "models", rows, {"left_out": left_out}, where)
  return rows


def _pair(task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
  """Our step on the largest workload that fits, and diffusers' on the same."""
  ours: dict[str, Any] = {}
  for number in range(len(CASES[task.case].workloads)):
    ours = _measure(dataclasses.replace(task, workload=number))
    if ours.get("skipped") != OUT_OF_MEMORY:
      break
  if "seconds" not in ours:
    return ours, {}
  shared = {key: ours[key] for key in ("size", "workload", "platform")}
  return ours, _measure(
    dataclasses.replace(task, framework="diffusers", **shared)
  )


def _row(
  name: str,
  step: str,
  found: dict[str, Any],
  ours: dict[str, Any],
  theirs: dict[str, Any] | None = None,
  difference: float | None = None,
) -> dict[str, Any]:
  """A line of the table; with `theirs` it is ours, beside that."""
  ratio = None
  if theirs and "seconds" in theirs:
    ratio = ours["seconds"] / theirs["seconds"]
  rate = ours["flops"] / found["seconds"] / TERA
  peak, memory = ours["peak_tflops"], found["peak_bytes"]
  return {
    "model": CASES[name].name,
    "workload": ours["name"],
    "step": step,
    "by": "diffusers" if theirs is None else "digen_jax",
    "ms": found["seconds"] * 1e3,
    "time / diffusers": ratio,
    "TFLOP/s": rate,
    "MFU": rate / peak if peak else None,
    "peak GB": memory / GIGA if memory else None,
    "float32 difference": None if difference is None else f"{difference:.1e}",
  }


def _measure(task: Task) -> dict[str, Any]:
  """One task in a process of its own; {"skipped": why} if it could not be."""
  if task.framework == "diffusers" and not find_spec("diffusers"):
    return {"skipped": "diffusers is not installed"}
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
  environment["PYTHONPATH"] = path
  if task.framework == "diffusers" and task.step != "parity":
    environment["JAX_PLATFORMS"] = "cpu"  # leaves the device's memory alone
  try:
    done = subprocess.run(
      [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(task))],
      env=environment,
      capture_output=True,
      text=True,
      timeout=LIMIT_S,
    )
  except subprocess.TimeoutExpired:
    return {"skipped": f"longer than {LIMIT_S} s"}
  if done.returncode == 0:
    return json.loads(done.stdout.splitlines()[-1])
  text = done.stderr.strip() or f"exit status {done.returncode}"
  if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
    return {"skipped": OUT_OF_MEMORY}
  return {"skipped": text.splitlines()[-1]}


def _child(task: Task) -> dict[str, Any]:
  """What one process measures and reports."""
  if task.step == "parity":
    return {"difference": _difference(CASES[task.case])}
  if task.framework == "diffusers":
    return _torch_step(task)
  return _jax_step(task)


def _jax_step(task: Task) -> dict[str, Any]:
  import jax
  import jax.numpy as jnp

  from digen_jax import models, throughput
  from digen_jax.models import costs

  case, device = CASES[task.case], jax.devices()[0]
  size = task.size
  if size == "auto":
    size = "tiny" if device.platform == "cpu" else "full"
  tiny = size == "tiny"
  config = case.config(tiny=tiny, dtype=jnp.dtype("bfloat16"), remat="block")
  work = case.workload(task.workload, tiny=tiny)
  model = models.abstract_model(case.family, config)
  params = random_params(model.params, jax.random.key(0), jnp.bfloat16)
  model = dataclasses.replace(model, params=params)
  arguments = jax.device_put(inputs(case, config, work))
  make = _denoise if task.step == "denoise" else _train
  step, arguments = make(model, *arguments)
  call = jax.jit(step).lower(*arguments).compile()
  seconds = _time(
    lambda: jax.block_until_ready(call(*arguments)), task.repetitions
  )
  ledger = costs.DENOISERS[case.family.class_name](
    config, work.latents, work.text
  )
  flops = costs.forward(ledger).flops
  if task.step == "train":
    flops += costs.backward(ledger, lora=True).flops
  memory = device.memory_stats() or {}
  return {
    "seconds": seconds,
    "flops": flops,
    "peak_tflops": throughput.peak_tflops(device.device_kind),
    "peak_bytes": memory.get("peak_bytes_in_use"),
    "name": work.name,
    "size": size,
    "workload": task.workload,
    "platform": device.platform,
    "where": output.environment(),
  }


def _kernel() -> Callable[..., Any]:
  from digen_jax.sampling.kernels import make_kernel

  return make_kernel("flow_sde", noise_level=0.7, sigma_max=0.95)


def _denoise(model: Any, x: Any, sigma: Any, told: Any) -> tuple[Any, tuple]:
  """A sampler's step, and what it is called with."""
  from digen_jax.sampling.denoise import denoise_step

  def step(params: Any, x: Any, sigma: Any, told: Any) -> Any:
    transition = denoise_step(
      model.apply, params, x, told, sigma, sigma - 0.05, kernel=_kernel()
    )
    return transition.mean

  return step, (model.params, x, sigma, told)


def _train(model: Any, x: Any, sigma: Any, told: Any) -> tuple[Any, tuple]:
  """A gradient in adapters, and what it is called with."""
  import jax
  import jax.numpy as jnp

  from digen_jax.grpo.train_step import train_step
  from digen_jax.models import lora
  from digen_jax.types import TrainBatch

  model = lora.adapt(
    model,
    rank=RANK,
    alpha=RANK,
    targets=TARGETS,
    key=jax.random.key(1),
  )
  trainable, frozen = lora.split_trainable(model.params, "lora")
  ones = jnp.ones_like(sigma)
  batch = TrainBatch(
    x=x,
    x_next=0.97 * x,
    sigma=sigma,
    sigma_next=sigma - 0.05,
    old_log_prob=0 * ones,
    advantage=ones,
    weight=ones,
    conditioning=told,
  )

  def step(trainable: Any, frozen: Any, batch: TrainBatch) -> Any:
    return train_step(
      model.apply,
      trainable,
      batch,
      kernel=_kernel(),
      clip_range=1e-4,
      frozen=frozen,
    )

  return step, (trainable, frozen, batch)


def _torch_step(task: Task) -> dict[str, Any]:
  import jax
  import torch

  from digen_jax.benchmarks import reference

  device = {"cpu": "cpu", "gpu": "cuda"}.get(task.platform)
  if device is None or (device == "cuda" and not torch.cuda.is_available()):
    return {"skipped": "torch does not see this device"}
  case, tiny = CASES[task.case], task.size == "tiny"
  work = case.workload(task.workload, tiny=tiny)
  module = reference.build(case.raw(tiny=tiny), torch.bfloat16, device)
  module.requires_grad_(False)
  x, sigma, told = jax.tree.map(
    functools.partial(_tensor, device=device),
    inputs(case, case.config(tiny=tiny), work),
  )
  sigma = sigma.float()

  def denoise() -> None:
    with torch.inference_mode():
      reference.velocity(module, x, sigma, told)
    _wait(device)

  def train() -> None:
    output = reference.velocity(module, x, sigma, told)
    output.float().square().mean().backward()
    _wait(device)

  if task.step == "train":
    _adapt_torch(module)
  seconds = _time(
    denoise if task.step == "denoise" else train, task.repetitions
  )
  peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
  return {"seconds": seconds, "peak_bytes": peak}


def _adapt_torch(module: Any) -> None:
  import peft

  module.add_adapter(
    peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PEFT_TARGETS)
  )
  module.train()  # diffusers recomputes blocks only then
  module.enable_gradient_checkpointing()


def _tensor(x: Any, device: str) -> Any:
  import torch

  tensor = torch.from_numpy(x).to(device)
  return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _wait(device: str) -> None:
  import torch

  if device == "cuda":
    torch.cuda.synchronize()


def _time(call: Callable[[], Any], repetitions: int) -> float:
  """Median seconds of a call that waits for its result; one more warms up."""
  found = []
  for _ in range(repetitions + 1):
    start = time.perf_counter()
    call()
    found.append(time.perf_counter() - start)
  return statistics.median(found[1:])


def _difference(case: Case) -> float:
  """Largest difference from diffusers on the host: tiny model, float32."""
  import jax
  import numpy as np
  import torch

  from digen_jax.benchmarks import reference
  from digen_jax.weights import load

  torch.manual_seed(0)
  module = reference.build(case.raw(tiny=True), torch.float32)
  for parameter in module.parameters():
    fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
    noise = torch.randn(parameter.shape) / fan_in**0.5
    parameter.data = noise + (parameter.ndim == 1)
  module.eval().requires_grad_(False)
  with tempfile.TemporaryDirectory() as directory:
    module.save_pretrained(directory)
    model = load.load_model(directory)
  arrays = inputs(case, model.config, case.workload(0, tiny=True), batch=2)
  with jax.default_matmul_precision("highest"):
    ours = jax.jit(model.apply)(model.params, *arrays)
  theirs = reference.velocity(module, *jax.tree.map(torch.from_numpy, arrays))
  return float(np.abs(np.asarray(ours) - theirs.numpy()).max())


if __name__ == "__main__":
  print(json.dumps(_child(Task(**json.loads(sys.argv[1])))))
