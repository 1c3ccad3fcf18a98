"""The T5 encoder against transformers' own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from digen_jax.errors import UserError
from digen_jax.models import text
from digen_jax.models.text.t5 import (
  T5Config,
  UMT5Config,
  relative_buckets,
  t5_encode,
)
from digen_jax.weights.text import load_text_encoder, save_text_encoder
from tests.references import jit

# Heads times their size is not the width, as in T5-XXL's smaller siblings.
SIZES = dict(
  vocab_size=53,
  d_model=40,
  d_kv=12,
  d_ff=72,
  num_layers=3,
  num_heads=3,
  relative_attention_num_buckets=16,
  relative_attention_max_distance=24,
)


def reference(umt5=False, **settings):
  """A model whose every parameter is random, norm scales included."""
  if umt5:
    config = transformers.UMT5Config(**(SIZES | settings))
    model = transformers.UMT5EncoderModel(config)
  else:
    config = transformers.T5Config(**(SIZES | settings))
    model = transformers.T5EncoderModel(config)
  generator = torch.Generator().manual_seed(0)
  for name, parameter in model.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim == 1:
      parameter.data = 1 + 0.25 * noise
    elif "relative" in name or "shared" in name:
      parameter.data = noise
    else:
      parameter.data = noise * (0.6 / parameter.shape[-1] ** 0.5)
  return model.eval()


def prompts(length: int) -> tuple[np.ndarray, np.ndarray]:
  """[3, length] ids, ended (1) and padded (0), and which are not padding."""
  ids = np.random.default_rng(1).integers(3, 53, (3, length))
  mask = np.ones((3, length), bool)
  for row, end in enumerate((length - 1, length // 2, length // 3)):
    ids[row, end] = 1
    ids[row, end + 1 :] = 0
    mask[row, end + 1 :] = False
  return ids.astype(np.int32), mask


def output(directory, ids, mask=None):
  encoder = load_text_encoder(directory)
  run = jit(t5_encode, static_argnums=0)
  return np.asarray(run(encoder.graphdef, encoder.params, ids, mask))


def expected(model, ids, mask=None):
  mask = None if mask is None else torch.from_numpy(mask).long()
  with torch.no_grad():
    out = model(torch.from_numpy(ids).long(), attention_mask=mask)
  return out.last_hidden_state.numpy()


@pytest.mark.parametrize(
  ("settings", "length"),
  [
    (dict(feed_forward_proj="gated-gelu"), 61),
    (dict(feed_forward_proj="relu", layer_norm_epsilon=1e-2), 17),
    (dict(feed_forward_proj="gated-gelu", num_layers=1), 1),
    (dict(umt5=True), 61),
    (dict(umt5=True, feed_forward_proj="relu", layer_norm_epsilon=1e-2), 9),
  ],
  ids=["gated", "relu", "one_token", "umt5", "umt5_relu"],
)
def test_parity(tmp_path, settings, length):
  model = reference(**settings)
  model.save_pretrained(tmp_path)
  ids, _ = prompts(length)
  theirs = expected(model, ids)
  np.testing.assert_allclose(output(tmp_path, ids), theirs, atol=1e-5, rtol=0)
  assert np.abs(theirs).max() > 1


@pytest.mark.parametrize("umt5", [False, True])
def test_masked_padding(tmp_path, umt5):
  model = reference(umt5, feed_forward_proj="gated-gelu")
  model.save_pretrained(tmp_path)
  ids, mask = prompts(13)
  ours = output(tmp_path, ids, mask)
  np.testing.assert_allclose(
    ours[mask], expected(model, ids, mask)[mask], atol=1e-5, rtol=0
  )
  # What a padding token is does not matter, unless it is attended to.
  other = np.where(mask, ids, 5).astype(np.int32)
  np.testing.assert_array_equal(output(tmp_path, other, mask)[mask], ours[mask])
  assert np.abs(output(tmp_path, ids)[1:, 0] - ours[1:, 0]).max() > 1e-2


@pytest.mark.parametrize(
  ("length", "buckets", "distance"),
  [(600, 32, 128), (700, 64, 256), (50, 16, 20), (40, 8, 16)],
)
def test_relative_buckets(length, buckets, distance):
  position = torch.arange(length)
  theirs = T5Attention._relative_position_bucket(
    position[None] - position[:, None], True, buckets, distance
  )
  ours = relative_buckets(length, buckets, distance)
  np.testing.assert_array_equal(ours, theirs.numpy())
  assert ours.min() == 0 and ours.max() == buckets - 1


def test_relative_buckets_by_hand():
  # 8 buckets: exact distances 0 and 1, then [2, 4) and from 4 on; keys after
  # the query 4 higher.
  np.testing.assert_array_equal(
    relative_buckets(6, 8, 8)[1], [1, 0, 5, 6, 6, 7]
  )


def rewrite(directory, change):
  file = directory / "model.safetensors"
  tensors = change(safetensors.torch.load_file(file))
  safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def duplicated(tensors):
  table = tensors["shared.weight"].clone()
  return tensors | {"encoder.embed_tokens.weight": table}


def renamed(tensors):
  tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
  return tensors


@pytest.mark.parametrize("umt5", [False, True])
@pytest.mark.parametrize("change", [duplicated, renamed])
def test_tied_embedding_under_either_name(tmp_path, change, umt5):
  model = reference(umt5, feed_forward_proj="gated-gelu")
  model.save_pretrained(tmp_path)
  rewrite(tmp_path, change)
  ids, _ = prompts(7)
  np.testing.assert_allclose(
    output(tmp_path, ids), expected(model, ids), atol=1e-5, rtol=0
  )


def test_bfloat16_checkpoint(tmp_path):
  model = reference(feed_forward_proj="gated-gelu").to(torch.bfloat16)
  model.save_pretrained(tmp_path)
  ids, _ = prompts(7)
  theirs = expected(model.float(), ids)
  np.testing.assert_allclose(output(tmp_path, ids), theirs, atol=1e-5, rtol=0)


def test_bfloat16_compute(tmp_path):
  model = reference(feed_forward_proj="gated-gelu")
  model.save_pretrained(tmp_path)
  encoder = load_text_encoder(tmp_path, dtype=jnp.bfloat16)
  assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(encoder.params))
  # As in transformers: what T5 keeps in float32 it keeps from float16 alone.
  same = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
  assert all(p.dtype == torch.bfloat16 for p in same.parameters())
  ids, _ = prompts(7)
  ours = np.asarray(jit(encoder.encode)(encoder.params, ids))
  theirs = expected(model, ids)
  error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
  assert ours.dtype == np.float32 and 1e-4 < error < 2e-2


@pytest.mark.parametrize(
  ("cls", "feed_forward"),
  [(T5Config, "relu"), (T5Config, "gated-gelu"), (UMT5Config, "gated-gelu")],
)
def test_saved_encoder_loads_in_transformers(tmp_path, cls, feed_forward):
  config = cls(**SIZES, feed_forward_proj=feed_forward, layer_norm_epsilon=1e-4)
  encoder = text.create_text_encoder(config, jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32),
    encoder.params,
  )
  encoder = dataclasses.replace(encoder, params=params)
  save_text_encoder(encoder, tmp_path)
  name = "UMT5" if cls is UMT5Config else "T5"
  theirs = getattr(transformers, f"{name}EncoderModel")
  model, report = theirs.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(report.values()), report
  ids, _ = prompts(7)
  ours = jit(encoder.encode)(params, ids)
  theirs = expected(model.eval(), ids)
  np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
  again = load_text_encoder(tmp_path)
  assert again.config == config
  jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_weights_that_do_not_match(tmp_path):
  reference(feed_forward_proj="gated-gelu").save_pretrained(tmp_path)
  name = "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"
  rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if k != name})
  with pytest.raises(UserError, match=r"block\.1.*wi_1.* \[72, 40\] is miss"):
    load_text_encoder(tmp_path)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(feed_forward_proj="gated-silu"), "'gated-silu' is not supported"),
    (dict(model_type="mt5"), "model_type 'mt5' is not supported"),
  ],
)
def test_unsupported_config(tmp_path, change, message):
  reference().save_pretrained(tmp_path)
  file = tmp_path / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(UserError, match=message):
    load_text_encoder(tmp_path)


def test_every_parameter_names_its_axes():
  encoder = text.abstract_text_encoder(T5Config(**SIZES))
  axes = jax.tree.leaves(
    encoder.logical_axes, is_leaf=lambda x: isinstance(x, tuple)
  )
  for names, leaf in zip(axes, jax.tree.leaves(encoder.params)):
    assert len(names) == leaf.ndim
  blocks = encoder.logical_axes["blocks"]
  assert blocks["ff"]["linear_2"]["kernel"] == ("layers", "mlp", "embed")
