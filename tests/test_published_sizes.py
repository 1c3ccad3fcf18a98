"""Published models at full size, abstractly: nothing is allocated."""

import dataclasses
import inspect

import diffusers
import jax
import numpy as np
import pytest
import torch

from digen_jax import models
from digen_jax.models import layers, published
from digen_jax.parallel import rules
from digen_jax.parallel.mesh import AXES
from digen_jax.weights import names

FLUX = dict(
  _class_name="FluxTransformer2DModel",
  patch_size=1,
  in_channels=64,
  num_layers=19,
  num_single_layers=38,
  attention_head_dim=128,
  num_attention_heads=24,
  joint_attention_dim=4096,
  pooled_projection_dim=768,
)
QWEN_IMAGE = dict(
  _class_name="QwenImageTransformer2DModel",
  patch_size=2,
  in_channels=64,
  out_channels=16,
  num_layers=60,
  attention_head_dim=128,
  num_attention_heads=24,
  joint_attention_dim=3584,
  pooled_projection_dim=768,
  guidance_embeds=False,
  axes_dims_rope=[16, 56, 56],
)
SD3 = dict(
  _class_name="SD3Transformer2DModel",
  sample_size=128,
  patch_size=2,
  in_channels=16,
  out_channels=16,
  num_layers=24,
  attention_head_dim=64,
  num_attention_heads=24,
  joint_attention_dim=4096,
  caption_projection_dim=1536,
  pooled_projection_dim=2048,
  pos_embed_max_size=192,
)
SD35_MEDIUM = SD3 | dict(
  pos_embed_max_size=384,
  dual_attention_layers=list(range(13)),
  qk_norm="rms_norm",
)
SD35_LARGE = SD3 | dict(
  num_layers=38,
  num_attention_heads=38,
  caption_projection_dim=2432,
  dual_attention_layers=[],
  qk_norm="rms_norm",
)
WAN = dict(
  _class_name="WanTransformer3DModel",
  patch_size=[1, 2, 2],
  num_attention_heads=40,
  attention_head_dim=128,
  in_channels=16,
  out_channels=16,
  text_dim=4096,
  freq_dim=256,
  ffn_dim=13824,
  num_layers=40,
)
WAN_SMALL = WAN | dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
HUNYUAN_VIDEO = dict(
  _class_name="HunyuanVideoTransformer3DModel",
  patch_size=2,
  patch_size_t=1,
  in_channels=16,
  out_channels=16,
  num_attention_heads=24,
  attention_head_dim=128,
  num_layers=20,
  num_single_layers=40,
  num_refiner_layers=2,
  text_embed_dim=4096,
  pooled_projection_dim=768,
  rope_axes_dim=[16, 56, 56],
)

# config.json, weights, elements of constants, most devices that share heads.
PUBLISHED = {
  "FLUX.1-dev": (FLUX | dict(guidance_embeds=True), 11_901_408_320, 0, 8),
  "FLUX.1-schnell": (FLUX | dict(guidance_embeds=False), 11_891_178_560, 0, 8),
  "Qwen-Image": (QWEN_IMAGE, 20_430_401_088, 0, 8),
  "SD3-medium": (SD3, 2_028_328_000, 56_623_104, 8),
  "SD3.5-medium": (SD35_MEDIUM, 2_243_171_520, 226_492_416, 8),
  "SD3.5-large": (SD35_LARGE, 8_056_627_520, 89_653_248, 2),
  "Wan2.1-14B": (WAN, 14_288_491_584, 0, 8),
  "Wan2.1-1.3B": (WAN_SMALL, 1_418_996_800, 0, 4),
  "HunyuanVideo": (HUNYUAN_VIDEO, 12_821_012_544, 0, 8),
}

GUIDED = (
  "QwenImageTransformer2DModel",
  "SD3Transformer2DModel",
  "WanTransformer3DModel",
)


def abstract(raw):
  family = models.find_family(raw["_class_name"])
  return models.abstract_model(family, family.parse_config(raw))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_reference_and_no_other(name):
  raw, weights, constants, _ = PUBLISHED[name]
  model = abstract(raw)
  found = {True: 0, False: 0}
  for path, leaf in jax.tree.leaves_with_path(model.params):
    found[path[-1].key in layers.CONSTANTS] += leaf.size
  assert (found[False], found[True]) == (weights, constants)

  with torch.device("meta"):
    reference = getattr(diffusers, raw["_class_name"]).from_config(raw)
  expected = {k: tuple(x.shape) for k, x in reference.state_dict().items()}
  name_map = names.NAME_MAPS[raw["_class_name"]]
  actual = {
    tensor: entry.tensor_shape
    for entry in names.entries(model.params, name_map)
    for tensor in entry.names
  }
  assert actual == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_published_models(name):
  raw, *_ = PUBLISHED[name]
  family = models.find_family(raw["_class_name"])
  config = family.parse_config(raw, dtype="bfloat16", remat="block")
  known = name.lower().replace("flux.1", "flux").replace("yuanv", "yuan-v")
  assert published.recognise(config) == known
  model = published.MODELS[known]
  smaller = dataclasses.replace(config, num_layers=config.num_layers - 1)
  assert published.recognise(smaller) is None

  settings = model.settings
  assert family.video == (settings.num_frames > 1)
  call = getattr(diffusers, family.pipeline_name).__call__
  theirs = inspect.signature(call).parameters
  for name in ("height", "width", "num_frames"):
    if name in theirs and theirs[name].default is not None:
      assert getattr(settings, name) == theirs[name].default
  scale = theirs["guidance_scale"].default
  if getattr(config, "guidance_embeds", False):
    assert settings.embedded_guidance == scale
  assert model.guided == (family.class_name in GUIDED)
  assert settings.tiling == (256 if "hunyuan" in known else 0)


@pytest.mark.parametrize("devices", [8, 16, 32])
@pytest.mark.parametrize("name", PUBLISHED)
def test_layouts_split_the_weights(name, devices):
  """Trainers leave a device its share, tensor all but the modulations'."""
  raw, weights, constants, tensor = PUBLISHED[name]
  model = abstract(raw)
  leaves = jax.tree.leaves(model.params)

  def stored(sizes, table):
    mesh = jax.sharding.AbstractMesh(sizes, AXES)
    tree = rules.param_shardings(mesh, model.logical_axes, model.params, table)
    return [
      int(np.prod(sharding.shard_shape(leaf.shape)))
      for sharding, leaf in zip(jax.tree.leaves(tree), leaves)
    ]

  total = sum(leaf.size for leaf in leaves)
  assert sum(stored((1, devices, 1, 1), rules.TRAINER)) < 1.01 * total / devices
  # Position tables have one dimension to split, and two axes could.
  both = stored((1, devices // 2, 2, 1), rules.TRAINER)
  assert sum(both) < 1.01 * (total + constants) / devices
  sent = stored((devices, 1, 1, 1), rules.PARTS)
  assert sum(sent) < 1.01 * total / devices

  rollout = stored((devices // tensor, 1, 1, tensor), rules.ROLLOUT)
  assert model.config.num_attention_heads % tensor == 0
  split = [
    (part, leaf.size)
    for part, leaf, axes in zip(
      rollout,
      leaves,
      jax.tree.leaves(
        model.logical_axes, is_leaf=lambda x: isinstance(x, tuple)
      ),
    )
    if {"heads", "mlp"} & set(axes)
  ]
  assert all(part * tensor == size for part, size in split)
  assert sum(size for _, size in split) > 0.6 * weights
