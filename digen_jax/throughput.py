"""Model FLOP/s of a run's lanes, and which part of their chips' peak it is.

Counted is what the mathematics of a unit needs: neither padding, nor what
rematerialisation computes again (MFU as in Chowdhery et al. 2022, appendix B).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from digen_jax.assemble import Assembly
from digen_jax.links import Hardware
from digen_jax.models import costs
from digen_jax.models.vae.costs import DECODERS
from digen_jax.pipeline.units import Kind
from digen_jax.timeline import Span
from digen_jax.weights.load import module_directory, read_json

TERA = 1e12
# Dense bfloat16 TFLOP/s of a JAX device, by `device_kind`; first match wins.
# TPU: Google Cloud's system architecture pages of v4, v5e, v5p and v6e (a
# device is a chip). GPU: NVIDIA's data sheets, half of their sparse figures.
PEAKS = (
  (r"TPU v4", 275.0),
  (r"TPU v5 lite|TPU v5e", 197.0),
  (r"TPU v5|TPU v5p", 459.0),
  (r"TPU v6 lite|TPU v6e", 918.0),
  (r".*\bA100\b.*", 312.0),
  (r".*\bH100 PCIe\b.*", 756.0),
  (r".*\bH[12]00 NVL\b.*", 835.0),
  (r".*\bH[12]00\b.*", 989.0),
)


@dataclasses.dataclass(frozen=True)
class UnitFlops:
  """FLOPs of the smallest pieces of work.

  Attributes:
    sample: generating a sample: every denoising step, and decoding.
    transition: training on one transition: forward, backward, and the forward
      of the reference where there is one.
  """

  sample: float
  transition: float


def peak_tflops(device_kind: str) -> float | None:
  """Dense bfloat16 peak of a device, TFLOP/s; None if it is not known."""
  return next(
    (peak for kind, peak in PEAKS if re.fullmatch(kind, device_kind)), None
  )


def unit_flops(assembly: Assembly, text_len: int) -> UnitFlops | None:
  """FLOPs of a run's units; None for models without a ledger.

  Args:
    assembly: the run.
    text_len: tokens of a prompt.
  """
  config, recipe = assembly.config, assembly.recipe
  directory = module_directory(config.checkpoint, "vae")
  decoder = read_json(directory / "config.json").get("_class_name")
  denoiser = assembly.model.family.class_name
  if denoiser not in costs.DENOISERS or decoder not in DECODERS:
    return None
  shape = recipe.latent_shape
  return ledger_flops(
    costs.DENOISERS[denoiser](assembly.model.config, shape, text_len),
    DECODERS[decoder](assembly.autoencoder.config, shape),
    num_steps=config.sampling.num_steps,
    passes=1 if recipe.guidance_scale == 1.0 else 2,
    lora=config.train.lora_rank > 0,
    reference=recipe.kl_weight > 0,
  )


def ledger_flops(
  denoiser: costs.Ledger,
  decoder: costs.Ledger,
  *,
  num_steps: int,
  passes: int,
  lora: bool,
  reference: bool,
) -> UnitFlops:
  """FLOPs of units.

  Args:
    denoiser: ledger of one forward pass of one sample.
    decoder: ledger of decoding one sample.
    num_steps: denoising steps of a sample.
    passes: forward passes a step; 2 with classifier-free guidance.
    lora: whether only adapters are trained.
    reference: whether training needs a forward pass of the reference.
  """
  forward = costs.forward(denoiser).flops
  transition = forward * (2 if reference else 1)
  transition += costs.backward(denoiser, lora=lora).flops
  return UnitFlops(
    sample=num_steps * passes * forward + costs.forward(decoder).flops,
    transition=passes * transition,
  )


def lane_throughput(
  spans: Iterable[Span],
  flops: UnitFlops | None,
  hardware: Mapping[str, Hardware],
  seconds: float,
) -> dict[str, Any]:
  """What the lanes achieved in a global step.

  Args:
    spans: of the step.
    flops: of its units, or None.
    hardware: of every lane.
    seconds: wall time of the step.

  Returns:
    {"tflops_per_second": {lane: per device}, "mfu": {lane: part of the peak,
    or None}}; nothing if `flops` is None.
  """
  if flops is None:
    return {}
  per_row = {Kind.GENERATE: flops.sample, Kind.TRAIN: flops.transition}
  rates = dict.fromkeys(hardware, 0.0)
  for span in spans:
    if span.name in per_row and span.lane in rates:
      rates[span.lane] += per_row[span.name] * span.args["size"]
  mfu: dict[str, float | None] = {}
  for lane, devices in hardware.items():
    rates[lane] /= seconds * devices.size * TERA
    peak = peak_tflops(devices.device_kind)
    mfu[lane] = rates[lane] / peak if peak else None
  return {"tflops_per_second": rates, "mfu": mfu}
