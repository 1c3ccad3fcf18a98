"""What a model costs, from its sizes alone: FLOPs, bytes moved, bytes kept.

A model is written down as a ledger: the products with weights and the
attentions that one sample goes through. Everything else follows from it.

FLOPs are 2 per multiply-accumulate; norms, softmax and other pointwise work
are not counted. Bytes are those that have to move between memory and the
arithmetic units if every product reads its operands and writes its result
once, pointwise work is fused, and attention keeps its scores on the chip.

The functions below take sizes by the names of diffusers' `config.json`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

TIME_DIM = 256
MLP_RATIO = 4
PATCH = 2  # latent pixels along a side of a token, where no config says it
SCORE_BYTES = 4  # attention weights are float32


@dataclasses.dataclass(frozen=True)
class Product:
  """`count` products with weights of their own; convolutions as well.

  Attributes:
    rows: output positions of one sample.
    fan_in: features (channels) read.
    fan_out: features written.
    count: how many there are.
    taps: kernel size of a convolution, all axes multiplied.
  """

  rows: int
  fan_in: int
  fan_out: int
  count: int = 1
  taps: int = 1

  @property
  def flops(self) -> float:
    """Of one sample."""
    return 2.0 * self.count * self.rows * self.fan_in * self.fan_out * self.taps

  @property
  def weights(self) -> int:
    """Number of weights, without biases."""
    return self.count * self.fan_in * self.fan_out * self.taps

  @property
  def outputs(self) -> int:
    """Elements written for one sample."""
    return self.count * self.rows * self.fan_out

  @property
  def traffic(self) -> int:
    """Elements read and written for one sample, weights aside."""
    return self.count * self.rows * self.fan_in + self.outputs


@dataclasses.dataclass(frozen=True)
class Attention:
  """`count` attentions of `queries` on `keys`, `heads` x head size = `width`."""

  queries: int
  keys: int
  width: int
  count: int = 1
  heads: int = 1

  @property
  def flops(self) -> float:
    """Of one sample: scores, and the weighted sum of values."""
    return 4.0 * self.count * self.queries * self.keys * self.width

  @property
  def traffic(self) -> int:
    """Elements read and written for one sample."""
    return self.count * 2 * (self.queries + self.keys) * self.width

  @property
  def scores(self) -> int:
    """Elements of the attention weights of one sample."""
    return self.count * self.heads * self.queries * self.keys


@dataclasses.dataclass(frozen=True)
class Ledger:
  """The work of one sample.

  Attributes:
    blocks: products inside of the repeated blocks.
    ends: products before and after them.
    attentions: all of them.
    residual: elements that a block hands to the next.
    depth: number of blocks.
  """

  blocks: tuple[Product, ...]
  ends: tuple[Product, ...] = ()
  attentions: tuple[Attention, ...] = ()
  residual: int = 0
  depth: int = 0


@dataclasses.dataclass(frozen=True)
class Cost:
  """FLOPs of products with weights and of attention, and bytes moved."""

  gemm: float = 0.0
  attention: float = 0.0
  bytes: float = 0.0

  @property
  def flops(self) -> float:
    """All of them."""
    return self.gemm + self.attention

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.gemm + other.gemm,
      self.attention + other.attention,
      self.bytes + other.bytes,
    )

  def __mul__(self, factor: float) -> "Cost":
    return Cost(
      self.gemm * factor, self.attention * factor, self.bytes * factor
    )


def forward(ledger: Ledger, batch: int = 1, itemsize: int = 2) -> Cost:
  """A forward pass.

  Args:
    ledger: of the model.
    batch: samples; weights are read once for all of them.
    itemsize: bytes of an element, 2 for bfloat16.
  """
  return _products((*ledger.blocks, *ledger.ends), batch, itemsize) + (
    _attentions(ledger.attentions, batch, itemsize)
  )


def backward(
  ledger: Ledger,
  batch: int = 1,
  itemsize: int = 2,
  *,
  remat: str = "none",
  lora: bool = False,
) -> Cost:
  """The backward pass alone, with what it computes again.

  Args:
    ledger: of the model.
    batch: samples.
    itemsize: bytes of an element.
    remat: as in `layers.scan_blocks`: "dots" computes attention again, "block"
      all of a block. "none" is what the mathematics needs.
    lora: only adapters are trained: frozen weights need no gradient, which is
      half of their products; those of the adapters are not counted.
  """
  products = _products((*ledger.blocks, *ledger.ends), batch, itemsize)
  attentions = _attentions(ledger.attentions, batch, itemsize)
  cost = products * (1 if lora else 2) + attentions * 2
  if remat in ("dots", "block"):
    cost += attentions
  if remat == "block":
    cost += _products(ledger.blocks, batch, itemsize)
  return cost


def saved_bytes(
  ledger: Ledger, batch: int = 1, itemsize: int = 2, *, remat: str = "block"
) -> float:
  """Bytes that the forward pass keeps for the backward pass.

  With "none" pointwise functions keep more, and the compiler decides what: the
  result is then a lower bound.

  Args:
    ledger: of the model.
    batch: samples.
    itemsize: bytes of an element.
    remat: as in `layers.scan_blocks`.
  """
  elements = ledger.depth * ledger.residual
  if remat != "block":
    elements += sum(p.outputs for p in ledger.blocks)
  kept = float(batch * itemsize * elements)
  if remat == "none":
    kept += batch * SCORE_BYTES * sum(a.scores for a in ledger.attentions)
  return kept


def _products(products: tuple[Product, ...], batch: int, itemsize: int) -> Cost:
  elements = sum(batch * p.traffic + p.weights for p in products)
  flops = batch * sum(p.flops for p in products)
  return Cost(gemm=flops, bytes=elements * itemsize)


def _attentions(
  attentions: tuple[Attention, ...], batch: int, itemsize: int
) -> Cost:
  return Cost(
    attention=batch * sum(a.flops for a in attentions),
    bytes=float(batch * itemsize * sum(a.traffic for a in attentions)),
  )


def _tokens(latent_shape: tuple[int, ...], patch: tuple[int, int, int]) -> int:
  """Tokens of latents [h, w, c] or [f, h, w, c]."""
  *frames, height, width, _ = latent_shape
  t, p, q = patch
  return (math.prod(frames) // t) * (height // p) * (width // q)


def _embedder(fan_in: int, dim: int, rows: int = 1) -> tuple[Product, ...]:
  """Two layers: of time, guidance, pooled prompt, text."""
  return Product(rows, fan_in, dim), Product(rows, dim, dim)


def _layer(rows: int, dim: int, hidden: int, count: int) -> tuple[Product, ...]:
  """Query, key, value, output and feed-forward of one stream."""
  return (
    Product(rows, dim, 3 * dim, count),
    Product(rows, dim, dim, count),
    Product(rows, dim, hidden, count),
    Product(rows, hidden, dim, count),
  )


def _single(rows: int, dim: int, count: int) -> tuple[Product, ...]:
  """FLUX's single blocks: feed-forward beside attention, joined at the end."""
  hidden = MLP_RATIO * dim
  return (
    Product(1, dim, 3 * dim, count),
    Product(rows, dim, 3 * dim, count),
    Product(rows, dim, hidden, count),
    Product(rows, dim + hidden, dim, count),
  )


def flux(config: Any, latent_shape: tuple[int, ...], text_len: int) -> Ledger:
  """FLUX.1: double blocks, then single blocks."""
  heads, dim = _width(config)
  n = _tokens(latent_shape, (1, PATCH, PATCH))
  joint, layers = n + text_len, config.num_layers
  depth = layers + config.num_single_layers
  return Ledger(
    blocks=(
      Product(1, dim, 6 * dim, 2 * layers),
      *_layer(n, dim, MLP_RATIO * dim, layers),
      *_layer(text_len, dim, MLP_RATIO * dim, layers),
      *_single(joint, dim, config.num_single_layers),
    ),
    ends=(
      Product(n, config.in_channels, dim),
      Product(text_len, config.joint_attention_dim, dim),
      *_embedder(TIME_DIM, dim) * (1 + config.guidance_embeds),
      *_embedder(config.pooled_projection_dim, dim),
      Product(1, dim, 2 * dim),
      Product(n, dim, config.out_channels or config.in_channels),
    ),
    attentions=(Attention(joint, joint, dim, depth, heads),),
    residual=joint * dim,
    depth=depth,
  )


def qwen_image(
  config: Any, latent_shape: tuple[int, ...], text_len: int
) -> Ledger:
  """Qwen-Image: double blocks alone."""
  heads, dim = _width(config)
  patch = config.patch_size
  n = _tokens(latent_shape, (1, patch, patch))
  joint, layers = n + text_len, config.num_layers
  return Ledger(
    blocks=(
      Product(1, dim, 6 * dim, 2 * layers),
      *_layer(n, dim, MLP_RATIO * dim, layers),
      *_layer(text_len, dim, MLP_RATIO * dim, layers),
    ),
    ends=(
      Product(n, config.in_channels, dim),
      Product(text_len, config.joint_attention_dim, dim),
      *_embedder(TIME_DIM, dim),
      Product(1, dim, 2 * dim),
      Product(n, dim, patch**2 * config.out_channels),
    ),
    attentions=(Attention(joint, joint, dim, layers, heads),),
    residual=joint * dim,
    depth=layers,
  )


def wan(config: Any, latent_shape: tuple[int, ...], text_len: int) -> Ledger:
  """Wan: self-attention on the video, cross-attention to the text."""
  heads, dim = _width(config)
  layers, patch = config.num_layers, math.prod(config.patch_size)
  n = _tokens(latent_shape, config.patch_size)
  out = config.out_channels or config.in_channels
  return Ledger(
    blocks=(
      *_layer(n, dim, config.ffn_dim, layers),
      Product(n, dim, dim, 2 * layers),  # query and output of the other
      Product(text_len, dim, 2 * dim, layers),
    ),
    ends=(
      Product(n, patch * config.in_channels, dim),
      *_embedder(config.freq_dim, dim),
      Product(1, dim, 6 * dim),
      *_embedder(config.text_dim, dim, text_len),
      Product(n, dim, patch * out),
    ),
    attentions=(
      Attention(n, n, dim, layers, heads),
      Attention(n, text_len, dim, layers, heads),
    ),
    residual=n * dim,
    depth=layers,
  )


def hunyuan_video(
  config: Any, latent_shape: tuple[int, ...], text_len: int
) -> Ledger:
  """HunyuanVideo: FLUX's blocks on a video, after a refiner of the text."""
  heads, dim = _width(config)
  hidden, refiner = MLP_RATIO * dim, config.num_refiner_layers
  patch = (config.patch_size_t, config.patch_size, config.patch_size)
  n, pixels = _tokens(latent_shape, patch), math.prod(patch)
  joint, layers = n + text_len, config.num_layers
  depth = layers + config.num_single_layers
  return Ledger(
    blocks=(
      Product(1, dim, 6 * dim, 2 * layers),
      *_layer(n, dim, hidden, layers),
      *_layer(text_len, dim, hidden, layers),
      *_single(joint, dim, config.num_single_layers),
    ),
    ends=(
      Product(n, pixels * config.in_channels, dim),
      Product(text_len, config.text_embed_dim, dim),
      *_embedder(TIME_DIM, dim),
      *_embedder(config.text_embed_dim, dim),
      Product(1, dim, 2 * dim, refiner),
      *_layer(text_len, dim, hidden, refiner),
      *_embedder(TIME_DIM, dim) * (1 + config.guidance_embeds),
      *_embedder(config.pooled_projection_dim, dim),
      Product(1, dim, 2 * dim),
      Product(n, dim, pixels * (config.out_channels or config.in_channels)),
    ),
    attentions=(
      Attention(joint, joint, dim, depth, heads),
      Attention(text_len, text_len, dim, refiner, heads),
    ),
    residual=joint * dim,
    depth=depth,
  )


def sd3(config: Any, latent_shape: tuple[int, ...], text_len: int) -> Ledger:
  """SD3: double blocks; the first may attend to the image twice (3.5 medium).

  The last block does not update the text.
  """
  heads, dim = _width(config)
  hidden, layers, patch = MLP_RATIO * dim, config.num_layers, config.patch_size
  dual = len(config.dual_attention_layers)
  n = _tokens(latent_shape, (1, patch, patch))
  joint = n + text_len
  return Ledger(
    blocks=(
      Product(1, dim, 6 * dim, layers - dual),
      Product(1, dim, 9 * dim, dual),
      Product(1, dim, 6 * dim, layers - 1),
      Product(1, dim, 2 * dim),
      *_layer(n, dim, hidden, layers),
      *_layer(text_len, dim, hidden, layers - 1),
      Product(text_len, dim, 3 * dim),
      Product(n, dim, 3 * dim, dual),
      Product(n, dim, dim, dual),
    ),
    ends=(
      Product(n, patch**2 * config.in_channels, dim),
      Product(text_len, config.joint_attention_dim, dim),
      *_embedder(TIME_DIM, dim),
      *_embedder(config.pooled_projection_dim, dim),
      Product(1, dim, 2 * dim),
      Product(n, dim, patch**2 * (config.out_channels or config.in_channels)),
    ),
    attentions=(
      Attention(joint, joint, dim, layers, heads),
      Attention(n, n, dim, dual, heads),
    ),
    residual=joint * dim,
    depth=layers,
  )


def _width(config: Any) -> tuple[int, int]:
  """Heads, and model width."""
  heads = config.num_attention_heads
  return heads, heads * config.attention_head_dim


# diffusers' class -> ledger(config, latent shape [h, w, c] or [f, h, w, c],
# text length).
DENOISERS: dict[str, Callable[[Any, tuple[int, ...], int], Ledger]] = {
  "FluxTransformer2DModel": flux,
  "QwenImageTransformer2DModel": qwen_image,
  "WanTransformer3DModel": wan,
  "HunyuanVideoTransformer3DModel": hunyuan_video,
  "SD3Transformer2DModel": sd3,
}
