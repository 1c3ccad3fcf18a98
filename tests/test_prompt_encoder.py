"""Prompts to conditioning, against `encode_prompt` of diffusers' pipelines."""

import json
import shutil
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch

from digen_jax.data.prompt_encoder import load_prompt_encoder
from digen_jax.data.prompt_recipes import clean, has_ftfy
from digen_jax.errors import UserError
from digen_jax.parallel.mesh import make_mesh
from tests.references import SD3
from tests.text_pipelines import FAMILIES, LENGTH, PROMPTS

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def references(tmp_path_factory):
  return {
    name: build(tmp_path_factory.mktemp(name))
    for name, build in FAMILIES.items()
  }


def expected(family, pipe, prompts):
  """Text, pooled and mask of diffusers; the latter two may be None."""
  with torch.no_grad():
    if family == "flux":
      text, pooled, _ = pipe.encode_prompt(
        prompts, device="cpu", max_sequence_length=LENGTH
      )
      return text, pooled, None
    if family == "stable_diffusion_3":
      text, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, device="cpu", max_sequence_length=LENGTH
      )
      return text, pooled, None
    if family == "wan":
      text, _ = pipe.encode_prompt(
        prompts, device="cpu", max_sequence_length=LENGTH
      )
      return text, None, None
    if family == "qwen_image":
      text, mask = pipe.encode_prompt(
        prompts, device="cpu", max_sequence_length=LENGTH
      )
      return text, None, mask
    return pipe.encode_prompt(prompts, device="cpu", max_sequence_length=LENGTH)


def assert_equal(ours, theirs, atol=2e-5):
  for mine, other in zip((ours.text, ours.pooled), theirs):
    assert (mine is None) == (other is None)
    if other is not None:
      assert mine.shape == other.shape
      np.testing.assert_allclose(mine, other.numpy(), atol=atol, rtol=0)
      assert np.abs(mine).max() > 0.5
  if theirs[2] is not None:
    np.testing.assert_array_equal(ours.mask, theirs[2].numpy() > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family, references, caplog):
  reference = references[family]
  encoder = load_prompt_encoder(
    reference.directory, max_length=LENGTH, batch_size=2
  )
  # The tokens of the template that are dropped are all of them.
  assert not caplog.messages
  ours = encoder.encode(PROMPTS)
  theirs = expected(family, reference.pipe, PROMPTS)
  # Hunyuan gives text, pooled, mask; all but Qwen's and its mask are absent.
  assert_equal(ours, theirs)
  assert (ours.mask is None) == (theirs[2] is None)
  if ours.mask is not None:
    assert not ours.mask.all()
  # A negative prompt is a prompt like any other, also alone.
  alone = encoder.encode([""])
  assert_equal(alone, expected(family, reference.pipe, [""]))


def test_sd3_without_t5(references, tmp_path):
  reference = references["stable_diffusion_3"]
  directory = tmp_path / "pipeline"
  shutil.copytree(reference.directory, directory)
  absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
  changed_json("model_index.json", **absent)(directory)
  for name in absent:
    shutil.rmtree(directory / name)
  transformer = diffusers.SD3Transformer2DModel(**SD3 | WIDTHS)
  transformer.save_config(directory / "transformer")
  pipe = diffusers.StableDiffusion3Pipeline(
    **dict.fromkeys(("vae", "scheduler", *absent)),
    transformer=transformer,
    **{n: getattr(reference.pipe, n) for n in CLIPS},
  )
  encoder = load_prompt_encoder(directory, max_length=LENGTH + 2)
  ours = encoder.encode(PROMPTS)
  with torch.no_grad():
    text, _, pooled, _ = pipe.encode_prompt(
      PROMPTS, None, None, device="cpu", max_sequence_length=LENGTH + 2
    )
  assert_equal(ours, (text, pooled, None))
  assert ours.text.shape[1:] == (LENGTH + LENGTH + 2, 40)
  assert load_prompt_encoder(directory).max_length == 256
  assert encoder.fingerprint  # of the encoders that are there


WIDTHS = dict(joint_attention_dim=40, pooled_projection_dim=32)
CLIPS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def test_lengths_of_the_families(references):
  lengths = {
    name: load_prompt_encoder(reference.directory).max_length
    for name, reference in references.items()
  }
  # The tokenizers of T5 were written for 16 tokens.
  assert lengths == dict(
    flux=16,
    stable_diffusion_3=16,
    wan=16,
    qwen_image=512,
    hunyuan_video=256,
  )


def test_tokenizer_json_is_read_as_it_is(references):
  directory = references["hunyuan_video"].directory
  theirs = tokenizers.Tokenizer.from_file(
    str(directory / "tokenizer" / "tokenizer.json")
  )
  encoder = load_prompt_encoder(directory)
  text = encoder.recipe.template.format("a red  circle\n\n12")
  (ids,), (mask,) = encoder.tokenizers[0]([text], 200)
  np.testing.assert_array_equal(ids[mask], theirs.encode(text).ids)
  assert mask[0] and not mask[-1]


def test_another_tokenizer_is_told(references, tmp_path, caplog):
  directory = tmp_path / "pipeline"
  shutil.copytree(references["qwen_image"].directory, directory)
  (directory / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
  load_prompt_encoder(directory)
  assert "tokens before the prompt and 34 are dropped" in caplog.text


def test_bfloat16_and_mesh(references):
  directory = references["qwen_image"].directory
  kwargs = dict(max_length=LENGTH, batch_size=3)
  exact = load_prompt_encoder(directory, **kwargs).encode(PROMPTS)
  mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
  spread = load_prompt_encoder(directory, mesh=mesh, **kwargs).encode(PROMPTS)
  rounded = load_prompt_encoder(directory, dtype=jnp.bfloat16, **kwargs).encode(
    PROMPTS
  )
  np.testing.assert_array_equal(rounded.mask, exact.mask)
  np.testing.assert_allclose(spread.text, exact.text, atol=1e-5)
  assert rounded.text.dtype == jnp.bfloat16
  error = np.linalg.norm(rounded.text.astype(np.float32) - exact.text)
  assert 1e-4 < error / np.linalg.norm(exact.text) < 2e-2


def test_cleaning():
  assert clean(" a &amp;amp; b\n\tc&lt;3 ") == "a & b c<3"
  assert has_ftfy() or clean("“a”") == "“a”"


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import numpy as np
from digen_jax.data.prompt_encoder import load_prompt_encoder
for number, directory in enumerate(sys.argv[2:]):
  encoder = load_prompt_encoder(directory, max_length=9)
  ids = encoder.tokenize(["two {}"])[0].ids
  np.save(f"{sys.argv[1]}/{number}.npy", ids)
encoder.encode(["red"])
assert not [m for m in sys.modules if m.startswith("torch.")]
"""


def test_without_torch(references, tmp_path):
  directories = [r.directory for r in references.values()]
  done = subprocess.run(
    [sys.executable, "-c", WITHOUT_TORCH, tmp_path, *directories],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "PyTorch" not in done.stderr
  for number, directory in enumerate(directories):
    encoder = load_prompt_encoder(directory, max_length=9)
    ids = encoder.tokenize(["two {}"])[0].ids
    np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), ids)


def remove(name):
  def damage(directory):
    path = directory / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()

  return damage


def changed_json(name, **changes):
  def damage(directory):
    file = directory / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

  return damage


def no_padding_token(directory):
  changed_json("tokenizer_2/tokenizer_config.json", pad_token=None)(directory)
  remove("tokenizer_2/special_tokens_map.json")(directory)


def broken_tokenizer(directory):
  (directory / "tokenizer_2" / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (remove("model_index.json"), "model_index.json does not exist"),
    (remove("text_encoder/config.json"), "config.json does not exist"),
    (remove("tokenizer"), "tokenizer directory .* does not exist"),
    (remove("tokenizer/vocab.json"), "cannot read the CLIPTokenizer"),
    (remove("text_encoder/model.safetensors"), "no diffusion_pytorch_model"),
    (
      changed_json("model_index.json", text_encoder_2=[None, None]),
      "text_encoder_2 is None, only T5EncoderModel is supported in a Flux",
    ),
    (
      changed_json("model_index.json", _class_name="KolorsPipeline"),
      "holds a KolorsPipeline, whose prompts cannot .* FluxPipeline, Hunyuan",
    ),
    (broken_tokenizer, "cannot read the PreTrainedTokenizerFast in"),
    (
      changed_json("text_encoder/config.json", vocab_size=99),
      "ids up to .* only 99 rows",
    ),
    (no_padding_token, "has no padding token"),
  ],
)
def test_incomplete_pipeline(references, tmp_path, damage, message):
  directory = tmp_path / "pipeline"
  shutil.copytree(references["flux"].directory, directory)
  damage(directory)
  with pytest.raises(UserError, match=message) as error:
    load_prompt_encoder(directory).encode(["red"])
  assert "\n" not in str(error.value)


def test_bad_arguments(references):
  directory = references["flux"].directory
  with pytest.raises(UserError, match="no prompts to encode"):
    load_prompt_encoder(directory).encode([])
  with pytest.raises(UserError, match="prompts of 0 tokens"):
    load_prompt_encoder(directory, max_length=0)
