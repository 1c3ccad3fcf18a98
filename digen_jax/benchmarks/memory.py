"""What a training step of published models takes of a device, compiled.

The gradient of a pack, a row to a device, is compiled for models of full size
as shapes: nothing is allocated, and nothing runs. The figures are the
compiler's own account. On CPU, whose products in bfloat16 are computed in
float32, they say how memory grows, and for an accelerator too much.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from digen_jax.benchmarks import output
from digen_jax.benchmarks.cases import CASES, Case, chosen, inputs
from digen_jax.errors import UserError
from digen_jax.grpo.train_step import train_step
from digen_jax.models import Model, abstract_model, lora
from digen_jax.parallel import rules
from digen_jax.parallel.gather import reading
from digen_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from digen_jax.sampling.kernels import make_kernel
from digen_jax.types import TrainBatch

DEVICES = 8
RANK = 32
TARGETS = ("attn", "ff")
GIGA = 1e9


def run(
  workdir: str | Path, *, families: Sequence[str] | None = None
) -> list[dict[str, Any]]:
  """Compiles, prints and keeps the table; returns its rows.

  Args:
    workdir: for the results.
    families: keys of `cases.CASES`; None means all.

  Raises:
    UserError: an unknown family, or fewer than `DEVICES` devices.
  """
  if jax.device_count() < DEVICES:
    raise UserError(
      f"this compiles for {DEVICES} devices and there are "
      f"{jax.device_count()}; JAX_PLATFORMS=cpu makes that many"
    )
  rows = []
  for name in chosen(families):
    for mode in ("lora", "full"):
      rows.append(_row(CASES[name], mode))
      print(f"{name}, {mode}: done", flush=True)
  output.save(workdir, "memory", rows, {})
  return rows


def _row(case: Case, mode: str) -> dict[str, Any]:
  """One model, with adapters or all of its weights trained."""
  work = case.workloads[-1]  # the one that needs least
  config = case.config(tiny=False, dtype=jnp.dtype("bfloat16"), remat="block")
  model = abstract_model(case.family, config)
  if mode == "lora":
    model = lora.adapt(
      model, rank=RANK, alpha=RANK, targets=TARGETS, key=jax.random.key(0)
    )
  start = time.perf_counter()
  compiled = gradient_program(model, mode, inputs(case, config, work, DEVICES))
  memory = compiled.memory_analysis()
  weights = 2 * sum(
    int(np.prod(x.shape)) for x in jax.tree.leaves(model.params)
  )
  return {
    "model": case.name,
    "workload": work.name,
    "trained": "adapters" if mode == "lora" else "all",
    "all weights, GB": weights / GIGA,
    "stored on a device, GB": memory.argument_size_in_bytes / GIGA,
    "gradient on a device, GB": memory.output_size_in_bytes / GIGA,
    "temporaries, GB": memory.temp_size_in_bytes / GIGA,
    "compiled in, s": time.perf_counter() - start,
  }


def gradient_program(model: Model, mode: str, arrays: tuple) -> Any:
  """A Train unit on a trainer mesh of all devices, compiled.

  Args:
    model: as shapes.
    mode: of `lora.split_trainable`.
    arrays: latents [B, ...], sigma [B] and conditioning.
  """
  mesh = make_mesh({"fsdp": DEVICES}, jax.devices()[:DEVICES])
  axes, dtypes = model.logical_axes, model.read_dtypes
  apply = reading(model.apply, mesh, axes, dtypes)
  layout = rules.param_shardings(mesh, axes, model.params, rules.TRAINER)
  trainable, frozen = lora.split_trainable(
    jax.tree.map(_shape, model.params, layout), mode
  )
  frozen = jax.tree.map(lambda x: _shape(x, x.sharding, jnp.bfloat16), frozen)
  x, sigma, told = jax.tree.map(
    functools.partial(_shape, sharding=batch_sharding(mesh)), arrays
  )
  batch = TrainBatch(x, x, *[sigma] * 5, told, None)

  def gradient(trainable: Any, frozen: Any, batch: TrainBatch) -> Any:
    return train_step(
      apply,
      trainable,
      dataclasses.replace(batch, sigma_next=batch.sigma - 0.05),
      kernel=make_kernel("flow_sde", noise_level=0.7, sigma_max=0.95),
      clip_range=1e-4,
      normalizer=1.0,
      frozen=frozen,
    )

  parts = jax.tree.map(lambda x: x.sharding, trainable)
  step = jax.jit(gradient, out_shardings=(parts, replicated(mesh)))
  return step.lower(trainable, frozen, batch).compile()


def _shape(x: Any, sharding: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)
