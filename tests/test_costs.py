"""Ledgers against torch's counter, XLA's, and a walk over our own programs."""

import dataclasses
import math
import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from digen_jax import models, throughput
from digen_jax.assemble import assemble
from digen_jax.config import from_config_dict
from digen_jax.grpo.train_step import join
from digen_jax.links import Hardware
from digen_jax.models import costs, lora
from digen_jax.models.costs import DENOISERS, Attention, Ledger, Product
from digen_jax.models.vae.costs import DECODERS
from digen_jax.throughput import (
  UnitFlops,
  lane_throughput,
  peak_tflops,
  unit_flops,
)
from digen_jax.timeline import Span
from tests import references
from tests.references import random_model
from tests.small_run import small_config

TERA, MIB, GIB = 1e12, 2.0**20, 2.0**30


def record(**sizes):
  return types.SimpleNamespace(**sizes)


HEADS = dict(num_attention_heads=24, attention_head_dim=128)
VIDEO = dict(in_channels=16, out_channels=16)
FLUX = record(
  in_channels=64,
  out_channels=None,
  num_layers=19,
  num_single_layers=38,
  joint_attention_dim=4096,
  pooled_projection_dim=768,
  guidance_embeds=True,
  **HEADS,
)
QWEN = record(
  patch_size=2,
  in_channels=64,
  out_channels=16,
  num_layers=60,
  joint_attention_dim=3584,
  **HEADS,
)
HUNYUAN = record(
  num_layers=20,
  num_single_layers=40,
  num_refiner_layers=2,
  patch_size=2,
  patch_size_t=1,
  guidance_embeds=True,
  text_embed_dim=4096,
  pooled_projection_dim=768,
  **HEADS,
  **VIDEO,
)


def wan(layers, heads, hidden):
  return record(
    patch_size=(1, 2, 2),
    num_layers=layers,
    num_attention_heads=heads,
    attention_head_dim=128,
    text_dim=4096,
    freq_dim=256,
    ffn_dim=hidden,
    **VIDEO,
  )


def sd3(layers, heads, dual):
  return record(
    patch_size=2,
    num_layers=layers,
    num_attention_heads=heads,
    attention_head_dim=64,
    joint_attention_dim=4096,
    pooled_projection_dim=2048,
    dual_attention_layers=range(dual),
    **VIDEO,
  )


WAN_SMALL, WAN_LARGE = wan(30, 12, 8960), wan(40, 40, 13824)
SD3_MEDIUM, SD3_LARGE = sd3(24, 24, 13), sd3(38, 38, 0)
SQUARE = (128, 128, 16)  # latents of 1024 x 1024 pixels

# Family, sizes, latents, text; then TFLOP of products, attention and both,
# attention in %, and PFLOP of the usual number of forwards. Counted at full
# size with torch's FlopCounterMode.
PUBLISHED = [
  ("Flux", FLUX, SQUARE, 512, 59.5, 14.9, 74.4, 20, (28, 2.1)),
  ("QwenImage", QWEN, SQUARE, 256, 59.2, 14.0, 73.1, 19, (100, 7.3)),
  ("QwenImage", QWEN, (166, 166, 16), 256, 97.1, 37.6, 134.8, 28, (100, 13.5)),
  ("Wan", WAN_SMALL, (21, 60, 104, 16), 512, 82.1, 200.9, 283.0, 71, (100, 28)),
  ("Wan", WAN_LARGE, (21, 60, 104, 16), 512, 785, 893, 1678, 53, (100, 168)),
  ("Wan", WAN_LARGE, (21, 90, 160, 16), 512, 1810, 4714, 6523, 72, (100, 652)),
  ("Hunyuan", HUNYUAN, (14, 60, 104, 16), 256, 300, 360, 660, 55, (50, 33)),
  (
    "Hunyuan",
    HUNYUAN,
    (33, 90, 160, 16),
    256,
    *(1618, 10450, 12069, 87),
    (50, 603),
  ),
  ("SD3", SD3_MEDIUM, SQUARE, 333, 7.0, 4.2, 11.2, 38, None),
  ("SD3", SD3_LARGE, SQUARE, 333, 23.9, 7.25, 31.1, 23, None),
]
CLASSES = {
  "Flux": "FluxTransformer2DModel",
  "QwenImage": "QwenImageTransformer2DModel",
  "Wan": "WanTransformer3DModel",
  "Hunyuan": "HunyuanVideoTransformer3DModel",
  "SD3": "SD3Transformer2DModel",
}


def assert_rounds_to(value, printed):
  """Within half a unit of the last printed digit, and a hundredth of it."""
  digits = len(str(printed).partition(".")[2])
  assert abs(value - printed) <= 0.51 * 10.0**-digits, (value, printed)


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_workloads(row):
  family, sizes, latents, text, gemm, attention, total, share, usual = row
  cost = costs.forward(DENOISERS[CLASSES[family]](sizes, latents, text))
  assert_rounds_to(cost.gemm / TERA, gemm)
  assert_rounds_to(cost.attention / TERA, attention)
  assert_rounds_to(cost.flops / TERA, total)
  assert_rounds_to(100 * cost.attention / cost.flops, share)
  if usual:
    assert_rounds_to(usual[0] * cost.flops / TERA / 1000, usual[1])


@pytest.mark.parametrize(
  ("family", "sizes", "parameters"),
  [
    ("Flux", FLUX, 11_901_408_320),
    ("QwenImage", QWEN, 20_430_401_088),
    ("Wan", WAN_SMALL, 1_418_996_800),
    ("Wan", WAN_LARGE, 14_288_491_584),
    ("Hunyuan", HUNYUAN, 12_821_012_544),
    ("SD3", SD3_MEDIUM, 2_243_171_520),
    ("SD3", SD3_LARGE, 8_056_627_520),
  ],
)
def test_nearly_all_parameters_are_in_products(family, sizes, parameters):
  """Biases, norms and tables are not."""
  latents = (1, 8, 8, 16) if family in ("Wan", "Hunyuan") else (8, 8, 16)
  ledger = DENOISERS[CLASSES[family]](sizes, latents, 7)
  weights = sum(p.weights for p in (*ledger.blocks, *ledger.ends))
  assert 0.999 < weights / parameters < 1
  # One row of text and few of video: reading the weights is what moves.
  moved = costs.forward(ledger, itemsize=2).bytes
  assert 2 * weights < moved < 2.3 * weights


def test_residual_streams_of_published_workloads():
  """MiB of bfloat16 between blocks; GiB of all, the "block" policy."""
  expected = [(27, 1.5), (26, 1.5), None, None, (320, 12.5), (738, 28.8)]
  expected += [None, (698, 40.9), None, None]
  for row, found in zip(PUBLISHED, expected):
    if found is None:
      continue
    ledger = DENOISERS[CLASSES[row[0]]](*row[1:4])
    assert abs(2 * ledger.residual / MIB - found[0]) <= 0.51
    assert_rounds_to(costs.saved_bytes(ledger, remat="block") / GIB, found[1])


KL = record(
  block_out_channels=(128, 256, 512, 512),
  layers_per_block=2,
  use_post_quant_conv=False,
  out_channels=3,
)
CAUSAL = record(
  base_dim=96,
  dim_mult=(1, 2, 4, 4),
  num_res_blocks=2,
  temperal_downsample=(False, True, True),
  out_channels=3,
)


@pytest.mark.parametrize(
  ("name", "sizes", "latents", "printed"),
  [
    ("AutoencoderKL", KL, SQUARE, 10.5),
    ("AutoencoderKLQwenImage", CAUSAL, SQUARE, 11.7),
    ("AutoencoderKLWan", CAUSAL, (21, 60, 104, 16), 275),
    ("AutoencoderKLHunyuanVideo", KL, (14, 60, 104, 16), 521),
  ],
)
def test_published_decoders(name, sizes, latents, printed):
  flops = costs.forward(DECODERS[name](sizes, latents)).flops
  assert_rounds_to(flops / TERA, printed)


def counted(call):
  """FLOPs by torch's counter, which knows no fused attention on a CPU."""
  counter = FlopCounterMode(display=False)
  with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
    call()
  return counter.get_total_flops()


TINY = dict(num_attention_heads=3, attention_head_dim=16, num_layers=3)
# Class, arguments, latents, text length, other forward arguments.
SMALL_MODELS = [
  (
    "FluxTransformer2DModel",
    dict(in_channels=16, out_channels=8, num_single_layers=2)
    | dict(joint_attention_dim=20, pooled_projection_dim=12)
    | dict(guidance_embeds=True, axes_dims_rope=(4, 6, 6)),
    (6, 10, 4),
    dict(
      hidden_states=(2, 15, 16),
      encoder_hidden_states=(2, 7, 20),
      pooled_projections=(2, 12),
      timestep=(2,),
      guidance=(2,),
      img_ids=(15, 3),
      txt_ids=(7, 3),
    ),
  ),
  (
    "QwenImageTransformer2DModel",
    dict(in_channels=16, out_channels=4, joint_attention_dim=20)
    | dict(axes_dims_rope=(4, 6, 6)),
    (6, 10, 4),
    dict(
      hidden_states=(2, 15, 16),
      encoder_hidden_states=(2, 7, 20),
      timestep=(2,),
    ),
  ),
  (
    "WanTransformer3DModel",
    dict(in_channels=4, out_channels=6, text_dim=20, ffn_dim=40)
    | dict(freq_dim=32, cross_attn_norm=True, rope_max_seq_len=32),
    (3, 6, 10, 4),
    dict(
      hidden_states=(2, 4, 3, 6, 10),
      encoder_hidden_states=(2, 7, 20),
      timestep=(2,),
    ),
  ),
  (
    "HunyuanVideoTransformer3DModel",
    dict(in_channels=4, out_channels=6, text_embed_dim=20)
    | dict(num_single_layers=2, num_refiner_layers=2, guidance_embeds=True)
    | dict(pooled_projection_dim=12, rope_axes_dim=(4, 6, 6)),
    (3, 6, 10, 4),
    dict(
      hidden_states=(2, 4, 3, 6, 10),
      encoder_hidden_states=(2, 7, 20),
      encoder_attention_mask=(2, 7),
      pooled_projections=(2, 12),
      timestep=(2,),
      guidance=(2,),
    ),
  ),
  (
    "SD3Transformer2DModel",
    dict(in_channels=4, out_channels=4, joint_attention_dim=20)
    | dict(caption_projection_dim=48, pooled_projection_dim=12)
    | dict(dual_attention_layers=(0, 1), sample_size=12)
    | dict(pos_embed_max_size=12, qk_norm="rms_norm"),
    (6, 10, 4),
    dict(
      hidden_states=(2, 4, 6, 10),
      encoder_hidden_states=(2, 7, 20),
      pooled_projections=(2, 12),
      timestep=(2,),
    ),
  ),
]


@pytest.mark.parametrize("case", SMALL_MODELS, ids=lambda case: case[0])
def test_denoisers_as_torch_counts_them(case):
  name, sizes, latents, shapes = case
  module = getattr(diffusers, name)(**TINY | sizes)
  inputs = {key: torch.ones(shape) for key, shape in shapes.items()}
  if name.startswith("Qwen"):
    inputs["img_shapes"] = [[(1, 3, 5)]] * 2
  ledger = DENOISERS[name](module.config, latents, 7)
  expected = counted(lambda: module(**inputs))
  assert costs.forward(ledger, batch=2).flops == expected


@pytest.mark.parametrize(
  ("name", "sizes", "latents"),
  [
    (
      "AutoencoderKL",
      references.VAE | dict(block_out_channels=(8, 16, 24)),
      (3, 5, 4),
    ),
    ("AutoencoderKLQwenImage", dict(), (3, 5, 4)),
    ("AutoencoderKLWan", dict(), (3, 3, 5, 4)),
    ("AutoencoderKLHunyuanVideo", dict(), (3, 2, 3, 4)),
    ("AutoencoderKLHunyuanVideo", dict(), (8, 2, 3, 4)),
  ],
)
def test_decoders_as_torch_counts_them(name, sizes, latents):
  if name == "AutoencoderKL":
    blocks = {
      f"{way}_block_types": (f"{way.title()}{kind}Block2D",) * 3
      for way, kind in (("down", "Encoder"), ("up", "Decoder"))
    }
    sizes = sizes | blocks
  elif name == "AutoencoderKLHunyuanVideo":
    sizes = dict(
      block_out_channels=(8, 8, 16, 16),
      layers_per_block=1,
      latent_channels=4,
      norm_num_groups=4,
    )
  else:
    sizes = dict(base_dim=8, z_dim=4, num_res_blocks=1)
    sizes |= dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
  module = getattr(diffusers, name)(**sizes).eval()
  *frames, height, width, channels = latents
  if name == "AutoencoderKLQwenImage":
    frames = [1]
  config = record(**dict(module.config) | dict(out_channels=3))
  ledger = DECODERS[name](config, latents)
  z = torch.zeros(2, channels, *frames, height, width)
  expected = counted(lambda: module.decode(z))
  assert costs.forward(ledger, batch=2).flops == expected


def dot_flops(jaxpr):
  """FLOPs of every product in a program, loops unrolled."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      inner = math.prod(shape[axis] for axis in contracted)
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    times = equation.params.get("length", 1)
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          total += times * dot_flops(inner)
  return total


def program(model, batch):
  args = references.arguments(batch=batch, height=12, width=8, text_len=9)

  def loss(params):
    return jnp.sum(model.apply(params, *args) ** 2)

  return loss


def test_flux_as_our_own_program_computes_it():
  model = random_model(num_layers=2, num_single_layers=3)
  ledger = costs.flux(model.config, (12, 8, 4), 9)
  program_flops = dot_flops(
    jax.make_jaxpr(program(model, 3))(model.params).jaxpr
  )
  assert costs.forward(ledger, batch=3).flops == program_flops


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_backward_as_our_own_program_computes_it(remat):
  model = random_model(num_layers=3, num_single_layers=4, remat=remat)
  gradient = jax.make_jaxpr(jax.grad(program(model, 3)))(model.params)
  ledger = costs.flux(model.config, (12, 8, 4), 9)
  forward = costs.forward(ledger, batch=3)
  backward = costs.backward(ledger, batch=3, remat=remat)
  found = dot_flops(gradient.jaxpr)
  # Inputs need no gradient: a little less than twice the forward.
  np.testing.assert_allclose(forward.flops + backward.flops, found, rtol=0.02)


def test_backward_of_adapters_as_our_own_program_computes_it():
  """Nothing is allocated, so that products can be large beside adapters."""
  config = dataclasses.replace(
    references.CONFIG,
    num_attention_heads=8,
    attention_head_dim=64,
    axes_dims_rope=(16, 24, 24),
  )
  family = models.find_family("FluxTransformer2DModel")
  model = lora.adapt(
    models.abstract_model(family, config),
    rank=1,
    alpha=1.0,
    targets=("blocks",),
    key=jax.random.key(0),
  )
  loss = program(model, 3)
  trainable, frozen = lora.split_trainable(model.params, "lora")
  gradient = jax.make_jaxpr(jax.grad(lambda a, b: loss(join(a, b))))
  ledger = costs.flux(model.config, (12, 8, 4), 9)
  cost = costs.forward(ledger, 3) + costs.backward(ledger, 3, lora=True)
  found = dot_flops(gradient(trainable, frozen).jaxpr)
  np.testing.assert_allclose(cost.flops, found, rtol=0.02)


def test_units_of_a_run():
  values = small_config("prompts.txt")  # 5 steps, a KL term
  found = {}
  for name, guidance, rank in (("full", 1, 0), ("cfg", 4, 0), ("lora", 1, 2)):
    values.sampling.guidance_scale, values.train.lora_rank = guidance, rank
    assembly = assemble(from_config_dict(values))
    found[name] = unit_flops(assembly, 16)
  shape = assembly.recipe.latent_shape
  decode = DECODERS["AutoencoderKL"](assembly.autoencoder.config, shape)
  decode = costs.forward(decode).flops
  ledger = costs.flux(assembly.model.config, shape, 16)
  step = costs.forward(ledger)
  assert found["full"].sample == pytest.approx(5 * step.flops + decode)
  assert found["cfg"].sample == pytest.approx(10 * step.flops + decode)
  # Forward, backward and the reference.
  assert found["full"].transition == pytest.approx(4 * step.flops)
  assert found["cfg"].transition == pytest.approx(8 * step.flops)
  less = found["full"].transition - found["lora"].transition
  assert less == pytest.approx(step.gemm)


def test_flux_as_xla_counts_it():
  """One block of each kind: XLA counts the body of a loop once."""
  heads = dict(num_attention_heads=8, attention_head_dim=32)
  model = random_model(
    num_layers=1, num_single_layers=1, axes_dims_rope=(8, 12, 12), **heads
  )
  lowered = jax.jit(program(model, 2)).lower(model.params)
  found = lowered.cost_analysis()["flops"]
  ledger = costs.flux(model.config, (12, 8, 4), 9)
  expected = costs.forward(ledger, batch=2).flops
  assert 1 <= found / expected < 1.05  # and norms, softmax, activations


def test_backward_by_policy():
  products, ends = (Product(3, 4, 5, count=2),), (Product(3, 5, 7),)
  ledger = Ledger(products, ends, (Attention(3, 6, 4, heads=2),), 15, 2)
  one = costs.forward(ledger, batch=2)
  assert one.gemm == 2 * (2 * 2 * 60 + 2 * 105)
  assert one.attention == 2 * 4 * 3 * 6 * 4
  moved = 2 * (2 * 3 * 9 + 3 * 12 + 2 * 9 * 4) + 2 * 20 + 35
  assert one.bytes == 2 * moved
  plain = costs.backward(ledger, 2)
  assert (plain.gemm, plain.attention) == (2 * one.gemm, 2 * one.attention)
  assert plain.bytes == 2 * one.bytes
  lora = costs.backward(ledger, 2, lora=True)
  assert (lora.gemm, lora.attention) == (one.gemm, 2 * one.attention)
  dots = costs.backward(ledger, 2, remat="dots")
  assert (dots.gemm, dots.attention) == (2 * one.gemm, 3 * one.attention)
  block = costs.backward(ledger, 2, remat="block")
  assert block.gemm == 2 * one.gemm + 2 * 2 * 2 * 60
  assert block.attention == 3 * one.attention
  saved = [costs.saved_bytes(ledger, 2, 2, remat=r) for r in ("block", "dots")]
  assert saved == [2 * 2 * 30, 2 * 2 * (30 + 2 * 15)]
  kept = costs.saved_bytes(ledger, 2, 2, remat="none")
  assert kept == saved[1] + 2 * 4 * 2 * 18


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5e", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H200", 989),
    ("NVIDIA GH200 480GB", None),
    ("TPU v4 lite", None),
    ("cpu", None),
  ],
)
def test_peaks(kind, peak):
  assert peak_tflops(kind) == peak


def test_lane_throughput(monkeypatch):
  hardware = {
    "rollout": Hardware({"data": 2}, 2, 2, "cpu"),
    "trainer": Hardware({"data": 1}, 1, 1, "cpu"),
  }
  spans = [
    Span("generate", "rollout", 0.0, 1.0, {"size": 8}),
    Span("generate", "rollout", 1.0, 2.0, {"size": 4}),
    Span("train", "trainer", 2.0, 3.0, {"size": 6}),
    Span("score", "host", 2.0, 3.0, {"size": 8}),
    Span("update", "trainer", 3.0, 4.0, {"size": 0}),
  ]
  flops = UnitFlops(sample=5e12, transition=2e12)
  found = lane_throughput(spans, flops, hardware, seconds=4.0)
  rates = {"rollout": 12 * 5 / 4 / 2, "trainer": 6 * 2 / 4}
  assert found["tflops_per_second"] == pytest.approx(rates)
  assert found["mfu"] == {"rollout": None, "trainer": None}
  monkeypatch.setattr(throughput, "PEAKS", ((".*", 15.0),))
  found = lane_throughput(spans, flops, hardware, seconds=4.0)
  assert found["mfu"] == pytest.approx({"rollout": 0.5, "trainer": 0.2})
  assert lane_throughput(spans, None, hardware, seconds=4.0) == {}
