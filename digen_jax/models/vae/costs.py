"""What decoding costs: the decoders' ledgers, see `models/costs.py`.

Convolutions at borders count as if they read padding.
"""

from collections.abc import Callable
from typing import Any

from digen_jax.models.costs import Attention, Ledger, Product

# Latent frames that AutoencoderKLHunyuanVideo decodes together: tiles of
# TILE + 1 every STRIDE frames, where there are more than TILE.
TILE, STRIDE = 4, 3


def _resnet(
  rows: int, fan_in: int, fan_out: int, taps: int
) -> tuple[Product, ...]:
  shortcut = (Product(rows, fan_in, fan_out),) if fan_in != fan_out else ()
  return (
    Product(rows, fan_in, fan_out, taps=taps),
    Product(rows, fan_out, fan_out, taps=taps),
    *shortcut,
  )


def _middle(rows: int, width: int, taps: int) -> tuple[Product, ...]:
  """Two residual blocks, and the projections of the attention between."""
  return (
    *_resnet(rows, width, width, taps) * 2,
    Product(rows, width, 3 * width),
    Product(rows, width, width),
  )


def autoencoder_kl(config: Any, latent_shape: tuple[int, ...]) -> Ledger:
  """The decoder of FLUX and SD3."""
  height, width, channels = latent_shape
  rows, (*_, last) = height * width, config.block_out_channels
  products = [
    Product(rows, channels, channels, count=int(config.use_post_quant_conv)),
    Product(rows, channels, last, taps=9),
    *_middle(rows, last, 9),
  ]
  attention = Attention(rows, rows, last)
  previous, levels = last, len(config.block_out_channels)
  for level, out in enumerate(reversed(config.block_out_channels)):
    products += _resnet(rows, previous, out, 9)
    products += _resnet(rows, out, out, 9) * config.layers_per_block
    if level < levels - 1:
      rows *= 4
      products.append(Product(rows, out, out, taps=9))
    previous = out
  products.append(Product(rows, previous, config.out_channels, taps=9))
  return Ledger(tuple(products), attentions=(attention,))


def autoencoder_kl_wan(config: Any, latent_shape: tuple[int, ...]) -> Ledger:
  """The decoder of Wan 2.1 and Qwen-Image, all convolutions in 3-D.

  Pictures are videos of one frame.
  """
  *frames, height, width, channels = latent_shape
  frames, area = (frames or [1])[0], height * width
  top = config.base_dim * config.dim_mult[-1]
  products = [
    Product(frames * area, channels, channels),
    Product(frames * area, channels, top, taps=27),
    *_middle(frames * area, top, 27),
  ]
  attention = Attention(area, area, top, count=frames)
  previous, up = top, (*reversed(config.temperal_downsample), None)
  for multiplier, temporal in zip(reversed(config.dim_mult), up):
    out, rows = config.base_dim * multiplier, frames * area
    products += _resnet(rows, previous, out, 27)
    products += _resnet(rows, out, out, 27) * config.num_res_blocks
    previous = out
    if temporal is None:
      break
    if temporal:  # the first frame is not doubled
      products.append(Product((frames - 1) * area, out, 2 * out, taps=3))
      frames = 2 * frames - 1
    area *= 4
    previous = out // 2
    products.append(Product(frames * area, out, previous, taps=9))
  products.append(
    Product(frames * area, previous, config.out_channels, taps=27)
  )
  return Ledger(tuple(products), attentions=(attention,))


def autoencoder_kl_hunyuan_video(
  config: Any, latent_shape: tuple[int, ...]
) -> Ledger:
  """The decoder of HunyuanVideo, with its tiles in time."""
  frames = latent_shape[0]
  starts = range(0, frames, STRIDE) if frames > TILE else (0,)
  tiles = [
    _hunyuan_tile(config, min(TILE + 1, frames - start), *latent_shape[1:])
    for start in starts
  ]
  return Ledger(
    sum((tile.blocks for tile in tiles), ()),
    attentions=sum((tile.attentions for tile in tiles), ()),
  )


def _hunyuan_tile(
  config: Any, frames: int, height: int, width: int, channels: int
) -> Ledger:
  rows, area = frames * height * width, height * width
  (*_, last), levels = config.block_out_channels, len(config.block_out_channels)
  products = [
    Product(rows, channels, channels),
    Product(rows, channels, last, taps=27),
    *_middle(rows, last, 27),
  ]
  attention = Attention(rows, rows, last)
  previous = last
  for level, out in enumerate(reversed(config.block_out_channels)):
    products += _resnet(frames * area, previous, out, 27)
    products += _resnet(frames * area, out, out, 27) * config.layers_per_block
    # Space doubles in the first three levels, time in the last two of them.
    if level < levels - 1:
      area *= 4
      frames = 2 * frames - 1 if level >= levels - 3 else frames
      products.append(Product(frames * area, out, out, taps=27))
    previous = out
  products.append(
    Product(frames * area, previous, config.out_channels, taps=27)
  )
  return Ledger(tuple(products), attentions=(attention,))


# diffusers' class -> ledger(config, latent shape [h, w, c] or [f, h, w, c]).
DECODERS: dict[str, Callable[[Any, tuple[int, ...]], Ledger]] = {
  "AutoencoderKL": autoencoder_kl,
  "AutoencoderKLQwenImage": autoencoder_kl_wan,
  "AutoencoderKLWan": autoencoder_kl_wan,
  "AutoencoderKLHunyuanVideo": autoencoder_kl_hunyuan_video,
}
