"""Language models as text encoders, against transformers' own."""

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
from digen_jax.models.text.decoder import DecoderConfig
from digen_jax.parallel.mesh import make_mesh
from digen_jax.weights.text import load_text_encoder, save_text_encoder
from tests.references import jit, randomise

SIZES = dict(
  vocab_size=61,
  hidden_size=48,
  intermediate_size=56,
  num_hidden_layers=4,
  num_attention_heads=6,
  num_key_value_heads=2,
)
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=500.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)


def llama(**settings):
  config = transformers.LlamaConfig(**(SIZES | settings))
  return randomise(transformers.LlamaModel(config), 0)


def qwen(**settings):
  language = SIZES | dict(
    rms_norm_eps=1e-6,
    rope_parameters=dict(
      rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]
    ),
  )
  vision = dict(
    depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=2
  )
  config = transformers.Qwen2_5_VLConfig(
    text_config=language | settings,
    vision_config=vision | dict(out_hidden_size=48),
    image_token_id=58,
    video_token_id=59,
    vision_start_token_id=57,
    vision_end_token_id=56,
  )
  return randomise(transformers.Qwen2_5_VLForConditionalGeneration(config), 1)


def prompts(length, side="right"):
  """[3, length] ids and mask, padded on one side."""
  ids = np.random.default_rng(1).integers(3, 56, (3, length)).astype(np.int32)
  mask = np.ones((3, length), bool)
  for row, valid in enumerate((length, length // 2 + 1, length // 3 + 1)):
    mask[row, valid:] = False
  if side == "left":
    mask = mask[:, ::-1].copy()
  return np.where(mask, ids, 0).astype(np.int32), mask


def expected(model, ids, mask, layer=-1):
  with torch.no_grad():
    out = model(
      input_ids=torch.from_numpy(ids).long(),
      attention_mask=torch.from_numpy(mask).long(),
      output_hidden_states=True,
    )
  return out.hidden_states[layer].float().numpy()


def output(directory, ids, mask, **settings):
  encoder = load_text_encoder(directory, **settings)
  return np.asarray(jit(encoder.encode)(encoder.params, ids, mask))


@pytest.mark.parametrize(
  ("make", "settings", "length", "side"),
  [
    (llama, dict(), 13, "right"),
    (llama, dict(rope_parameters=LLAMA3, head_dim=16), 57, "right"),
    (llama, dict(num_key_value_heads=6, rms_norm_eps=1e-2), 1, "right"),
    (qwen, dict(), 17, "right"),
    (qwen, dict(rms_norm_eps=1e-2), 9, "left"),
  ],
  ids=["llama", "llama3_rope", "one_token", "qwen", "qwen_left"],
)
def test_parity(tmp_path, make, settings, length, side):
  model = make(**settings)
  model.save_pretrained(tmp_path)
  ids, mask = prompts(length, side)
  theirs = expected(model, ids, mask)
  ours = output(tmp_path, ids, mask)
  # On the left, states of padding are nobody's.
  rows = mask if side == "left" else np.ones_like(mask)
  np.testing.assert_allclose(ours[rows], theirs[rows], atol=2e-5, rtol=0)
  assert np.abs(theirs[mask]).max() > 1


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_states_between_blocks(tmp_path, skip):
  """What is left out need not be there."""
  model = llama()
  model.save_pretrained(tmp_path)
  ids, mask = prompts(7)
  theirs = expected(model, ids, mask, -(skip + 1))
  ours = output(tmp_path, ids, mask, skip_layers=skip)
  np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
  drop = "layers.3.", "norm.weight"
  rewrite(tmp_path, lambda name: not name.startswith(drop) and name)
  again = output(tmp_path, ids, mask, skip_layers=skip)
  np.testing.assert_array_equal(ours, again)
  with pytest.raises(UserError, match=r"layers\.3\..* is missing"):
    load_text_encoder(tmp_path)


def rewrite(directory, rename):
  """Renames the tensors of a file; drops those that get no name."""
  file = directory / "model.safetensors"
  tensors = safetensors.torch.load_file(file)
  renamed = {rename(name): tensor for name, tensor in tensors.items()}
  renamed.pop(False, None)
  safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})


def older(name):
  """Names as of transformers 4.49."""
  return name.replace("model.language_model.", "model.").replace(
    "model.visual.", "visual."
  )


def newer(name):
  """Names as of transformers 4.52 and later, in memory."""
  if name.startswith("visual."):
    return f"model.{name}"
  if name.startswith("model.") and "language_model" not in name:
    return name.replace("model.", "model.language_model.", 1)
  return name


@pytest.mark.parametrize("rename", [older, newer])
def test_qwen_under_the_names_of_every_generation(tmp_path, rename):
  model = qwen()
  model.save_pretrained(tmp_path)
  rewrite(tmp_path, rename)
  file = tmp_path / "config.json"
  config = json.loads(file.read_text())
  if rename is older:
    # The language model's sizes lay beside the vision model's record.
    language = config.pop("text_config")
    language.pop("rope_parameters", None)
    config = language | config | dict(rope_theta=1e4)
    config["rope_scaling"] = dict(type="mrope", mrope_section=[1, 1, 2])
  file.write_text(json.dumps(config))
  ids, mask = prompts(9)
  np.testing.assert_allclose(
    output(tmp_path, ids, mask),
    expected(model, ids, mask),
    atol=2e-5,
    rtol=0,
  )


def test_causal_language_model_checkpoint(tmp_path):
  config = transformers.LlamaConfig(**SIZES)
  model = randomise(transformers.LlamaForCausalLM(config), 2)
  model.save_pretrained(tmp_path, max_shard_size="20KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  ids, mask = prompts(5)
  np.testing.assert_allclose(
    output(tmp_path, ids, mask),
    expected(model, ids, mask),
    atol=2e-5,
    rtol=0,
  )


def test_bfloat16_checkpoint_and_compute(tmp_path):
  model = qwen().to(torch.bfloat16)
  model.save_pretrained(tmp_path)
  ids, mask = prompts(9)
  # Read again: the conversion rounded the rotary frequencies too.
  model = type(model).from_pretrained(tmp_path, dtype=torch.float32)
  theirs = expected(model.eval(), ids, mask)[mask]
  exact = output(tmp_path, ids, mask)[mask]
  np.testing.assert_allclose(exact, theirs, atol=2e-5, rtol=0)
  rounded = output(tmp_path, ids, mask, dtype=jnp.bfloat16)[mask]
  error = np.linalg.norm(rounded - theirs) / np.linalg.norm(theirs)
  assert 1e-4 < error < 2e-2


def test_on_a_mesh(tmp_path):
  llama().save_pretrained(tmp_path)
  ids, mask = prompts(7)
  mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
  encoder = load_text_encoder(tmp_path, mesh=mesh)
  kernel = encoder.params["blocks"]["to_q"]["kernel"]
  assert kernel.sharding.spec == jax.P(None, None, "tensor")
  ours = jit(encoder.encode)(encoder.params, ids, mask)
  np.testing.assert_allclose(ours, output(tmp_path, ids, mask), atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(hidden_act="gelu"), "hidden_act='gelu' is not"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(rope_parameters=dict(rope_type="yarn")), "type 'yarn'"),
    (dict(rope_parameters=dict(rope_type="llama3")), "lacks factor, low"),
    (dict(num_key_value_heads=4), "6 heads of 8 and 4 key-value heads"),
  ],
)
def test_unsupported_config(tmp_path, change, message):
  file = tmp_path / "config.json"
  file.write_text(json.dumps(SIZES | dict(model_type="llama") | change))
  with pytest.raises(UserError, match=message):
    load_text_encoder(tmp_path)


def test_cannot_leave_out_every_block(tmp_path):
  (tmp_path / "config.json").write_text(
    json.dumps(SIZES | dict(model_type="llama"))
  )
  with pytest.raises(UserError, match="4 blocks: cannot leave out the last 4"):
    load_text_encoder(tmp_path, skip_layers=4)


def test_every_parameter_names_its_axes(tmp_path):
  encoder = text.abstract_text_encoder(DecoderConfig(**SIZES, qkv_bias=True))
  axes = jax.tree.leaves(
    encoder.logical_axes, is_leaf=lambda x: isinstance(x, tuple)
  )
  for names, leaf in zip(axes, jax.tree.leaves(encoder.params)):
    assert len(names) == leaf.ndim
  assert encoder.logical_axes["blocks"]["to_v"]["bias"] == ("layers", "heads")
  with pytest.raises(UserError, match="cannot write a language model"):
    save_text_encoder(encoder, tmp_path)
