"""The CLIP text encoder against transformers' own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from digen_jax.errors import UserError
from digen_jax.models import text
from digen_jax.models.text.clip import ClipTextConfig, clip_encode
from digen_jax.weights.text import load_text_encoder, save_text_encoder
from tests.references import jit

EOS = 7
SIZES = dict(
  vocab_size=53,
  hidden_size=48,
  intermediate_size=72,
  num_hidden_layers=3,
  num_attention_heads=3,
  max_position_embeddings=19,
)


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Fresh values for every parameter, norm scales and biases included."""
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
      value = 1 + 0.25 * noise
    elif parameter.ndim == 1:
      value = 0.15 * noise
    else:
      value = noise * (0.6 / parameter.shape[-1] ** 0.5)
    parameter.data = value
  return model.eval()


def reference(seed: int = 0, **settings) -> transformers.CLIPTextModel:
  ids = dict(bos_token_id=1, pad_token_id=1, eos_token_id=EOS)
  config = transformers.CLIPTextConfig(**(SIZES | ids | settings))
  return randomise(transformers.CLIPTextModel(config), seed)


def prompts(length: int, seed: int = 1) -> np.ndarray:
  """[3, length] ids, ended at different places and padded with the end."""
  ids = np.random.default_rng(seed).integers(10, 53, (3, length))
  for row, end in enumerate((length - 1, length // 2, length // 3)):
    ids[row, end:] = EOS
  return ids.astype(np.int32)


def outputs(directory, ids):
  encoder = load_text_encoder(directory)
  run = jit(clip_encode, static_argnums=0)
  states = run(encoder.graphdef, encoder.params, ids)
  return map(np.asarray, (states.last, states.pooled))


def expected(model, ids):
  with torch.no_grad():
    out = model(torch.from_numpy(ids).long())
  return out.last_hidden_state.numpy(), out.pooler_output.numpy()


@pytest.mark.parametrize(
  ("settings", "length"),
  [
    (dict(), 19),
    (dict(num_hidden_layers=1), 1),
    (dict(hidden_act="gelu", layer_norm_eps=1e-3), 7),
    (dict(eos_token_id=2), 13),
  ],
  ids=["quick_gelu", "one_token", "gelu", "legacy_eos"],
)
def test_parity(tmp_path, settings, length):
  model = reference(**settings)
  model.save_pretrained(tmp_path)
  ids = prompts(length)
  for ours, theirs in zip(outputs(tmp_path, ids), expected(model, ids)):
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    assert np.abs(theirs).max() > 1


@pytest.mark.parametrize("settings", [dict(), dict(num_hidden_layers=1)])
def test_projection_and_penultimate_states(tmp_path, settings):
  ids = dict(bos_token_id=1, pad_token_id=1, eos_token_id=2)
  config = transformers.CLIPTextConfig(
    **(SIZES | ids | dict(hidden_act="gelu", projection_dim=20) | settings)
  )
  model = randomise(transformers.CLIPTextModelWithProjection(config), 3)
  # As published: in half precision.
  model.half().save_pretrained(tmp_path)
  ids = prompts(11)
  with torch.no_grad():
    theirs = model.float()(
      torch.from_numpy(ids).long(), output_hidden_states=True
    )
  encoder = load_text_encoder(tmp_path)
  ours = jit(encoder.encode)(encoder.params, ids)
  for mine, other in (
    (ours.last, theirs.last_hidden_state),
    (ours.penultimate, theirs.hidden_states[-2]),
    (ours.pooled, theirs.text_embeds),
  ):
    np.testing.assert_allclose(mine, other.numpy(), atol=1e-5, rtol=0)
    assert np.abs(mine).max() > 0.3
  save_text_encoder(encoder, tmp_path / "again")
  again = load_text_encoder(tmp_path / "again")
  assert again.config == encoder.config
  jax.tree.map(np.testing.assert_array_equal, again.params, encoder.params)


def test_pooled_is_the_state_at_the_end_token(tmp_path):
  ids = prompts(19)
  reference().save_pretrained(tmp_path / "new")
  hidden, pooled = outputs(tmp_path / "new", ids)
  np.testing.assert_array_equal(pooled, hidden[[0, 1, 2], [18, 9, 6]])
  reference(eos_token_id=2).save_pretrained(tmp_path / "legacy")
  hidden, pooled = outputs(tmp_path / "legacy", ids)
  np.testing.assert_array_equal(pooled, hidden[[0, 1, 2], ids.argmax(1)])


def test_states_do_not_see_later_tokens(tmp_path):
  reference().save_pretrained(tmp_path)
  ids = prompts(9)
  changed = ids.copy()
  changed[:, 5] = 11
  before, after = (next(outputs(tmp_path, i)) for i in (ids, changed))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert np.abs(before[:, 5:] - after[:, 5:]).min(axis=(0, 2)).all()


def rewrite(directory, change):
  file = directory / "model.safetensors"
  tensors = change(safetensors.torch.load_file(file))
  safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_names_of_both_transformers_generations(tmp_path, prefix):
  model = reference()
  model.save_pretrained(tmp_path)
  positions = {"embeddings.position_ids": torch.arange(19)[None]}
  rewrite(
    tmp_path,
    lambda tensors: {
      prefix + name.removeprefix("text_model."): tensor
      for name, tensor in (tensors | positions).items()
    },
  )
  ids = prompts(7)
  for ours, theirs in zip(outputs(tmp_path, ids), expected(model, ids)):
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_bfloat16_checkpoint(tmp_path):
  model = reference().to(torch.bfloat16)
  model.save_pretrained(tmp_path)
  ids = prompts(7)
  theirs = expected(model.float(), ids)
  for ours, other in zip(outputs(tmp_path, ids), theirs):
    np.testing.assert_allclose(ours, other, atol=1e-5, rtol=0)


def test_bfloat16_compute(tmp_path):
  model = reference()
  model.save_pretrained(tmp_path)
  encoder = load_text_encoder(tmp_path, dtype=jnp.bfloat16)
  assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(encoder.params))
  ids = prompts(7)
  ours = np.asarray(jit(encoder.encode)(encoder.params, ids)[0])
  theirs = expected(model, ids)[0]
  error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
  assert ours.dtype == np.float32 and 1e-4 < error < 2e-2


def test_saved_encoder_loads_in_transformers(tmp_path):
  config = ClipTextConfig(
    **SIZES, hidden_act="gelu", layer_norm_eps=1e-4, eos_token_id=EOS
  )
  encoder = text.create_text_encoder(config, jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32),
    encoder.params,
  )
  encoder = dataclasses.replace(encoder, params=params)
  save_text_encoder(encoder, tmp_path)
  model, report = transformers.CLIPTextModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(report.values()), report
  ids = prompts(7)
  theirs = expected(model.eval(), ids)
  states = jit(encoder.encode)(params, ids)
  for ours, other in zip((states.last, states.pooled), theirs):
    np.testing.assert_allclose(ours, other, atol=1e-5, rtol=0)
  again = load_text_encoder(tmp_path)
  assert again.config == config
  jax.tree.map(np.testing.assert_array_equal, again.params, params)


def drop(tensors):
  del tensors["encoder.layers.1.mlp.fc2.bias"]
  return tensors


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (drop, r"encoder\.layers\.1\.mlp\.fc2\.bias' \[48\] is missing"),
    (lambda t: t | {"extra": torch.zeros(2)}, r"'extra' \[2\] .* not part"),
    (
      lambda t: t | {"final_layer_norm.bias": torch.zeros(3)},
      r"final_layer_norm\.bias' .* is \[3\], config.json wants \[48\]",
    ),
  ],
)
def test_weights_that_do_not_match(tmp_path, change, message):
  reference().save_pretrained(tmp_path)
  rewrite(tmp_path, change)
  with pytest.raises(UserError, match=message):
    load_text_encoder(tmp_path)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(hidden_act="relu"), "hidden_act 'relu' is not supported"),
    (dict(model_type="bert"), "model_type 'bert' is not supported"),
    (dict(num_attention_heads=5), "48 must be a multiple of .* 5"),
    (dict(eos_token_id=[1, 2]), r"eos_token_id \[1, 2\] must be one integer"),
  ],
)
def test_unsupported_config(tmp_path, change, message):
  reference().save_pretrained(tmp_path)
  file = tmp_path / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(UserError, match=message):
    load_text_encoder(tmp_path)


def test_too_many_tokens():
  encoder = text.abstract_text_encoder(ClipTextConfig(**SIZES))
  with pytest.raises(UserError, match="20 tokens but has 19 positions"):
    jax.eval_shape(encoder.encode, encoder.params, prompts(20))


def test_every_parameter_names_its_axes():
  encoder = text.abstract_text_encoder(ClipTextConfig(**SIZES))
  axes = jax.tree.leaves(
    encoder.logical_axes, is_leaf=lambda x: isinstance(x, tuple)
  )
  for names, leaf in zip(axes, jax.tree.leaves(encoder.params)):
    assert len(names) == leaf.ndim
  blocks = encoder.logical_axes["blocks"]
  assert blocks["to_q"]["kernel"] == ("layers", "embed", "heads")
