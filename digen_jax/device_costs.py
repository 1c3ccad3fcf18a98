"""What units would cost on devices that are not there: ledgers and figures.

Seconds follow from the FLOPs and bytes of `models/costs.py` and a device's
stated figures. Nothing is measured, so every figure that is assumed has a name
here and is part of what `assumptions` says.
"""

import dataclasses
import math
from collections.abc import Sequence

from digen_jax.errors import UserError
from digen_jax.models import costs
from digen_jax.models.costs import Cost, Ledger
from digen_jax.pipeline.cost_table import CostTable, Rate, RoleCosts

GIGA, TERA, GIB = 1e9, 1e12, 2.0**30
ITEM = 2  # bytes of an element in bfloat16
STATE = 16  # bytes of a trained parameter: weight, two moments, gradient
UPDATE_TRAFFIC = 28  # bytes read and written by AdamW per trained parameter
USABLE = 0.9  # of a device's memory
PER_DOUBLING = 0.9  # efficiency left when twice the devices share a row
MOST_SHARDS = 16


@dataclasses.dataclass(frozen=True)
class Device:
  """Figures of a kind of device.

  Attributes:
    name: for people.
    tflops: dense bfloat16 peak, TFLOP/s.
    memory: GiB.
    bandwidth: of its memory, GB/s.
    link: to the devices beside it, GB/s, one way.
    network: to those of another lane, GB/s, one way.
    generate: part of the peak that denoising reaches.
    train: part of the peak that forward and backward pass reach.
    decode: part of the peak that convolutions of the decoder reach.
  """

  name: str
  tflops: float
  memory: float
  bandwidth: float
  link: float
  network: float = 50.0
  generate: float = 0.5
  train: float = 0.4
  decode: float = 0.25


# Makers' data sheets; NVIDIA's links are half of their two-way figure, TPU
# links are all ICI of a chip. `network` is 400 Gbit/s a device throughout.
DEVICES = {
  device.name: device
  for device in (
    Device("A100", 312.0, 80.0, 2039.0, 300.0),
    Device("H100", 989.0, 80.0, 3350.0, 450.0),
    Device("H200", 989.0, 141.0, 4800.0, 450.0),
    Device("TPU v5e", 197.0, 16.0, 819.0, 200.0),
    Device("TPU v5p", 459.0, 95.0, 2765.0, 600.0),
    Device("TPU v6e", 918.0, 32.0, 1640.0, 448.0),
  )
}


@dataclasses.dataclass(frozen=True)
class Job:
  """What decides the cost of units, devices aside.

  Attributes:
    denoiser: ledger of one forward pass of one sample.
    decoder: ledger of decoding one sample.
    num_steps: denoising steps of a sample.
    passes: forward passes a step; 2 with classifier-free guidance.
    lora_rank: of the adapters; 0 trains everything.
    reference: whether training also needs a forward pass of the reference
      policy (a KL term).
    remat: as in `layers.scan_blocks`.
    score_seconds: of the reward of a sample.
  """

  denoiser: Ledger
  decoder: Ledger
  num_steps: int
  passes: int = 1
  lora_rank: int = 0
  reference: bool = False
  remat: str = "block"
  score_seconds: float = 0.1

  @property
  def parameters(self) -> int:
    """Weights of the denoiser, biases and norms aside."""
    products = (*self.denoiser.blocks, *self.denoiser.ends)
    return sum(p.weights for p in products)

  @property
  def trained(self) -> int:
    """Of them, or of the adapters, those that are trained."""
    if not self.lora_rank:
      return self.parameters
    return sum(
      p.count * self.lora_rank * (p.fan_in + p.fan_out)
      for p in self.denoiser.blocks
    )


def ledger_table(
  job: Job, rollout: Device, trainer: Device, devices: int
) -> CostTable:
  """A cost table from ledgers.

  Args:
    job: the model and how it is used.
    rollout: what generates.
    trainer: what trains; may be of the same kind.
    devices: of both roles; half of them hold the state of training.

  Raises:
    UserError: the model does not fit into the devices' memory.
  """
  slower = min(rollout, trainer, key=lambda device: device.tflops)
  roles = [
    _role(job, device, role, max(devices // parts, 1))
    for role, device, parts in (
      ("rollout", rollout, 2),
      ("trainer", trainer, 2),
      ("colocated", slower, 1),
    )
  ]
  kinds = dict.fromkeys([rollout.name, trainer.name])
  return CostTable(
    *roles,
    score=Rate(row=job.score_seconds),
    source="ledgers, " + " and ".join(kinds),
  )


def _role(job: Job, device: Device, role: str, devices: int) -> RoleCosts:
  """What units cost on one role's layout.

  Rollout lanes hold all weights on every `shards` devices. Trainer lanes hold
  a part each and gather the weights for every unit, without overlap.
  """
  weights, gradients = ITEM * job.parameters, 4 * job.trained
  gather = weights / (device.link * GIGA)
  reduce = gradients / (device.link * GIGA)
  across = gradients / (device.network * GIGA)
  whole = role == "rollout"
  shards, max_rows = _fit(job, device, 0 if whole else devices)
  loss = PER_DOUBLING ** math.log2(shards)

  forward = costs.forward(job.denoiser)
  backward = costs.backward(
    job.denoiser, remat=job.remat, lora=job.lora_rank > 0
  )
  transition = forward * (2 if job.reference else 1) + backward
  return RoleCosts(
    generate=Rate(
      0.0 if whole else gather,
      job.num_steps * job.passes * _seconds(forward, device, device.generate)
      / loss,
    ),
    decode=Rate(row=_seconds(costs.forward(job.decoder), device, device.decode)),
    train=Rate(
      reduce + (across if whole else gather),
      job.passes * _seconds(transition, device, device.train) / loss,
    ),
    update=Rate(row=UPDATE_TRAFFIC * job.trained / (device.bandwidth * GIGA)),
    # Each device sends its part, and the receivers gather the parts.
    publish=Rate(
      (gather if not job.lora_rank else reduce / 2) if role != "colocated"
      else 0.0,
      ITEM * job.trained / (device.network * GIGA) if role != "colocated"
      else 0.0,
    ),
    switch=Rate(0.0 if whole else gather),
    shards=shards,
    max_rows=max_rows,
  )  # fmt: skip


def _seconds(cost: Cost, device: Device, share: float) -> float:
  """Limited by arithmetic, or by memory."""
  return max(
    cost.flops / (device.tflops * TERA * share),
    cost.bytes / (device.bandwidth * GIGA),
  )


def _fit(job: Job, device: Device, state_devices: int) -> tuple[int, int]:
  """Devices that share a row, and rows of a Train unit that fit on them.

  What is counted: all weights in bfloat16, the state of training divided among
  the devices that hold it, what a backward pass keeps of a row, and what one
  block works with.
  """
  state = STATE * job.trained / state_devices if state_devices else 0.0
  row = costs.saved_bytes(job.denoiser, remat=job.remat)
  row += costs.saved_bytes(job.denoiser, remat="dots") / job.denoiser.depth
  row *= job.passes
  shards = 1
  while shards <= MOST_SHARDS:
    # A lane that trains gathers all weights; sharded rollouts never do.
    weights = ITEM * job.parameters / (1 if state_devices else shards)
    left = USABLE * device.memory * GIB - weights - state
    if left * shards >= row:
      return shards, int(left * shards / row)
    shards *= 2
  raise UserError(
    f"a model of {job.parameters / 1e9:.1f}e9 weights does not fit: of "
    f"{device.memory:.0f} GiB on a {device.name}, weights take "
    f"{ITEM * job.parameters / GIB:.0f}, the state of training "
    f"{state / GIB:.0f} and one row {row / GIB:.0f} GiB; give more devices, "
    "larger ones, or train adapters (config.train.lora_rank)"
  )


def assumptions(job: Job, devices: Sequence[Device]) -> list[str]:
  """Everything a table of `ledger_table` rests on, a line each."""
  forward = costs.forward(job.denoiser).flops / TERA
  decode = costs.forward(job.decoder).flops / TERA
  what = f"adapters of rank {job.lora_rank}" if job.lora_rank else "all weights"
  lines = [
    f"denoiser: {job.parameters / 1e9:.1f}e9 weights, {forward:.0f} TFLOP a "
    f"forward pass, {job.passes} a step; decoding {decode:.0f} TFLOP; no text "
    "encoding (embeddings are cached)",
    f"training: {what}, bfloat16 compute, AdamW in float32, recomputation "
    f"{job.remat!r}" + (", with a reference policy" if job.reference else ""),
    f"reward: {job.score_seconds} s a sample on host threads",
  ]
  lines += [
    f"{d.name}: {d.tflops:.0f} TFLOP/s dense bfloat16, of which denoising "
    f"reaches {d.generate:.0%}, training {d.train:.0%}, decoding "
    f"{d.decode:.0%}; {d.memory:.0f} GiB at {d.bandwidth:.0f} GB/s, link "
    f"{d.link:.0f} GB/s, network {d.network:.0f} GB/s"
    for d in {d.name: d for d in devices}.values()
  ]
  return [
    *lines,
    "a trainer lane gathers the weights for every unit and reduces gradients "
    "after it, neither overlapped with compute; rollout lanes that train send "
    "their gradients over the network; what these take of memory, 4 bytes a "
    "trained weight, is not counted there",
    f"devices that share a row lose {1 - PER_DOUBLING:.0%} with every doubling",
    "rows are spread evenly; a batch smaller than a lane leaves devices idle",
  ]
