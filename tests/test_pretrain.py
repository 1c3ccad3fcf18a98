import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digen_jax import assets, pretrain, pretrain_files
from digen_jax.data import scenes
from digen_jax.data.captioned import (
  corrupt,
  corrupt_captions,
  draw_scenes,
  tokenize,
)
from digen_jax.data.prompts import read_prompts
from digen_jax.data.tokenizer import write_tokenizers
from digen_jax.errors import UserError
from digen_jax.rewards import shapes
from digen_jax.sampling import initial_latents
from digen_jax.weights.load import load_autoencoder, load_model
from digen_jax.weights.text import load_text_encoder

SETTINGS = pretrain.TrainSettings(steps=2, batch=4, learning_rate=1e-3)
CONFIG = pretrain.PretrainConfig(
  seed=0,
  scenes=8,
  captions=2,
  corruption=0.3,
  max_length=10,
  kl_weight=1e-4,
  autoencoder=dict(
    block_out_channels=(4, 4, 4),
    norm_num_groups=2,
    use_quant_conv=False,
    use_post_quant_conv=False,
  ),
  transformer=dict(
    num_layers=1,
    num_single_layers=1,
    num_attention_heads=1,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
  ),
  clip=dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
  ),
  t5=dict(d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1),
  autoencoder_training=SETTINGS,
  flow_training=SETTINGS,
  cycle=SETTINGS,
  cycles=2,
  detuning=SETTINGS,
  eval_prompts="",
  eval_steps=2,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
  """A pipeline directory with nothing but tokenizers, and their sizes."""
  directory = tmp_path_factory.mktemp("pipeline")
  return directory, write_tokenizers(directory, scenes.WORDS, 10)


@pytest.fixture(scope="module")
def networks(tokenizers):
  return pretrain.create_networks(CONFIG, tokenizers[1])


# Data.


def test_corrupt_replaces_the_share_it_is_given():
  rng = np.random.default_rng(0)
  spec = scenes.parse_caption("two red circles left of a blue square")
  assert corrupt(rng, spec, 0.0) == spec
  kept = np.zeros(4)
  for _ in range(2000):
    wrong = corrupt(rng, spec, 0.4)
    first = wrong.groups[0]
    kept += [
      first.count == 2,
      first.colour == "red",
      first.shape == "circle",
      wrong.relation == "left of",
    ]
    assert not scenes.held_out(scenes.caption(wrong))
  # Replacements are drawn among 4, 5, 3 and 4, the right one included.
  expected = 0.6 + 0.4 / np.array([4, 5, 3, 4])
  np.testing.assert_allclose(kept / 2000, expected, atol=0.04)


def test_drawn_scenes_match_their_captions_unless_corrupted():
  images, captions = draw_scenes(3, 60)
  assert images.shape == (60, 32, 32, 3)
  assert images.dtype == np.uint8
  np.testing.assert_array_equal(shapes.score_shapes(images / 255, captions), 1)
  again, _ = draw_scenes(3, 60)
  np.testing.assert_array_equal(again, images)
  pairs = corrupt_captions(3, captions, 1.0, variants=2)
  wrong = [c for c, _ in pairs]
  assert shapes.score_shapes(images / 255, wrong).mean() < 0.4
  assert sum(a == b for a, b in pairs) < 10
  assert corrupt_captions(3, captions, 0.0, variants=1) == [
    [c] for c in captions
  ]


def test_tokenize_one_token_per_word(tokenizers):
  directory, info = tokenizers
  captions = [["a red circle", "two red circles"], ["a red circle"] * 2]
  clip_ids, t5_ids = tokenize(directory, captions, 10)
  assert clip_ids.shape == t5_ids.shape == (2, 2, 10)
  assert clip_ids.dtype == t5_ids.dtype == np.int32
  assert clip_ids[0, 0, 0] == info.clip_bos_id
  np.testing.assert_array_equal(clip_ids[0, 0, 4:], info.clip_eos_id)
  np.testing.assert_array_equal(t5_ids[0, 0, 3:], [1] + [0] * 6)
  np.testing.assert_array_equal(t5_ids[0, 0], t5_ids[1, 1])
  same_word = t5_ids[0, 0, :3] == t5_ids[0, 1, :3]
  np.testing.assert_array_equal(same_word, [False, True, False])


# Training.


def test_train_minimises_and_averages():
  data = {"x": np.linspace(-1, 1, 64, dtype=np.float32)}
  params = {"w": jnp.zeros(())}

  def loss(params, rows, key):
    noise = 0.1 * jax.random.normal(key, rows["x"].shape)
    return jnp.mean(jnp.square(params["w"] * rows["x"] - 3 * rows["x"] + noise))

  settings = pretrain.TrainSettings(
    steps=120, batch=16, learning_rate=0.2, warmup=5, ema=0.9, report_every=50
  )
  reports = []
  result = pretrain.train(
    loss, params, data, settings, seed=1, report=reports.append
  )
  assert float(result["w"]) == pytest.approx(3.0, abs=0.1)
  assert float(params["w"]) == 0  # the caller's arrays stay usable
  assert [r.step for r in reports] == [50, 100, 120]
  assert reports[-1].loss < reports[0].loss / 10
  assert reports[-1].seconds_left == 0
  again = pretrain.train(
    loss, params, data, settings, seed=1, report=lambda _: None
  )
  assert float(again["w"]) == float(result["w"])


def test_flow_loss_of_an_untrained_model_is_the_velocity_itself(networks):
  latents = np.full((64, 8, 8, 4), 2.0, np.float32)
  ids = np.zeros((64, 3, 10), np.int32)
  value = jax.jit(pretrain.flow_loss(networks))(
    pretrain.flow_params(networks), (latents, ids, ids), jax.random.key(0)
  )
  # A fresh model predicts 0: E (noise - 2)^2 = 1 + 4.
  assert float(value) == pytest.approx(5.0, abs=0.05)


def test_autoencoder_loss_counts_both_errors_and_the_kl(networks):
  autoencoder = networks.autoencoder
  # With all weights 0 mean, log-variance and output are 0.
  zeros = jax.tree.map(jnp.zeros_like, autoencoder.params)
  images = np.full((2, 32, 32, 3), 255, np.uint8)
  loss = jax.jit(pretrain.autoencoder_loss(autoencoder, 0.5))
  # (0 - 1)^2 four times, |0 - 1| once, and no divergence.
  assert float(loss(zeros, images, jax.random.key(0))) == pytest.approx(5.0)
  # Mean 2 everywhere: a divergence of 2 per element.
  zeros["encoder"]["conv_out"]["bias"] = jnp.array([2.0] * 4 + [0.0] * 4)
  assert float(loss(zeros, images, jax.random.key(0))) == pytest.approx(6.0)


def test_latents_are_normalised(networks):
  images, _ = draw_scenes(0, 30)
  params = networks.autoencoder.params
  networks = pretrain.with_autoencoder_params(networks, params, images)
  latents = pretrain.encode_images(networks.autoencoder, images, batch=7)
  assert latents.shape == (30, 8, 8, 4)
  assert latents.mean() == pytest.approx(0, abs=1e-4)
  assert latents.std() == pytest.approx(1, abs=1e-4)


def test_config_errors_are_named():
  values = dataclasses.asdict(CONFIG)
  assert pretrain.PretrainConfig.from_dict(values) == CONFIG
  del values["scenes"]
  with pytest.raises(UserError, match="scenes"):
    pretrain.PretrainConfig.from_dict(values)
  values = dataclasses.asdict(CONFIG)
  values["flow_training"]["stepz"] = 3
  with pytest.raises(UserError, match="stepz"):
    pretrain.PretrainConfig.from_dict(values)


# The embedded checkpoint.


def test_prompt_files_are_the_split():
  captions = scenes.all_captions()
  kept = {text for text in captions if scenes.held_out(text)}
  training = read_prompts(assets.path("prompts_train.txt"))
  assert sorted(training) == sorted(set(captions) - kept)
  prompts = read_prompts(assets.path("prompts_heldout.txt"))
  assert len(prompts) == len(set(prompts)) == 384
  assert set(prompts) <= kept


def test_embedded_checkpoint_scores_what_its_record_says():
  directory = Path(assets.path("tiny_flux"))
  size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
  assert size <= 8e6
  images, captions = draw_scenes(11, 100)
  again = pretrain_files.reconstruct(load_autoencoder(directory), images)
  assert shapes.score_shapes(again, captions).mean() > 0.98
  prompts = read_prompts(assets.path("prompts_heldout.txt"))
  pictures = pretrain_files.sample_pipeline(directory, prompts, num_steps=10)
  assert 0.3 < shapes.score_shapes(pictures, prompts).mean() < 0.45
  # Recognisable: nearly all that is drawn is of a clear shape and colour.
  found = [o for each in shapes.find_objects(pictures) for o in each]
  clear = [o.shape is not None and o.colour is not None for o in found]
  assert np.mean(clear) > 0.9
  assert 1.5 < len(found) / len(prompts) < 3.5


def test_diffusers_samples_the_embedded_checkpoint_alike():
  import diffusers
  import torch

  directory = assets.path("tiny_flux")
  pipe = diffusers.FluxPipeline.from_pretrained(directory)
  pipe.set_progress_bar_config(disable=True)
  prompts = ["two red circles left of a blue square", "A green triangle"]
  noise = np.asarray(initial_latents(jax.random.key(0), (2, 8, 8, 4)))
  packed = pipe._pack_latents(
    torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), 2, 4, 8, 8
  )
  theirs = pipe(
    prompts,
    height=32,
    width=32,
    num_inference_steps=4,
    guidance_scale=0.0,
    max_sequence_length=10,
    latents=packed,
    output_type="np",
  ).images
  ours = pretrain_files.sample_pipeline(directory, prompts, num_steps=4, seed=0)
  np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_written_pipeline_reads_back(tokenizers, networks):
  directory, _ = tokenizers
  pretrain_files.write_pipeline(directory, networks, 10)
  index = json.loads((directory / "model_index.json").read_text())
  assert index["_class_name"] == "FluxPipeline"
  for ours, read in (
    (networks.transformer, load_model(directory)),
    (networks.autoencoder, load_autoencoder(directory)),
    (networks.clip, load_text_encoder(directory / "text_encoder")),
    (networks.t5, load_text_encoder(directory / "text_encoder_2")),
  ):
    assert read.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, read.params, ours.params)
