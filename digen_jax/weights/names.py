"""How our parameter trees and diffusers' state dicts name the same weights.

A map is a table of renames of whole path segments, from ours to theirs, in
which `{i}` stands for the number of a stacked block. Loading and exporting
walk our tree with the same table, so they cannot disagree.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# Axes of our kernels in the order of theirs: linear, 2-D and 3-D convolution.
KERNEL_ORDERS = {2: (1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}
LEAF_NAMES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "lora_a": "lora_A.weight",
  "lora_b": "lora_B.weight",
}
MATRICES = ("kernel", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class NameMap:
  """One module class's names.

  Attributes:
    renames: our path segments -> theirs, longest first wins.
    aliases: their current segments -> those of older checkpoints.
    ignored: regular expressions of tensors without meaning for us.
    chain: our stacks that share one numbering of theirs, in its order; a
      stack that a model lacks is passed over.
    float32: segments of their names; what has one is kept in float32,
      whatever dtype the others are loaded in (diffusers'
      `_keep_in_fp32_modules`).
  """

  renames: Mapping[str, str]
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  chain: tuple[str, ...] = ()
  float32: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
  """One leaf of our tree and the tensors that it is made of.

  Attributes:
    path: keys in our tree.
    shape: of our leaf, the layer axis included.
    names: theirs, one per layer if stacked, else one.
    stacked: whether the leaf has a leading layer axis.
    order: our axes (without the layer axis) in the order of theirs.
  """

  path: tuple[Any, ...]
  shape: tuple[int, ...]
  names: tuple[str, ...]
  stacked: bool
  order: tuple[int, ...]

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """The shape of each of the tensors."""
    shape = self.shape[1:] if self.stacked else self.shape
    return tuple(shape[axis] for axis in self.order)

  def to_theirs(self, leaf: np.ndarray) -> np.ndarray:
    """One layer of our leaf -> their axis order, a view."""
    return leaf.transpose(self.order)

  def to_ours(self, tensor: np.ndarray) -> np.ndarray:
    """Their tensor -> one layer of our leaf, a view."""
    return tensor.transpose(np.argsort(self.order))


def entries(params: Mapping[str, Any], name_map: NameMap) -> Iterator[Entry]:
  """Every leaf of our tree with the names of its tensors.

  Args:
    params: nested dict of arrays or `jax.ShapeDtypeStruct`s; any part of a
      model's, adapters included.
    name_map: the names of its module class.
  """
  first = _first_numbers(params, name_map.chain)
  for path, leaf in _leaves(params, ()):
    *module, kind = map(str, path)
    module = _rename(".".join(module), name_map.renames)
    leaf_name = LEAF_NAMES.get(kind, kind)
    # The root has leaves of its own in some models.
    pattern = f"{module}.{leaf_name}" if module else leaf_name
    stacked = "{i}" in pattern
    count = leaf.shape[0] if stacked else 1
    ndim = len(leaf.shape) - stacked
    order = KERNEL_ORDERS[ndim] if kind in MATRICES else tuple(range(ndim))
    start = first.get(path[0], 0)
    names = tuple(pattern.replace("{i}", str(start + i)) for i in range(count))
    yield Entry(path, tuple(leaf.shape), names, stacked, order)


def keeps_float32(entry: Entry, name_map: NameMap) -> bool:
  """Whether a leaf is in float32 whatever the others are in."""
  return not set(name_map.float32).isdisjoint(entry.names[0].split("."))


def old_name(name: str, name_map: NameMap) -> str:
  """What older checkpoints call their tensor `name`."""
  return _rename(name, name_map.aliases)


def _first_numbers(
  params: Mapping[str, Any], chain: tuple[str, ...]
) -> dict[str, int]:
  """The number of the first layer of every stack of a chain."""
  first, total = {}, 0
  for name in chain:
    if name in params:
      first[name] = total
      _, leaf = next(_leaves(params[name], ()))
      total += leaf.shape[0]
  return first


def _leaves(node: Any, path: tuple) -> Iterator[tuple[tuple, Any]]:
  if isinstance(node, Mapping):
    for key, child in node.items():
      yield from _leaves(child, (*path, key))
  else:
    yield path, node


def _rename(path: str, renames: Mapping[str, str]) -> str:
  """Replaces runs of whole segments, each segment at most once."""
  if not renames:
    return path
  choices = sorted(renames, key=len, reverse=True)
  pattern = rf"(?<![^.])({'|'.join(map(re.escape, choices))})(?![^.])"
  return re.sub(pattern, lambda match: renames[match[0]], path)


FLUX = NameMap(
  renames={
    "time_embedder": "time_text_embed.timestep_embedder",
    "guidance_embedder": "time_text_embed.guidance_embedder",
    "pooled_embedder": "time_text_embed.text_embedder",
    "double_blocks": "transformer_blocks.{i}",
    "single_blocks": "single_transformer_blocks.{i}",
    "to_out": "to_out.0",
    "ff.linear_1": "ff.net.0.proj",
    "ff.linear_2": "ff.net.2",
    "ff_context.linear_1": "ff_context.net.0.proj",
    "ff_context.linear_2": "ff_context.net.2",
  }
)

QWEN_IMAGE = NameMap(
  renames={
    "time_embedder": "time_text_embed.timestep_embedder",
    "blocks": "transformer_blocks.{i}",
    "norm1.linear": "img_mod.1",
    "norm1_context.linear": "txt_mod.1",
    "to_out": "to_out.0",
    "ff.linear_1": "img_mlp.net.0.proj",
    "ff.linear_2": "img_mlp.net.2",
    "ff_context.linear_1": "txt_mlp.net.0.proj",
    "ff_context.linear_2": "txt_mlp.net.2",
  }
)

SD3 = NameMap(
  renames={
    "patch_embed": "pos_embed",
    "time_embedder": "time_text_embed.timestep_embedder",
    "pooled_embedder": "time_text_embed.text_embedder",
    "dual_blocks": "transformer_blocks.{i}",
    "blocks": "transformer_blocks.{i}",
    "last_block": "transformer_blocks.{i}",
    "to_out": "to_out.0",
    "ff.linear_1": "ff.net.0.proj",
    "ff.linear_2": "ff.net.2",
    "ff_context.linear_1": "ff_context.net.0.proj",
    "ff_context.linear_2": "ff_context.net.2",
  },
  chain=("dual_blocks", "blocks", "last_block"),
)

WAN = NameMap(
  renames={
    "time_embedder": "condition_embedder.time_embedder",
    "time_proj": "condition_embedder.time_proj",
    "text_embedder": "condition_embedder.text_embedder",
    "blocks": "blocks.{i}",
    "to_out": "to_out.0",
    "ffn.linear_1": "ffn.net.0.proj",
    "ffn.linear_2": "ffn.net.2",
  },
  float32=("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
)

HUNYUAN_VIDEO = NameMap(
  renames={
    **FLUX.renames,
    "x_embedder": "x_embedder.proj",
    "refiner_blocks": "token_refiner.refiner_blocks.{i}",
  }
)

AUTOENCODER_KL = NameMap(
  renames={
    "attention": "attentions.0",
    "to_out": "to_out.0",
    "downsample": "downsamplers.0.conv",
    "upsample": "upsamplers.0.conv",
  },
  aliases={
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj_attn",
  },
)

# Also of Qwen-Image's.
AUTOENCODER_KL_WAN = NameMap(
  renames={
    "attention": "attentions.0",
    "resample": "resample.1",
    "upsample": "upsamplers.0",
  }
)

AUTOENCODER_KL_HUNYUAN_VIDEO = NameMap(
  renames={
    "attention": "attentions.0",
    "to_out": "to_out.0",
    "conv_in": "conv_in.conv",
    "conv1": "conv1.conv",
    "conv2": "conv2.conv",
    "conv_shortcut": "conv_shortcut.conv",
    "downsample": "downsamplers.0.conv.conv",
    "upsample": "upsamplers.0.conv.conv",
    "conv_out": "conv_out.conv",
  }
)

NAME_MAPS = {
  "FluxTransformer2DModel": FLUX,
  "QwenImageTransformer2DModel": QWEN_IMAGE,
  "SD3Transformer2DModel": SD3,
  "WanTransformer3DModel": WAN,
  "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
  "AutoencoderKL": AUTOENCODER_KL,
  "AutoencoderKLWan": AUTOENCODER_KL_WAN,
  "AutoencoderKLQwenImage": AUTOENCODER_KL_WAN,
  "AutoencoderKLHunyuanVideo": AUTOENCODER_KL_HUNYUAN_VIDEO,
}
