"""What a pre-training leaves behind: a diffusers pipeline, scores, a record."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from digen_jax import media
from digen_jax.data import scenes
from digen_jax.data.captioned import draw_scenes
from digen_jax.data.prompt_encoder import load_prompt_encoder
from digen_jax.data.tokenizer import write_tokenizers
from digen_jax.models import config as config_lib
from digen_jax.models import vae
from digen_jax.models.vae.autoencoder_kl import AutoencoderKLConfig
from digen_jax.pretrain import Networks, PretrainConfig, encode_images
from digen_jax.rewards import shapes
from digen_jax.sampling import initial_latents, sample_ode, schedule_from_config
from digen_jax.weights.export import save_module
from digen_jax.weights.load import (
  load_autoencoder,
  load_model,
  load_pipeline_config,
)
from digen_jax.weights.text import save_text_encoder


def write_pipeline(
  directory: str | Path, networks: Networks, max_length: int
) -> None:
  """Writes a diffusers FLUX pipeline, float32, that samples `scenes.SIZE`.

  Args:
    directory: receives the components; those there must not exist yet, but
      for the tokenizers.
    networks: what to write.
    max_length: tokens of a prompt, see `write_tokenizers`.
  """
  directory = Path(directory)
  write_tokenizers(directory, scenes.WORDS, max_length)
  save_text_encoder(networks.clip, directory / "text_encoder")
  save_text_encoder(networks.t5, directory / "text_encoder_2")
  transformer = networks.transformer
  save_module(
    directory / "transformer",
    transformer.params,
    config_lib.to_dict(
      transformer.config, class_name=transformer.family.class_name
    ),
  )
  save_module(
    directory / "vae",
    networks.autoencoder.params,
    _autoencoder_json(networks.autoencoder.config),
  )
  scheduler = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
  }
  (directory / "scheduler").mkdir()
  _write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
  _write_json(
    directory / "model_index.json",
    {
      "_class_name": "FluxPipeline",
      "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
      "text_encoder": ["transformers", "CLIPTextModel"],
      "text_encoder_2": ["transformers", "T5EncoderModel"],
      "tokenizer": ["transformers", "CLIPTokenizer"],
      "tokenizer_2": ["transformers", "T5TokenizerFast"],
      "transformer": ["diffusers", "FluxTransformer2DModel"],
      "vae": ["diffusers", "AutoencoderKL"],
    },
  )


def _autoencoder_json(config: AutoencoderKLConfig) -> dict[str, Any]:
  """diffusers also wants the kinds of the blocks, which are always these."""
  levels = len(config.block_out_channels)
  return {
    **config_lib.to_dict(config, class_name="AutoencoderKL"),
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "sample_size": scenes.SIZE,
  }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
  file.write_text(json.dumps(content, indent=2) + "\n")


def sample_pipeline(
  directory: str | Path,
  prompts: Sequence[str],
  *,
  num_steps: int,
  seed: int = 0,
) -> np.ndarray:
  """Samples a pipeline directory, read by the product's own loaders.

  Args:
    directory: as `write_pipeline` writes it.
    prompts: B texts.
    num_steps: Euler steps.
    seed: of the initial noise.

  Returns:
    [B, SIZE, SIZE, 3] float32 images in [0, 1].
  """
  model, autoencoder = load_model(directory), load_autoencoder(directory)
  conditioning = load_prompt_encoder(directory).encode(prompts)
  scheduler = load_pipeline_config(directory).scheduler
  side = scenes.SIZE // autoencoder.config.downscale
  sigmas = schedule_from_config(scheduler, num_steps, seq_len=side**2 // 4)
  shape = (len(prompts), side, side, autoencoder.config.latent_channels)

  @jax.jit
  def sample(params: Any, decoder: Any, conditioning: Any) -> jax.Array:
    noise = initial_latents(jax.random.key(seed), shape)
    latents = sample_ode(model.apply, params, noise, conditioning, sigmas)
    return autoencoder.decode(decoder, latents)

  return np.asarray(sample(model.params, autoencoder.params, conditioning))


def evaluate(
  config: PretrainConfig,
  directory: Path,
  prompts: Sequence[str],
  workdir: Path,
) -> dict[str, float]:
  """Scores a written pipeline on held-out prompts; writes samples.png.

  Returns:
    Mean rewards in [0, 1]: `reward`, its components, and that of 500 drawn
    scenes after the autoencoder, `autoencoder_reward`.
  """
  images = sample_pipeline(directory, prompts, num_steps=config.eval_steps)
  rewards = shapes.score_shapes(images, prompts)
  parts = {
    "presence": shapes.score_presence,
    "colour": shapes.score_colour,
    "count": shapes.score_count,
    "position": shapes.score_position,
  }
  drawn, captions = draw_scenes(config.seed + 1, 500)
  again = reconstruct(load_autoencoder(directory), drawn)
  through = shapes.score_shapes(again, captions)
  labels = [f"{p} {r:.2f}" for p, r in zip(prompts, rewards)]
  grid = media.image_grid(images[:48], 8, labels=labels[:48])
  media.save_image(workdir / "samples.png", grid)
  scores = {name: part(images, prompts) for name, part in parts.items()}
  scores = {"reward": rewards, **scores, "autoencoder_reward": through}
  return {name: float(value.mean()) for name, value in scores.items()}


def reconstruct(autoencoder: vae.Autoencoder, images: np.ndarray) -> np.ndarray:
  """Images [N, H, W, 3] uint8 through the autoencoder: float32 in [0, 1]."""
  latents = encode_images(autoencoder, images)
  return np.asarray(jax.jit(autoencoder.decode)(autoencoder.params, latents))


def write_record(
  workdir: Path,
  config: PretrainConfig,
  scores: Mapping[str, float],
  seconds: Mapping[str, float],
) -> None:
  """Writes pretrain.json: config, scores, seconds per phase, hardware."""
  _write_json(
    workdir / "pretrain.json",
    {
      "scores": scores,
      "seconds": seconds,
      "cpus": len(os.sched_getaffinity(0)),
      "jax": jax.__version__,
      "config": dataclasses.asdict(config)
      | {"eval_prompts": Path(config.eval_prompts).name},
    },
  )


class Clock:
  """Names the phases of a program as they begin, and times them.

  with clock.phase("draw"):
    ...
  clock.seconds  # {"draw": 2.1}
  """

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Prints the name, and keeps how long the block takes."""
    print(name, flush=True)
    start = time.monotonic()
    yield
    self.seconds[name] = round(time.monotonic() - start, 1)

  @property
  def total(self) -> float:
    """Seconds of all phases."""
    return sum(self.seconds.values())
