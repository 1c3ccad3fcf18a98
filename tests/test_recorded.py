"""Recorded inputs of pipelines: layouts, and what is refused."""

import dataclasses

import numpy as np
import pytest

from digen_jax.data.embeddings import match_text
from digen_jax.data.recorded import read_recorded
from digen_jax.errors import UserError
from digen_jax.models import flux
from digen_jax.types import Conditioning

RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def write(folder, **arrays):
  np.savez(folder / "in.npz", **arrays)
  return folder / "in.npz"


def test_packed_latents_are_unpacked_as_flux_packs(tmp_path):
  latents = normal(2, 4, 6, 3)
  tokens = np.asarray(flux.pack(latents))
  file = write(tmp_path, latents=tokens, prompt_embeds=normal(2, 5, 8))
  recorded = read_recorded(file, (4, 6, 3))
  np.testing.assert_array_equal(recorded.latents, latents)
  np.testing.assert_array_equal(recorded.theirs(latents[None])[0], tokens)
  assert recorded.negative is None


def test_videos_and_masks(tmp_path):
  latents = normal(1, 3, 2, 4, 6)  # channels first
  file = write(
    tmp_path,
    latents=latents,
    prompt_embeds=normal(1, 5, 8),
    prompt_attention_mask=np.array([[1, 1, 1, 0, 0]]),
    negative_prompt_embeds=normal(1, 2, 8),
    negative_prompt_attention_mask=np.array([[1, 1]]),
    image=normal(1, 4, 4, 3),
  )
  recorded = read_recorded(file, (2, 4, 6, 3))
  np.testing.assert_array_equal(
    recorded.latents, latents.transpose(0, 2, 3, 4, 1)
  )
  theirs = recorded.theirs(recorded.latents[None])
  np.testing.assert_array_equal(theirs[0], latents)
  prompts, negative = match_text(recorded.prompts, recorded.negative)
  assert prompts.text.shape == negative.text.shape == (1, 5, 8)
  np.testing.assert_array_equal(negative.mask, [[1, 1, 0, 0, 0]])
  np.testing.assert_array_equal(negative.text[:, 2:], 0)


def test_text_without_a_mask_is_never_padded():
  a, b = (Conditioning(text=normal(1, n, 4)) for n in (3, 5))
  assert match_text(a, b) == (a, b)


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("missing", ["prompts", "negative"])
def test_a_mask_that_is_missing_is_all_true(lengths, missing):
  a, b = (Conditioning(text=normal(1, n, 4)) for n in lengths)
  mask = np.arange(lengths[missing == "prompts"])[None] < 2
  if missing == "prompts":
    b = dataclasses.replace(b, mask=mask)
  else:
    a = dataclasses.replace(a, mask=mask)
  for found, given in zip(match_text(a, b), (a, b)):
    length, real = max(lengths), given.text.shape[1]
    assert found.text.shape == (1, length, 4)
    np.testing.assert_array_equal(found.text[:, :real], given.text)
    valid = real if given.mask is None else 2
    np.testing.assert_array_equal(found.mask, np.arange(length)[None] < valid)


def test_models_with_masks_get_them_where_lengths_differ():
  a, b = (Conditioning(text=normal(1, n, 4)) for n in (3, 5))
  prompts, negative = match_text(a, b, masked=True)
  np.testing.assert_array_equal(prompts.mask, [[1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(negative.mask, [[1, 1, 1, 1, 1]])
  assert match_text(a, a, masked=True) == (a, a)


@pytest.mark.parametrize(
  ("arrays", "words"),
  [
    (dict(latents=normal(1, 4, 4, 4)), "lacks 'prompt_embeds'"),
    (
      dict(latents=normal(1, 7, 12), prompt_embeds=normal(1, 2, 3)),
      r"\(7, 12\) tokens.*\(6, 12\)",
    ),
    (
      dict(latents=normal(1, 3, 8, 6), prompt_embeds=normal(1, 2, 3)),
      r"\(8, 6, 3\).*\(4, 6, 3\)",
    ),
  ],
)
def test_what_does_not_fit_is_one_line(arrays, words, tmp_path):
  with pytest.raises(UserError, match=words) as error:
    read_recorded(write(tmp_path, **arrays), (4, 6, 3))
  assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
  with pytest.raises(UserError, match="cannot read"):
    read_recorded(tmp_path / "none.npz", (4, 6, 3))


@pytest.mark.parametrize("kept", [0, 10, 300, -30, -100])
def test_a_truncated_file(kept, tmp_path):
  file = write(tmp_path, latents=normal(1, 3, 4, 6), prompt_embeds=normal(1, 2))
  file.write_bytes(file.read_bytes()[:kept])
  with pytest.raises(UserError, match=r"cannot read .*in\.npz") as error:
    read_recorded(file, (4, 6, 3))
  assert "\n" not in str(error.value)


def test_damaged_bytes(tmp_path):
  np.savez_compressed(tmp_path / "in.npz", latents=np.zeros((1, 3, 40, 60)))
  content = bytearray((tmp_path / "in.npz").read_bytes())
  content[60:90] = bytes(30)
  (tmp_path / "in.npz").write_bytes(content)
  with pytest.raises(UserError, match="cannot read"):
    read_recorded(tmp_path / "in.npz", (4, 6, 3))


def test_a_single_array(tmp_path):
  np.save(tmp_path / "in.npy", normal(1, 3, 4, 6))
  with pytest.raises(UserError, match="single array; write it with"):
    read_recorded(tmp_path / "in.npy", (4, 6, 3))
