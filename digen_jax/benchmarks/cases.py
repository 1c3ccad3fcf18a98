"""The models that are measured: published sizes, tiny ones, inputs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from digen_jax import models
from digen_jax.errors import UserError
from digen_jax.types import Conditioning

JOINT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24}
TINY_IMAGE, TINY_VIDEO, TINY_TEXT = (8, 12, 4), (3, 8, 12, 4), 16


@dataclasses.dataclass(frozen=True)
class Workload:
  """What one sample is: its name, latent shape and text tokens."""

  name: str
  latents: tuple[int, ...]
  text: int


@dataclasses.dataclass(frozen=True)
class Case:
  """One model.

  Attributes:
    name: as published.
    sizes: `config.json`, as far as it is not the class's defaults.
    tiny: what a tiny model has instead.
    workloads: published ones, those that need more memory first.
    masked: whether it masks padded text.
  """

  name: str
  sizes: Mapping[str, Any]
  tiny: Mapping[str, Any]
  workloads: tuple[Workload, ...]
  masked: bool = False

  def config(self, *, tiny: bool, **compute: Any) -> Any:
    """The family's config record; `compute` is dtype and remat."""
    return self.family.parse_config(self.raw(tiny=tiny), **compute)

  def raw(self, *, tiny: bool) -> dict[str, Any]:
    """Content of `config.json`."""
    return {**self.sizes, **(self.tiny if tiny else {})}

  def workload(self, number: int, *, tiny: bool) -> Workload:
    """The `number`-th published one, or the tiny one."""
    if not tiny:
      return self.workloads[number]
    shape = TINY_VIDEO if self.family.video else TINY_IMAGE
    return Workload("tiny", shape, TINY_TEXT)

  @property
  def family(self) -> models.Family:
    """Its entry in `models.FAMILIES`."""
    return models.find_family(self.sizes["_class_name"])


def inputs(
  case: Case, config: Any, work: Workload, batch: int = 1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, Conditioning]:
  """Latents [B, ...], sigma [B] and conditioning, random, on the host.

  A quarter of the text is padding where the model masks that.
  """
  rng = np.random.default_rng(seed)

  def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=(batch, *shape)).astype(np.float32)

  def size(*names: str) -> int | None:
    return next((getattr(config, n) for n in names if hasattr(config, n)), None)

  text = size("joint_attention_dim", "text_dim", "text_embed_dim")
  pooled = size("pooled_projection_dim")
  guided = getattr(config, "guidance_embeds", False)
  mask = np.arange(work.text) < work.text * 3 // 4
  conditioning = Conditioning(
    text=normal(work.text, text),
    pooled=None if pooled is None else normal(pooled),
    mask=np.tile(mask, (batch, 1)) if case.masked else None,
    guidance=np.full(batch, 3.5, np.float32) if guided else None,
  )
  sigma = np.linspace(0.7, 0.9, batch, dtype=np.float32)
  return normal(*work.latents), sigma, conditioning


def random_params(shapes: Any, key: jax.Array, dtype: Any) -> Any:
  """Random parameters, made on the default device in their own dtype.

  A layer of one leaf is made at a time: no float32 copy is ever held.

  Args:
    shapes: nested dict of `jax.ShapeDtypeStruct`s.
    key: typed PRNG key.
    dtype: of the result.
  """

  def draw(path: Any, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    kind = path[-1].key
    stacked = any("block" in part.key for part in path)
    inner = leaf.shape[1:] if stacked else leaf.shape
    fan_in = np.prod(inner[:-1]) if kind == "kernel" else 16

    def one(key: jax.Array) -> jax.Array:
      noise = jax.random.normal(key, inner, dtype) * dtype(fan_in**-0.5)
      return noise + dtype(kind == "scale")

    if not stacked:
      return jax.jit(one)(key)
    keys = jax.random.split(key, leaf.shape[0])
    return jax.jit(lambda keys: jax.lax.map(one, keys))(keys)

  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
  return jax.tree.map_with_path(draw, shapes, keys)


VIDEO = {"in_channels": 4, "out_channels": 4}
CASES = {
  "flux": Case(
    "FLUX.1-dev",
    {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
    JOINT
    | {
      "num_single_layers": 2,
      "in_channels": 16,
      "joint_attention_dim": 32,
      "pooled_projection_dim": 24,
      "axes_dims_rope": [4, 10, 10],
    },
    (Workload("1024x1024", (128, 128, 16), 512),),
  ),
  "qwen_image": Case(
    "Qwen-Image",
    {"_class_name": "QwenImageTransformer2DModel"},
    JOINT
    | {
      "in_channels": 16,
      "out_channels": 4,
      "joint_attention_dim": 32,
      "axes_dims_rope": [4, 10, 10],
    },
    (
      Workload("1328x1328", (166, 166, 16), 256),
      Workload("1024x1024", (128, 128, 16), 256),
    ),
    masked=True,
  ),
  "sd3": Case(
    "SD3.5-medium",
    {
      "_class_name": "SD3Transformer2DModel",
      "sample_size": 128,
      "num_layers": 24,
      "num_attention_heads": 24,
      "attention_head_dim": 64,
      "joint_attention_dim": 4096,
      "caption_projection_dim": 1536,
      "pooled_projection_dim": 2048,
      "out_channels": 16,
      "pos_embed_max_size": 384,
      "dual_attention_layers": list(range(13)),
      "qk_norm": "rms_norm",
    },
    JOINT
    | VIDEO
    | {
      "num_layers": 3,
      "sample_size": 16,
      "joint_attention_dim": 32,
      "caption_projection_dim": 48,
      "pooled_projection_dim": 24,
      "pos_embed_max_size": 12,
      "dual_attention_layers": [0],
    },
    (Workload("1024x1024", (128, 128, 16), 333),),
  ),
  "wan": Case(
    "Wan2.1-T2V-14B",
    {"_class_name": "WanTransformer3DModel"},
    JOINT | VIDEO | {"text_dim": 32, "ffn_dim": 80},
    (
      Workload("720x1280x81", (21, 90, 160, 16), 512),
      Workload("480x832x81", (21, 60, 104, 16), 512),
    ),
  ),
  "hunyuan_video": Case(
    "HunyuanVideo",
    {"_class_name": "HunyuanVideoTransformer3DModel"},
    JOINT
    | VIDEO
    | {
      "num_single_layers": 2,
      "num_refiner_layers": 1,
      "text_embed_dim": 32,
      "pooled_projection_dim": 24,
      "rope_axes_dim": [4, 10, 10],
    },
    (
      Workload("720x1280x129", (33, 90, 160, 16), 256),
      Workload("544x960x129", (33, 68, 120, 16), 256),
      Workload("480x832x53", (14, 60, 104, 16), 256),
    ),
    masked=True,
  ),
}


def chosen(families: Sequence[str] | None) -> Sequence[str]:
  """Keys of `CASES`, all by default; UserError for a name that is none."""
  if unknown := set(families or ()) - set(CASES):
    raise UserError(
      f"--families: {', '.join(sorted(unknown))} unknown; there are "
      f"{', '.join(CASES)}"
    )
  return families or tuple(CASES)
