"""Prompts to conditioning, against diffusers' FLUX pipeline."""

import json
import shutil
import subprocess
import sys

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from digen_jax.data import embeddings
from digen_jax.data.embeddings import cached_embeddings, load_prompt_encoder
from digen_jax.data.tokenizer import write_tokenizers
from digen_jax.errors import UserError

WORDS = (
  *("a", "two", "three", "red", "blue", "green", "left", "of", "and"),
  *("circle", "circles", "square", "squares"),
)
LENGTH = 16
PROMPTS = [
  "two red circles left of a blue square",
  "",
  "A zebra, 3 m tall!",
  "red " * 20,
  "green squares",
]


def randomise(model: torch.nn.Module) -> torch.nn.Module:
  generator = torch.Generator().manual_seed(0)
  for name, parameter in model.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
      parameter.data = 1 + 0.25 * noise
    else:
      scale = 0.15 if parameter.ndim == 1 else 0.6 / parameter.shape[-1] ** 0.5
      parameter.data = scale * noise
  return model.eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  """A directory with every component of a FLUX pipeline, tiny and random."""
  directory = tmp_path_factory.mktemp("pipeline")
  info = write_tokenizers(directory, WORDS, LENGTH)
  clip = transformers.CLIPTextConfig(
    vocab_size=info.clip_vocab_size,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=LENGTH,
    bos_token_id=info.clip_bos_id,
    eos_token_id=info.clip_eos_id,
    pad_token_id=info.clip_eos_id,
  )
  t5 = transformers.T5Config(
    vocab_size=info.t5_vocab_size,
    d_model=32,
    d_kv=8,
    d_ff=40,
    num_layers=2,
    num_heads=3,
    feed_forward_proj="gated-gelu",
  )
  modules = {
    "text_encoder": transformers.CLIPTextModel(clip),
    "text_encoder_2": transformers.T5EncoderModel(t5),
    "transformer": diffusers.FluxTransformer2DModel(
      in_channels=4,
      num_layers=1,
      num_single_layers=1,
      attention_head_dim=8,
      num_attention_heads=2,
      joint_attention_dim=32,
      pooled_projection_dim=24,
      axes_dims_rope=(2, 2, 4),
    ),
    "vae": diffusers.AutoencoderKL(
      block_out_channels=(4,), norm_num_groups=2, latent_channels=1
    ),
  }
  for name, module in modules.items():
    randomise(module).save_pretrained(directory / name)
  diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(
    directory / "scheduler"
  )
  index = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }
  (directory / "model_index.json").write_text(json.dumps(index))
  return directory


@pytest.fixture(scope="module")
def encoder(pipeline):
  return load_prompt_encoder(pipeline, batch_size=2)


@pytest.fixture(scope="module")
def reference(pipeline):
  """text [B, T, D] and pooled [B, P] of diffusers' own pipeline."""
  pipe = diffusers.FluxPipeline.from_pretrained(pipeline)
  with torch.no_grad():
    text, pooled, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=LENGTH)
  return text.numpy(), pooled.numpy()


def test_parity_with_the_flux_pipeline(encoder, reference):
  text, pooled = reference
  ours = encoder.encode(PROMPTS)
  assert ours.text.shape == (len(PROMPTS), LENGTH, 32)
  np.testing.assert_allclose(ours.text, text, atol=1e-5, rtol=0)
  np.testing.assert_allclose(ours.pooled, pooled, atol=1e-5, rtol=0)
  assert np.abs(text).max() > 1 and np.abs(pooled).max() > 1


def test_a_prompt_does_not_depend_on_its_neighbours(encoder):
  together = encoder.encode(PROMPTS)
  alone = encoder.encode(PROMPTS[2:3])
  np.testing.assert_allclose(alone.text[0], together.text[2], atol=1e-5)
  np.testing.assert_allclose(alone.pooled[0], together.pooled[2], atol=1e-5)


def test_token_ids(encoder):
  clip_ids, t5_ids = encoder.tokenize(PROMPTS)
  assert clip_ids.shape == t5_ids.shape == (len(PROMPTS), LENGTH)
  assert clip_ids.dtype == t5_ids.dtype == np.int32
  # Eight words, each one token; CLIP frames and pads with its end token.
  end = clip_ids.max()
  np.testing.assert_array_equal((clip_ids[0] == end).nonzero()[0], range(9, 16))
  assert len(set(clip_ids[0, :9])) == 9
  np.testing.assert_array_equal(t5_ids[0, 8:], [1] + [0] * 7)
  assert len(set(t5_ids[0, :8])) == 8
  assert (clip_ids[3, -1], t5_ids[3, -1]) == (end, 1)


def test_cut_prompts_are_reported(encoder, caplog):
  encoder.tokenize(PROMPTS)
  assert len(caplog.records) == 2
  assert "1 of 5 prompts are longer than 16" in caplog.messages[0]


def test_lengths(pipeline, tmp_path):
  assert load_prompt_encoder(pipeline, max_length=7).t5_length == 7
  directory = shutil.copytree(pipeline, tmp_path / "pipeline")
  for name in ("tokenizer", "tokenizer_2"):
    file = directory / name / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"model_max_length": 1024}
    file.write_text(json.dumps(settings))
  long = load_prompt_encoder(directory)
  assert (long.clip_length, long.t5_length) == (LENGTH, 512)


def test_bfloat16(pipeline, reference, tmp_path):
  encoder = load_prompt_encoder(pipeline, dtype=jnp.bfloat16)
  ours = cached_embeddings(encoder, PROMPTS, tmp_path / "e.npz")
  again = cached_embeddings(encoder, PROMPTS, tmp_path / "e.npz")
  for mine, cached, theirs in zip(
    (ours.text, ours.pooled), (again.text, again.pooled), reference
  ):
    assert mine.dtype == cached.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mine, cached)
    error = np.linalg.norm(mine.astype(np.float32) - theirs)
    assert 1e-4 < error / np.linalg.norm(theirs) < 2e-2


def counted(encoder, monkeypatch):
  """Lengths of the batches that `encode` is called with from now on."""
  calls, encode = [], embeddings.PromptEncoder.encode

  def count(self, prompts):
    calls.append(len(prompts))
    return encode(self, prompts)

  monkeypatch.setattr(embeddings.PromptEncoder, "encode", count)
  return calls


def test_cache(pipeline, encoder, tmp_path, monkeypatch):
  calls = counted(encoder, monkeypatch)
  path = tmp_path / "deep" / "e.npz"
  first = cached_embeddings(encoder, PROMPTS, path)
  # A fresh encoder reads no weights for what is cached.
  fresh = load_prompt_encoder(pipeline)
  second = cached_embeddings(fresh, PROMPTS, path)
  assert calls == [5] and "encoders" not in vars(fresh)
  np.testing.assert_array_equal(first.text, second.text)
  np.testing.assert_array_equal(first.pooled, second.pooled)
  third = cached_embeddings(encoder, PROMPTS[::-1], path)
  assert calls == [5, 5]
  np.testing.assert_allclose(third.text[::-1], first.text, atol=1e-5)
  shorter = load_prompt_encoder(pipeline, max_length=9)
  assert cached_embeddings(shorter, PROMPTS, path).text.shape[1] == 9
  assert [file.name for file in path.parent.iterdir()] == ["e.npz"]


@pytest.mark.parametrize(
  "damage",
  [
    lambda content: content[: len(content) // 2],
    lambda content: b"",
    lambda content: b"no archive",
    # Flips a byte in the middle of the first array's data.
    lambda c: c[:900] + bytes([c[900] ^ 255]) + c[901:],
  ],
  ids=["truncated", "empty", "text", "flipped"],
)
def test_damaged_cache(encoder, tmp_path, damage, monkeypatch, caplog):
  path = tmp_path / "e.npz"
  prompts = PROMPTS[:1]
  first = cached_embeddings(encoder, prompts, path)
  intact = path.read_bytes()
  path.write_bytes(damage(intact))
  calls = counted(encoder, monkeypatch)
  second = cached_embeddings(encoder, prompts, path)
  assert calls == [1] and "damaged" in caplog.text
  np.testing.assert_array_equal(first.text, second.text)
  assert path.read_bytes() == intact


def test_new_weights_are_another_fingerprint(pipeline, encoder, tmp_path):
  directory = shutil.copytree(pipeline, tmp_path / "pipeline")
  assert load_prompt_encoder(directory).fingerprint == encoder.fingerprint
  file = directory / "text_encoder_2" / "model.safetensors"
  content = file.read_bytes()
  file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  assert load_prompt_encoder(directory).fingerprint != encoder.fingerprint


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import numpy as np
from digen_jax.data.embeddings import load_prompt_encoder
out = load_prompt_encoder(sys.argv[1]).encode(sys.argv[3:])
np.savez(sys.argv[2], text=out.text, pooled=out.pooled)
assert not [m for m in sys.modules if m.startswith("torch.")]
"""


def test_without_torch(pipeline, encoder, tmp_path):
  file = tmp_path / "out.npz"
  done = subprocess.run(
    [sys.executable, "-c", WITHOUT_TORCH, pipeline, file, *PROMPTS],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "PyTorch" not in done.stderr
  ours = encoder.encode(PROMPTS)
  with np.load(file) as out:
    np.testing.assert_allclose(out["text"], ours.text, atol=1e-5)
    np.testing.assert_allclose(out["pooled"], ours.pooled, atol=1e-5)


def remove(name):
  def damage(directory):
    path = directory / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()

  return damage


def other_encoder(directory):
  file = directory / "model_index.json"
  index = json.loads(file.read_text())
  index["text_encoder_2"] = ["transformers", "Qwen2_5_VLModel"]
  file.write_text(json.dumps(index))


def broken_tokenizer(directory):
  (directory / "tokenizer_2" / "tokenizer.json").write_text("{")


def small_table(directory):
  file = directory / "text_encoder" / "config.json"
  config = json.loads(file.read_text()) | {"vocab_size": 99}
  file.write_text(json.dumps(config))


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (remove("model_index.json"), "model_index.json does not exist"),
    (remove("text_encoder/config.json"), "config.json does not exist"),
    (remove("tokenizer"), "tokenizer directory .* does not exist"),
    (remove("tokenizer/vocab.json"), "cannot read the CLIPTokenizer"),
    (remove("text_encoder/model.safetensors"), "no diffusion_pytorch_model"),
    (other_encoder, "text_encoder_2 is 'Qwen2_5_VLModel', only FLUX's T5"),
    (broken_tokenizer, "cannot read the T5TokenizerFast in"),
    (small_table, "ids up to .* only 99 rows"),
  ],
)
def test_incomplete_pipeline(pipeline, tmp_path, damage, message):
  directory = shutil.copytree(pipeline, tmp_path / "pipeline")
  damage(directory)
  with pytest.raises(UserError, match=message) as error:
    load_prompt_encoder(directory).encode(["red"])
  assert "\n" not in str(error.value)


def test_no_prompts(encoder):
  with pytest.raises(UserError, match="no prompts to encode"):
    encoder.encode([])
