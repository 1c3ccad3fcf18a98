"""Checkpoints by their name on the hub; there is no network in these tests."""

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from digen_jax import assets, run_files, training
from digen_jax.config import from_config_dict
from digen_jax.data.prompt_encoder import load_prompt_encoder
from digen_jax.errors import UserError
from digen_jax.weights import hub, load
from tests.small_run import small_config, write_prompts

FIRST, SECOND = "1" * 40, "2" * 40
# What a repository often holds beside what is read.
UNWANTED = (
  "flux1-dev.safetensors",
  "ae.safetensors",
  "text_encoders/t5xxl_fp8_e4m3fn.safetensors",
  "text_encoders/clip_g.safetensors",
  "transformer_2/diffusion_pytorch_model-00001-of-00012.safetensors",
  "text_encoder/model.fp16.safetensors",
  "text_encoder/model.fp16-00001-of-00002.safetensors",
  "text_encoder/pytorch_model.bin",
  "vae/diffusion_pytorch_model.non_ema.safetensors",
  "README.md",
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  """The embedded checkpoint as others publish theirs."""
  folder = tmp_path_factory.mktemp("hub") / "repository"
  shutil.copytree(assets.path("tiny_flux"), folder)
  for name in UNWANTED:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"1")
  return folder


@pytest.fixture
def client(repository, tmp_path, monkeypatch):
  """What the hub's client is asked for, and the commit that is newest there.

  As the real one, it gives a directory of links, named by its commit.
  """
  client = types.SimpleNamespace(asked=[], newest=FIRST)

  def download(name, *, revision, **patterns):
    client.asked.append((name, revision))
    if name.startswith("nobody/"):
      raise ConnectionError("no route\nto host")
    commit = hub.COMMIT.fullmatch(revision or "")
    snapshot = tmp_path / "snapshots" / (revision if commit else client.newest)
    for file in filter_repo_objects(files_of(repository), **patterns):
      (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
      if not (snapshot / file).exists():
        (snapshot / file).symlink_to(repository / file)
    return str(snapshot)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  hub._download.cache_clear()
  yield client
  hub._download.cache_clear()


def files_of(folder):
  """Names of all files in a directory, sorted."""
  found = (path for path in Path(folder).rglob("*") if path.is_file())
  return sorted(path.relative_to(folder).as_posix() for path in found)


def test_what_exists_is_not_looked_up(client, tmp_path, monkeypatch):
  (tmp_path / "owner" / "name").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert str(hub.local_checkpoint("owner/name")) == "owner/name"
  assert hub.pinned("owner/name") == "owner/name"
  assert not client.asked


def test_every_loader_takes_an_id(client, repository):
  name = "owner/tiny-flux.1@refs/pr/3"
  config = load.load_pipeline_config(name)
  assert config.path.name == FIRST
  load.load_autoencoder(name)
  assert load.module_directory(name, "transformer").name == "transformer"
  assert load_prompt_encoder(name).directory == config.path
  assert client.asked == [("owner/tiny-flux.1", "refs/pr/3")]  # once
  # Nothing that is not read; and a clone, which has it all, is the same.
  assert files_of(config.path) == files_of(assets.path("tiny_flux"))
  assert len(files_of(repository)) > len(files_of(config.path))
  assert load.fingerprint(name) == load.fingerprint(repository)
  assert load.fingerprint(name) == load.fingerprint(assets.path("tiny_flux"))
  hub.local_checkpoint("owner/other")
  assert client.asked[1:] == [("owner/other", None)]


def test_a_run_keeps_to_the_commit_it_began_with(client, tmp_path):
  config = from_config_dict({"checkpoint": "owner/name"})
  started = run_files.pin_checkpoint(config, tmp_path)
  assert started.checkpoint == f"owner/name@{FIRST}"
  text = json.dumps({"config": {"checkpoint": started.checkpoint}})
  (tmp_path / "config.json").write_text(text)
  client.newest = SECOND
  hub._download.cache_clear()  # another process
  assert hub.pinned("owner/name") == f"owner/name@{SECOND}"
  assert run_files.pin_checkpoint(config, tmp_path) == started
  assert run_files.pin_checkpoint(started, tmp_path) == started
  assert load.load_pipeline_config(started.checkpoint).path.name == FIRST
  other = dataclasses.replace(config, checkpoint="owner/nam")
  found = run_files.pin_checkpoint(other, tmp_path)
  assert found.checkpoint == f"owner/nam@{SECOND}"


def test_the_commit_is_written_down(client, tmp_path, monkeypatch):
  """In the directory of the run, for whatever is done with it later."""
  config = small_config(write_prompts(tmp_path))
  config.checkpoint = "owner/name"
  config = from_config_dict(config)
  found = []

  def stop(*args):
    found.append(args)
    raise UserError("enough")

  monkeypatch.setattr(training, "fingerprint", stop)
  with pytest.raises(UserError, match="enough"):
    training.Run(config, tmp_path / "run")
  assert found.pop()[0] == f"owner/name@{FIRST}"

  pinned = dataclasses.replace(config, checkpoint=f"owner/name@{FIRST}")
  closed = []
  opened = types.SimpleNamespace(
    config=pinned,
    workdir=tmp_path,
    hardware={},
    step=0,
    close=lambda: closed.append(True),
  )
  monkeypatch.setattr(training, "Run", lambda *_: opened)
  monkeypatch.setattr(run_files, "RunFiles", stop)
  with pytest.raises(UserError, match="enough"):
    training.train(config, tmp_path)
  assert pinned in found.pop() and closed


@pytest.mark.parametrize(
  "path", ["nowhere", "/no/where", "./no/where", "../no", "a/b/c", "runs/"]
)
def test_paths_are_no_ids(client, path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # where a run may have made them
  with pytest.raises(UserError, match="does not exist"):
    hub.local_checkpoint(path)
  assert not client.asked


def test_the_hub_cannot_be_reached(client):
  with pytest.raises(
    UserError, match="nobody/home does not exist, and the hub"
  ):
    load.load_model("nobody/home")


def test_without_its_package(client, monkeypatch):
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
  for file in UNWANTED:
    assert not wanted(file), file
