"""What units would cost on devices that are not there: ledgers and figures.

Seconds follow from the FLOPs and bytes of `models/costs.py` and a device's
stated figures. Nothing is measured, so every figure that is assumed has a name
here and is part of what `assumptions` says.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from digen_jax.errors import UserError
from digen_jax.models import costs
from digen_jax.models.costs import Cost, Ledger
from digen_jax.pipeline.cost_table import CostTable, Rate, RoleCosts
from digen_jax.throughput import UnitFlops, ledger_flops

GIGA, TERA, GIB = 1e9, 1e12, 2.0**30
TRAINED = 4  # bytes of a trained parameter, and of its gradient: float32
# Bytes of a trained parameter that the lane with the state of training divides
# among its devices: weight, two moments, the newest gradient and their sum.
STATE = 20
UPDATE_TRAFFIC = 28  # bytes read and written by AdamW per trained parameter
USABLE = 0.9  # of a device's memory
PER_DOUBLING = 0.9  # efficiency left when twice the devices share a row
MOST_SHARDS = 16
NO_ROOM = 1e-6  # rows; 0 would mean that nothing is known
# Of the bfloat16 peak, what products in float32 reach: TF32 of NVIDIA's
# devices. TPUs round their factors to bfloat16 unless told otherwise.
FLOAT32 = 0.5


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
    average: whether an average of the trained parameters is kept (EMA).
    held: gradients that may wait on a lane for those before them, for which
      room is kept.
    borrows: whether lanes that generate are lent weights between the updates of
      a step, beside the version that they have.
    remat: as in `layers.scan_blocks`.
    itemsize: bytes of an element of what is computed, 2 (bfloat16) or 4.
    score_seconds: of the reward of a sample.
  """

  denoiser: Ledger
  decoder: Ledger
  num_steps: int
  passes: int = 1
  lora_rank: int = 0
  reference: bool = False
  average: bool = False
  held: int = 0
  borrows: bool = False
  remat: str = "block"
  itemsize: int = 2
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

  @property
  def trained_bytes(self) -> int:
    """Of the trained parameters, or of a gradient: float32."""
    return TRAINED * self.trained

  @property
  def read_bytes(self) -> int:
    """Of the trained parameters as they are read, and sent to lanes."""
    return self.itemsize * self.trained

  @property
  def frozen_bytes(self) -> int:
    """Of the others, which are kept as they are computed with."""
    return self.itemsize * self.parameters if self.lora_rank else 0

  @property
  def flops(self) -> UnitFlops:
    """What units compute, without what is computed twice."""
    return ledger_flops(
      self.denoiser,
      self.decoder,
      num_steps=self.num_steps,
      passes=self.passes,
      lora=self.lora_rank > 0,
      reference=self.reference,
    )


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a device of a lane holds while it trains, bytes.

  Attributes:
    usable: what there is.
    weights: that are whole on the lane, or this device's part of them where
      devices work on a row together: all of a lane that generates, two layers
      of one that only trains, which gathers them one at a time (all where
      nothing is recomputed).
    gradient: of a layer, likewise.
    reference: of the reference policy, likewise.
    state: all that the devices of the lane divide: gradients, and on a lane
      that trains by itself the state of training and what it gathers.
    row: activations of a row.
    shards: devices that work on a row together.
    sequence: of them, those among which its tokens are divided; they share no
      weights.
  """

  usable: float
  weights: float
  gradient: float
  reference: float
  state: float
  row: float
  shards: int
  sequence: int

  @property
  def rows(self) -> float:
    """Rows that would fit beside weights, gradient and reference."""
    held = self.weights + self.gradient + self.reference
    return (self.usable - held) / self.row

  @property
  def state_rows(self) -> float:
    """Rows in whose room the state fits, on `shards` devices."""
    return self.state / self.shards / self.row


def ledger_table(
  job: Job,
  rollout: Device,
  trainer: Device,
  devices: int,
  rows: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
) -> CostTable:
  """A cost table from ledgers.

  Args:
    job: the model and how it is used.
    rollout: what generates.
    trainer: what trains; may be of the same kind.
    devices: of both roles.
    rows: by role, sizes of the `sequence` axis, and at least of the `tensor`
      axis; 1 by default.

  Raises:
    UserError: the model does not fit into the devices' memory.
  """
  memory = memories(job, rollout, trainer, devices, rows)
  kinds = _kinds(rollout, trainer)
  roles = {
    role: _role(job, kinds[role], role, held) for role, held in memory.items()
  }
  names = dict.fromkeys([rollout.name, trainer.name])
  return CostTable(
    **roles,
    score=Rate(row=job.score_seconds),
    source="ledgers, " + " and ".join(names),
  )


def memories(
  job: Job,
  rollout: Device,
  trainer: Device,
  devices: int,
  rows: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
) -> dict[str, Memory]:
  """What a device of each role holds, "rollout", "trainer", "colocated".

  As many devices work on a row together as are needed for one row to fit where
  half of all devices hold the state of training; on rollout lanes, too, so
  that they can train.

  Args:
    job: as for `ledger_table`, and so are the others.
    rollout: what generates.
    trainer: what trains.
    devices: of both roles.
    rows: by role, sizes of the `sequence` axis, and at least of the `tensor`
      axis; 1 by default.

  Raises:
    UserError: not even `MOST_SHARDS` devices hold a row of a lane with one
      role. A colocated lane may be left with less than a row.
  """
  half = max(devices // 2, 1)
  counts = {"rollout": half, "trainer": half, "colocated": devices}
  return {
    role: _memory(job, device, role, counts[role], rows.get(role, {}))
    for role, device in _kinds(rollout, trainer).items()
  }


def _kinds(rollout: Device, trainer: Device) -> dict[str, Device]:
  """By role; a lane over both goes at the pace, and has the room, of less."""
  slower = min(rollout, trainer, key=lambda device: device.tflops)
  memory = min(rollout.memory, trainer.memory)
  both = dataclasses.replace(slower, memory=memory)
  return {"rollout": rollout, "trainer": trainer, "colocated": both}


def _memory(
  job: Job, device: Device, role: str, devices: int, axes: Mapping[str, int]
) -> Memory:
  """With as few devices to a row as hold one, but not less than `axes` has."""
  weights = float(job.frozen_bytes + job.read_bytes)
  reference = float(job.reference * job.read_bytes)
  state = float((1 + job.held) * job.trained_bytes)  # gradients
  if role == "rollout":
    weights += job.borrows * job.read_bytes
  else:
    state += (STATE - TRAINED + TRAINED * job.average) * job.trained
    state += job.read_bytes + reference
    reference = 0.0
    # A layer and the next; without recomputation all stay for the way back.
    depth = job.denoiser.depth
    held = depth if job.remat == "none" else 2
    layers = held * job.itemsize * job.parameters / depth
    if role == "trainer":
      state += job.frozen_bytes
      weights = layers
    else:  # gathered beside what is published
      weights += layers
  # The sequence axis divides tokens, but those of keys and values (and of their
  # gradients); the tensor axis what is inside blocks, not the residual stream.
  item = job.itemsize
  stream = costs.saved_bytes(job.denoiser, itemsize=item, remat="block")
  inside = costs.saved_bytes(job.denoiser, itemsize=item, remat=job.remat)
  block = costs.saved_bytes(job.denoiser, itemsize=item, remat="dots")
  inside += block / job.denoiser.depth - stream
  sequence = axes.get("sequence", 1)
  keys = 4 * stream / job.denoiser.depth * (1 - 1 / sequence)
  for tensor in _degrees(job.denoiser, axes.get("tensor", 1)):
    shards = sequence * tensor
    found = Memory(
      usable=USABLE * device.memory * GIB,
      weights=weights / tensor,
      gradient=job.trained_bytes / job.denoiser.depth / tensor,
      reference=reference / tensor,
      state=state,
      row=job.passes * (stream / sequence + inside / shards + keys / tensor),
      shards=shards,
      sequence=sequence,
    )
    replicas = max(devices // shards, 1)
    if found.rows - found.state_rows / replicas >= 1:
      return found
  if role == "colocated":  # the others may fit all the same
    return found
  raise UserError(
    f"a model of {job.parameters / 1e9:.1f}e9 weights does not fit: of "
    f"{device.memory:.0f} GiB on a {device.name}, shared by {shards} devices "
    f"of a {role} lane of {devices}, weights and a layer's gradient take "
    f"{(found.weights + found.gradient + found.reference) / GIB:.0f}, what is "
    f"in parts {state / max(devices, shards) / GIB:.0f} and one row "
    f"{found.row / GIB:.0f} GiB; give more devices, larger ones, train "
    "adapters (config.train.lora_rank), or keep less "
    "(config.train.remat='block', config.dtype.compute='bfloat16')"
  )


def _degrees(denoiser: Ledger, least: int) -> list[int]:
  """Among how many devices the attention heads of a row may be divided."""
  heads = max(a.heads for a in denoiser.attentions)
  powers = [2**n for n in range(MOST_SHARDS.bit_length())]
  more = [n for n in powers if least < n <= MOST_SHARDS and heads % n == 0]
  return [least, *more]


def _role(job: Job, device: Device, role: str, memory: Memory) -> RoleCosts:
  """What units cost on one role's layout.

  The devices of a rollout lane that divide heads hold all weights between them.
  Trainer lanes hold a part each and gather the weights for every forward pass
  and where blocks are computed again, without overlap; a colocated lane gathers
  what it trains.
  """
  shards = memory.shards
  # Devices that divide the heads gather a part each.
  link = device.link * GIGA * shards / memory.sequence
  network = device.network * GIGA
  read = job.read_bytes / link
  weights = read + job.frozen_bytes / link
  gathered = dict(rollout=0.0, trainer=weights, colocated=read)[role]
  times = job.passes * (1 + (job.remat != "none"))
  fixed = times * gathered + job.trained_bytes / link
  if role == "rollout":
    fixed += job.trained_bytes / network
  elif job.reference:
    fixed += job.passes * gathered
  loss = PER_DOUBLING ** math.log2(shards)

  forward = costs.forward(job.denoiser, itemsize=job.itemsize)
  backward = costs.backward(
    job.denoiser,
    itemsize=job.itemsize,
    remat=job.remat,
    lora=job.lora_rank > 0,
  )
  transition = forward * (2 if job.reference else 1) + backward
  seconds = functools.partial(_seconds, job.itemsize, device)
  generate = job.num_steps * job.passes * seconds(forward, device.generate)
  train = job.passes * seconds(transition, device.train)
  traffic = UPDATE_TRAFFIC + 2 * TRAINED * job.average
  return RoleCosts(
    generate=Rate(
      job.num_steps * job.passes * weights if role == "trainer" else 0.0,
      generate / loss,
    ),
    # In float32 as well, which the part of the peak that it reaches allows for;
    # every device of a row does all of it.
    decode=Rate(
      row=shards
      * _seconds(2, device, costs.forward(job.decoder), device.decode)
    ),
    train=Rate(fixed, train / loss),
    update=Rate(row=traffic * job.trained / (device.bandwidth * GIGA)),
    # Each device sends its part, and the receivers gather the parts.
    publish=Rate(
      read, 0.0 if role == "colocated" else job.read_bytes / network
    ),
    switch=Rate(weights if role == "trainer" else 0.0),
    shards=shards,
    sequence=memory.sequence,
    max_rows=max(memory.rows, NO_ROOM),
    state_rows=memory.state_rows,
  )


def _seconds(itemsize: int, device: Device, cost: Cost, share: float) -> float:
  """Limited by arithmetic, or by memory."""
  peak = device.tflops * TERA * (1.0 if itemsize == 2 else FLOAT32)
  return max(
    cost.flops / (peak * share), cost.bytes / (device.bandwidth * GIGA)
  )


def assumptions(job: Job, devices: Sequence[Device]) -> list[str]:
  """Everything a table of `ledger_table` rests on, a line each."""
  forward = costs.forward(job.denoiser).flops / TERA
  decode = costs.forward(job.decoder).flops / TERA
  what = f"adapters of rank {job.lora_rank}" if job.lora_rank else "all weights"
  compute = "bfloat16" if job.itemsize == 2 else "float32"
  lines = [
    f"denoiser: {job.parameters / 1e9:.1f}e9 weights, {forward:.0f} TFLOP a "
    f"forward pass, {job.passes} a step; decoding {decode:.0f} TFLOP; no text "
    "encoding (embeddings are cached)",
    f"training: {what}, {compute} compute, what is trained and AdamW in "
    f"float32, recomputation {job.remat!r}"
    + (", with a reference policy" if job.reference else "")
    + (", with averaged weights" if job.average else ""),
    f"reward: {job.score_seconds} s a sample on host threads",
  ]
  lines += [
    f"{d.name}: {d.tflops:.0f} TFLOP/s dense bfloat16, "
    + ("" if job.itemsize == 2 else f"{FLOAT32:.0%} of it in float32, ")
    + f"of which denoising "
    f"reaches {d.generate:.0%}, training {d.train:.0%}, decoding "
    f"{d.decode:.0%}; {d.memory:.0f} GiB at {d.bandwidth:.0f} GB/s, link "
    f"{d.link:.0f} GB/s, network {d.network:.0f} GB/s"
    for d in {d.name: d for d in devices}.values()
  ]
  return [
    *lines,
    "a trainer lane gathers the weights for every forward pass, again where "
    "blocks are recomputed, and reduces gradients after a unit, neither "
    "overlapped with compute; rollout lanes that train send their gradients "
    "over the network in float32, and are sent weights in the compute dtype",
    f"memory: {USABLE:.0%} of a device, of which weights (of a trainer two "
    "layers beside its part), gradients in parts, the state of training and "
    "activations are counted, and neither the decoder nor what generating "
    "works with; of gradients that wait for those before them "
    f"{job.held or 'none'} are counted; devices on a tensor axis divide weights, "
    "but not the residual stream, those on a sequence axis tokens, but not "
    "weights",
    f"devices that share a row lose {1 - PER_DOUBLING:.0%} with every doubling",
    "rows are spread evenly; a batch smaller than a lane leaves devices idle",
  ]
