"""Checkpoints by their name on the hub; there is no network in these tests."""

import sys

import huggingface_hub
import pytest

from digen_jax import assets
from digen_jax.data.prompt_encoder import load_prompt_encoder
from digen_jax.errors import UserError
from digen_jax.weights import hub, load


@pytest.fixture
def asked(monkeypatch):
  """What the hub's client is asked for; it gives the embedded checkpoint."""
  calls = []

  def download(repository, **kwargs):
    calls.append((repository, kwargs["revision"]))
    if repository.startswith("nobody/"):
      raise ConnectionError("no route\nto host")
    return assets.path("tiny_flux")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  hub._download.cache_clear()
  yield calls
  hub._download.cache_clear()


def test_what_exists_is_not_looked_up(asked, tmp_path, monkeypatch):
  (tmp_path / "owner" / "name").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert str(hub.local_checkpoint("owner/name")) == "owner/name"
  assert not asked


def test_every_loader_takes_an_id(asked):
  name = "owner/tiny-flux.1@refs/pr/3"
  config = load.load_pipeline_config(name)
  assert str(config.path) == assets.path("tiny_flux")
  load.load_autoencoder(name)
  assert load.module_directory(name, "transformer").name == "transformer"
  assert load.fingerprint(name) == load.fingerprint(assets.path("tiny_flux"))
  assert load_prompt_encoder(name).directory == config.path
  assert asked == [("owner/tiny-flux.1", "refs/pr/3")]  # once
  hub.local_checkpoint("owner/other")
  assert asked[1:] == [("owner/other", None)]


@pytest.mark.parametrize(
  "path", ["nowhere", "/no/where", "./no/where", "../no", "a/b/c", "runs/"]
)
def test_paths_are_no_ids(asked, path):
  with pytest.raises(UserError, match="does not exist"):
    hub.local_checkpoint(path)
  assert not asked


def test_the_hub_cannot_be_reached(asked):
  with pytest.raises(
    UserError, match="nobody/home does not exist, and the hub"
  ):
    load.load_model("nobody/home")


def test_without_its_package(asked, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(UserError, match="pip install huggingface_hub") as error:
    hub.local_checkpoint("owner/name")
  assert "\n" not in str(error.value)


def test_what_is_downloaded():
  """Patterns of what a repository's files are wanted."""
  from fnmatch import fnmatchcase

  def wanted(file):
    return any(fnmatchcase(file, p) for p in hub.PATTERNS) and not any(
      fnmatchcase(file, p) for p in hub.IGNORED
    )

  for file in (
    "model_index.json",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "diffusion_pytorch_model.safetensors",
  ):
    assert wanted(file), file
  for file in (
    "flux1-dev.safetensors",
    "ae.safetensors",
    "text_encoders/t5xxl_fp8_e4m3fn.safetensors",
    "text_encoders/clip_g.safetensors",
    "transformer_2/diffusion_pytorch_model-00001-of-00012.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/pytorch_model.bin",
    "README.md",
  ):
    assert not wanted(file), file
