"""Sets of prompt embeddings on disk."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from digen_jax.data import embeddings
from digen_jax.data.embeddings import cached_embeddings, known_embeddings
from digen_jax.data.prompt_encoder import PromptEncoder, load_prompt_encoder
from digen_jax.errors import UserError
from digen_jax.weights.safetensors import read_header
from tests.text_pipelines import LENGTH, PROMPTS, flux, qwen_image, wan

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  return flux(tmp_path_factory.mktemp("flux")).directory


@pytest.fixture(scope="module")
def encoder(pipeline):
  return load_prompt_encoder(pipeline, batch_size=2)


@pytest.fixture
def encoded(monkeypatch):
  """How many prompts each call encodes, from now on."""
  calls, encode = [], PromptEncoder.encode_tokens

  def count(self, tokens, rows):
    calls.append(len(rows))
    return encode(self, tokens, rows)

  monkeypatch.setattr(PromptEncoder, "encode_tokens", count)
  return calls


def assert_same(conditioning, other):
  for name in ("text", "pooled", "mask"):
    x, y = getattr(conditioning, name), getattr(other, name)
    assert (x is None) == (y is None)
    if x is not None:
      assert x.dtype == y.dtype and x.shape == y.shape
      np.testing.assert_array_equal(x, y)


def batches(directory):
  return sorted(directory.glob("*.safetensors"))


@pytest.mark.parametrize("family", [flux, wan, qwen_image])
def test_a_set_gives_what_the_encoder_gives(family, tmp_path, encoded):
  pipeline = tmp_path / "pipeline"
  pipeline.mkdir()
  family(pipeline)
  encoder = load_prompt_encoder(pipeline, max_length=LENGTH, batch_size=2)
  prompts = [*PROMPTS, PROMPTS[0]]
  ours = cached_embeddings(encoder, prompts, tmp_path / "deep" / "set")
  assert encoded == [5]
  # A fresh encoder reads no weights for what is there.
  fresh = load_prompt_encoder(pipeline, max_length=LENGTH)
  again = cached_embeddings(fresh, prompts, tmp_path / "deep" / "set")
  assert encoded == [5] and "encoders" not in vars(fresh)
  exact = encoder.encode(prompts)
  assert_same(ours, exact)
  assert_same(again, exact)
  # Rows are read when they are indexed.
  index = np.array([[3, 0], [0, 5]])
  np.testing.assert_array_equal(ours.text[index], exact.text[index])
  np.testing.assert_array_equal(ours.text[1:4:2], exact.text[1:4:2])
  np.testing.assert_array_equal(ours.text[2], exact.text[2])


def test_zeros_of_padding_are_not_stored(tmp_path):
  pipeline = tmp_path / "pipeline"
  pipeline.mkdir()
  wan(pipeline)
  encoder = load_prompt_encoder(pipeline)
  cached_embeddings(encoder, ["red", "two circles"], tmp_path / "set")
  (file,) = batches(tmp_path / "set")
  assert read_header(file)["text"].shape == (2 + 3, 32)  # words and ends


def test_what_is_missing_is_added(encoder, tmp_path, encoded):
  cached_embeddings(encoder, PROMPTS[:3], tmp_path)
  first = {file: file.read_bytes() for file in batches(tmp_path)}
  told = []
  ours = cached_embeddings(
    encoder, PROMPTS[::-1], tmp_path, lambda *args: told.append(args)
  )
  assert encoded == [3, 2] and told == [(2, 2)]
  assert_same(ours, encoder.encode(PROMPTS[::-1]))
  assert all(file.read_bytes() == first[file] for file in first)
  names = {file.name for file in tmp_path.iterdir()}
  assert names == {f.name for f in batches(tmp_path)} | {"embeddings.json"}


def test_bfloat16(pipeline, tmp_path):
  encoder = load_prompt_encoder(pipeline, dtype=jnp.bfloat16)
  ours = cached_embeddings(encoder, PROMPTS, tmp_path)
  assert_same(ours, encoder.encode(PROMPTS))
  assert ours.text.dtype == jnp.bfloat16
  (file,) = batches(tmp_path)
  assert read_header(file)["text"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "damage",
  [lambda content: content[:-100], lambda content: b"", lambda _: b"no file"],
  ids=["truncated", "empty", "text"],
)
def test_a_damaged_batch_is_encoded_again(
  encoder, tmp_path, damage, encoded, caplog
):
  first = cached_embeddings(encoder, PROMPTS[:3], tmp_path)
  exact = np.asarray(first.text)
  file = batches(tmp_path)[0]
  intact = file.read_bytes()
  file.write_bytes(damage(intact))
  again = cached_embeddings(encoder, PROMPTS[:3], tmp_path)
  assert "is damaged, encoding again" in caplog.text
  assert encoded[0] == 3 and encoded[1] < 3
  np.testing.assert_array_equal(again.text, exact)


def test_sets_of_others_are_refused(pipeline, encoder, tmp_path, encoded):
  folder = tmp_path / "set"
  cached_embeddings(encoder, PROMPTS, folder)
  before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}

  def refused(other, words):
    with pytest.raises(UserError, match=words) as error:
      cached_embeddings(other, PROMPTS, folder)
    assert "\n" not in str(error.value)

  shorter = load_prompt_encoder(pipeline, max_length=9)
  refused(shorter, "differently: max_length is 16, now 9; name another")
  rounded = load_prompt_encoder(pipeline, dtype=jnp.bfloat16)
  refused(rounded, "dtype is 'float32', now 'bfloat16'")
  directory = tmp_path / "pipeline"
  shutil.copytree(pipeline, directory)
  assert load_prompt_encoder(directory).fingerprint == encoder.fingerprint
  file = directory / "text_encoder_2" / "model.safetensors"
  content = file.read_bytes()
  file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  refused(load_prompt_encoder(directory), "text encoders or tokenizers are")
  assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before
  assert encoded == [5]


def test_a_set_that_is_only_read(pipeline, encoder, tmp_path, encoded):
  """What it does not have, or has otherwise, is encoded and not kept."""
  folder = tmp_path / "set"
  assert_same(
    known_embeddings(encoder, PROMPTS[:2], folder), encoder.encode(PROMPTS[:2])
  )
  assert not folder.exists()
  cached_embeddings(encoder, PROMPTS[:3], folder)
  before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
  encoded.clear()
  found = known_embeddings(encoder, PROMPTS[:3], folder)
  assert encoded == []
  assert_same(found, encoder.encode(PROMPTS[:3]))
  rounded = load_prompt_encoder(pipeline, dtype=jnp.bfloat16)
  encoded.clear()
  for other, prompts in ((encoder, PROMPTS), (rounded, PROMPTS[:3])):
    found = known_embeddings(other, prompts, folder)
    assert encoded.pop() == len(prompts)
    assert_same(found, other.encode(prompts))
  assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before


def test_another_writer_was_quicker(pipeline, encoder, tmp_path, monkeypatch):
  """Both have seen no set; the one that comes second does not mix them."""
  rounded = load_prompt_encoder(pipeline, dtype=jnp.bfloat16, batch_size=2)
  encode = PromptEncoder.encode_tokens

  def be_late(self, tokens, rows):
    monkeypatch.setattr(PromptEncoder, "encode_tokens", encode)
    cached_embeddings(encoder, PROMPTS[:2], tmp_path / "set")
    yield from encode(self, tokens, rows)

  monkeypatch.setattr(PromptEncoder, "encode_tokens", be_late)
  with pytest.raises(UserError, match="made differently: dtype is 'float32'"):
    cached_embeddings(rounded, PROMPTS[:2], tmp_path / "set")
  # Even if it had been at the same moment: neither takes the other's.
  embeddings._encode_missing(
    encoder, PROMPTS[2:4], np.arange(2), tmp_path / "set", None
  )
  monkeypatch.setattr(embeddings, "check_set", lambda *_: None)
  embeddings._encode_missing(
    rounded, PROMPTS[2:4], np.arange(2), tmp_path / "set", None
  )
  assert len(batches(tmp_path / "set")) == 3
  for one, prompts in ((encoder, PROMPTS[:4]), (rounded, PROMPTS[2:4])):
    known = embeddings.read_set(tmp_path / "set", one.fingerprint)
    assert set(known) == set(prompts)
    assert {found.text.dtype for found in known.values()} == {one.dtype}


def test_directories_that_are_no_set(encoder, tmp_path):
  with pytest.raises(UserError, match="no prompts to encode"):
    cached_embeddings(encoder, [], tmp_path)
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match=r"not empty and has no embeddings\.json"):
    cached_embeddings(encoder, PROMPTS, tmp_path)
  with pytest.raises(UserError, match="is a file"):
    cached_embeddings(encoder, PROMPTS, tmp_path / "notes.txt")


def test_what_a_killed_writer_leaves_is_no_obstacle(encoder, tmp_path):
  (tmp_path / ".embeddings.json.1234.tmp").write_text("{")
  found = cached_embeddings(encoder, PROMPTS[:1], tmp_path)
  assert_same(found, encoder.encode(PROMPTS[:1]))


def test_nothing_is_written_before_something_is_encoded(pipeline, tmp_path):
  directory = tmp_path / "pipeline"
  shutil.copytree(pipeline, directory)
  (directory / "text_encoder" / "model.safetensors").unlink()
  with pytest.raises(UserError, match="no diffusion_pytorch_model"):
    cached_embeddings(load_prompt_encoder(directory), PROMPTS, tmp_path / "set")
  assert not (tmp_path / "set").exists()


# Dies in the middle of writing the third batch.
KILLED = """
import os, signal, sys
from digen_jax.data import embeddings
from launch import encode_prompts
from digen_jax.launching import run_main

write, calls = embeddings.save_file, []

def save_file(tensors, path, metadata):
  calls.append(path)
  write(tensors, path, metadata)
  if len(calls) == 3:
    os.truncate(path, 100)
    os.kill(os.getpid(), signal.SIGKILL)

embeddings.save_file = save_file
run_main(encode_prompts.main)
"""


def test_launch_script_goes_on_where_it_was_killed(pipeline, tmp_path, encoder):
  file = tmp_path / "prompts.txt"
  prompts = [f"{number} red circles" for number in range(10)]
  file.write_text("".join(f"{prompt}\n" for prompt in [*prompts, prompts[0]]))
  folder = tmp_path / "set"
  arguments = [
    f"--checkpoint={pipeline}",
    f"--prompts={file}",
    f"--out={folder}",
    "--batch_size=2",
  ]
  killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT)
  assert killed.returncode == -signal.SIGKILL
  assert len(embeddings.read_set(folder, encoder.fingerprint)) == 4
  kept = {f: f.stat().st_mtime_ns for f in batches(folder)}
  script = ROOT / "launch" / "encode_prompts.py"
  done = subprocess.run(
    [sys.executable, script, *arguments],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == f"10 prompts and the negative one in {folder}\n"
  assert {f: f.stat().st_mtime_ns for f in kept} == kept
  assert len(batches(folder)) == 6
  found = cached_embeddings(encoder, prompts, folder)
  assert_same(found, encoder.encode(prompts))
