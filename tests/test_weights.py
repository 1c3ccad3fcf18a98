"""Checkpoints in diffusers' layout: loading, its failures, and exporting."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.numpy import load_file, save_file

from digen_jax.errors import UserError
from digen_jax.models import lora
from digen_jax.models.vae import autoencoder_kl
from digen_jax.parallel import mesh as mesh_lib
from digen_jax.parallel import rules
from digen_jax.weights import adapters, export, load, safetensors
from tests import references

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FILE = "diffusion_pytorch_model.safetensors"
TENSOR = "transformer_blocks.1.attn.to_q.weight"


@pytest.fixture(scope="module")
def reference():
  return references.flux(seed=7)


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory):
  path = tmp_path_factory.mktemp("flux")
  reference.save_pretrained(path)
  return path


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "transformer")


def edit(directory, change):
  """Rewrites the tensors of a module directory."""
  tensors = load_file(directory / FILE)
  change(tensors)
  save_file(tensors, directory / FILE)


def test_kernels_are_stacked_and_transposed(saved, reference):
  params = load.load_model(saved).params
  kernel = params["double_blocks"]["attn"]["to_out"]["kernel"]
  for i, block in enumerate(reference.transformer_blocks):
    np.testing.assert_array_equal(kernel[i], block.attn.to_out[0].weight.T)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == sum(p.numel() for p in reference.parameters())


def test_shards_load_like_one_file(saved, reference, tmp_path):
  reference.save_pretrained(tmp_path, max_shard_size="100KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  jax.tree.map(
    np.testing.assert_array_equal,
    load.load_model(tmp_path).params,
    load.load_model(saved).params,
  )


def test_dtypes(saved, tmp_path):
  half = references.flux(seed=7).to(torch.bfloat16)
  half.save_pretrained(tmp_path)
  full = load.load_model(saved)
  widened = load.load_model(tmp_path)
  narrowed = load.load_model(saved, dtype="bfloat16")
  mixed = load.load_model(saved, dtype="bfloat16", param_dtype="float32")
  for model, params_dtype, dtype in (
    (widened, jnp.float32, jnp.float32),
    (narrowed, jnp.bfloat16, jnp.bfloat16),
    (mixed, jnp.float32, jnp.bfloat16),
  ):
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {
      jnp.dtype(params_dtype)
    }
    assert model.config.dtype == dtype
  jax.tree.map(
    lambda a, b, c: (
      np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
      np.testing.assert_array_equal(a, c.astype(jnp.bfloat16)),
    ),
    narrowed.params,
    widened.params,
    full.params,
  )


def test_parameters_do_not_share_memory_with_files(copy):
  before = load.load_model(copy, dtype="float32").params
  kept = jax.tree.map(np.array, before)
  size = (copy / FILE).stat().st_size
  with open(copy / FILE, "r+b") as stream:  # in place, as no editor does
    stream.write(b"\1" * size)
  jax.tree.map(np.testing.assert_array_equal, before, kept)


def test_each_device_gets_its_part(saved):
  whole = load.load_model(saved)
  mesh = mesh_lib.make_mesh(dict(fsdp=2, tensor=2), jax.devices()[:4])
  model = load.load_model(saved, mesh=mesh, rules=rules.TRAINER)
  kernel = model.params["double_blocks"]["attn"]["to_q"]["kernel"]
  assert {shard.data.shape for shard in kernel.addressable_shards} == {
    (2, 24, 24)
  }
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(model.params),
    jax.device_get(whole.params),
  )


def test_old_names_of_the_autoencoders_attention(tmp_path):
  reference = references.autoencoder(seed=1)
  reference.save_pretrained(tmp_path)
  expected = load.load_autoencoder(tmp_path).params
  old = dict(to_q="query", to_k="key", to_v="value")

  def rename(tensors):
    for name in list(tensors):
      for new, older in (old | {"to_out.0": "proj_attn"}).items():
        if f".{new}." in name:
          tensors[name.replace(new, older)] = tensors.pop(name)

  edit(tmp_path, rename)
  assert any("proj_attn" in name for name in load_file(tmp_path / FILE))
  actual = load.load_autoencoder(tmp_path).params
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_tensors_that_do_not_fit_are_named(copy):
  file = str(copy / FILE)
  edit(copy, lambda t: t.update({TENSOR: np.zeros((3, 48), np.float32)}))
  with pytest.raises(UserError) as error:
    load.load_model(copy)
  for part in (TENSOR, file, "[3, 48]", "[48, 48]"):
    assert part in str(error.value)

  edit(copy, lambda t: t.pop(TENSOR))
  with pytest.raises(UserError, match=rf"{TENSOR}' \[48, 48\] is missing"):
    load.load_model(copy)

  extra = np.zeros(2, np.float32)
  edit(copy, lambda t: t.update({TENSOR: np.zeros((48, 48)), "x.y": extra}))
  with pytest.raises(UserError, match=r"'x.y' \[2\] in .* not part of"):
    load.load_model(copy)
  assert "\n" not in str(error.value)


def test_damaged_files_are_named(copy):
  file = copy / FILE
  content = file.read_bytes()
  file.write_bytes(content[:-100])
  with pytest.raises(UserError, match=rf"{file} is truncated: tensor"):
    load.load_model(copy)
  file.write_bytes(content[:200])
  with pytest.raises(UserError, match=rf"{file} is truncated or no"):
    load.load_model(copy)
  file.write_bytes(b"")
  with pytest.raises(UserError, match=rf"{file} is truncated or no"):
    load.load_model(copy)
  file.write_bytes(content[:8] + b"?" + content[9:])
  with pytest.raises(UserError, match=rf"{file} has an unreadable"):
    load.load_model(copy)
  file.unlink()
  with pytest.raises(UserError, match=rf"{copy} has no {FILE}"):
    load.load_model(copy)


def test_damaged_header_entries_are_named(tmp_path):
  def write(entry):
    header = json.dumps({"w": entry}).encode()
    file = tmp_path / FILE
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return safetensors.list_tensors(tmp_path)

  good = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
  np.testing.assert_array_equal(write(good)["w"].view(), [0, 0])
  for change, message in (
    (dict(shape=[3]), r"8 bytes do not hold F32 \[3\]"),
    (dict(dtype="F8_E4M3"), "dtype F8_E4M3"),
    (dict(data_offsets=[8]), "damaged header entry"),
  ):
    with pytest.raises(UserError, match=message):
      write(good | change)


def test_missing_shards_are_named(reference, tmp_path):
  reference.save_pretrained(tmp_path, max_shard_size="100KB")
  shard = sorted(tmp_path.glob("*-00002-of-*.safetensors"))[0]
  shard.unlink()
  with pytest.raises(UserError, match=rf"lacks 1 of .* {shard.name}"):
    load.load_model(tmp_path)
  (tmp_path / f"{FILE}.index.json").write_text("{}")
  with pytest.raises(UserError, match="is no index of shards"):
    load.load_model(tmp_path)


def test_directories_that_are_no_checkpoint(copy, tmp_path):
  with pytest.raises(UserError, match=r"nowhere does not exist"):
    load.load_model(tmp_path / "nowhere")
  with pytest.raises(UserError, match="has no config"):
    load.load_model(tmp_path)
  with pytest.raises(UserError, match="FluxTransformer2DModel"):
    load.load_autoencoder(copy)
  (copy / "config.json").write_text("{")
  with pytest.raises(UserError, match="not valid JSON"):
    load.load_model(copy)
  (copy / "config.json").write_text('{"_class_name": "UNet2DModel"}')
  with pytest.raises(UserError, match="'UNet2DModel' is not a supported"):
    load.load_model(copy)


@pytest.fixture
def pipeline(saved, tmp_path):
  path = tmp_path / "pipeline"
  shutil.copytree(saved, path / "transformer")
  references.autoencoder().save_pretrained(path / "vae")
  (path / "scheduler").mkdir()
  (path / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
  index = {
    "_class_name": "FluxPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_3": [None, None],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
  }
  (path / "model_index.json").write_text(json.dumps(index))
  return path


def test_pipeline_config(pipeline):
  parts = ("transformer", "vae", "scheduler")
  config = load.load_pipeline_config(pipeline, parts)
  assert config.family.class_name == "FluxTransformer2DModel"
  assert config.scheduler == {"shift": 3.0}
  with pytest.raises(UserError) as error:
    load.load_pipeline_config(pipeline)
  for part in ("text_encoder/config.json", "tokenizer_2/tokenizer.json"):
    assert part in str(error.value)
  assert "text_encoder_3" not in str(error.value)
  assert "vae" not in str(error.value).replace(str(pipeline), "")
  weights = pipeline / "vae" / FILE
  weights = weights.rename(weights.with_suffix(".fp16.safetensors"))
  with pytest.raises(
    UserError, match=r"variant vae/.*\.fp16\.saf.*: rename it"
  ):
    load.load_pipeline_config(pipeline, parts)
  weights.unlink()
  with pytest.raises(UserError, match=rf"lacks vae/{FILE}"):
    load.load_pipeline_config(pipeline, parts)
  (pipeline / "model_index.json").write_text('{"_class_name": "NoPipeline"}')
  with pytest.raises(UserError, match="NoPipeline"):
    load.load_pipeline_config(pipeline, parts)
  (pipeline / "model_index.json").unlink()
  with pytest.raises(UserError, match="has no model_index"):
    load.load_pipeline_config(pipeline, parts)


@pytest.mark.parametrize(
  ("key", "value", "fine"),
  [
    ("transformer_2", ["diffusers", "WanTransformer3DModel"], [None, None]),
    ("boundary_ratio", 0.875, None),
    ("boundary_ratio", 0.0, None),
    ("expand_timesteps", True, False),
  ],
)
def test_pipelines_of_several_denoisers(pipeline, key, value, fine):
  parts = ("transformer", "vae", "scheduler")
  file = pipeline / "model_index.json"
  index = json.loads(file.read_text())
  file.write_text(json.dumps(index | {key: fine}))
  load.load_pipeline_config(pipeline, parts)
  file.write_text(json.dumps(index | {key: value}))
  with pytest.raises(UserError, match=f"{key}=.*not supported") as error:
    load.load_pipeline_config(pipeline, parts)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("shard_bytes", [export.MAX_SHARD_BYTES, 100_000])
def test_diffusers_loads_what_we_save(reference, saved, tmp_path, shard_bytes):
  model = load.load_model(saved)
  raw = model.family.config_dict(model.config)
  out = tmp_path / "out"
  export.save_module(out, model.params, raw, max_shard_bytes=shard_bytes)
  assert (out / f"{FILE}.index.json").exists() == (shard_bytes == 100_000)
  again, problems = FluxTransformer2DModel.from_pretrained(
    out, output_loading_info=True
  )
  assert not any(problems.values())
  expected = reference.state_dict()
  actual = again.state_dict()
  assert actual.keys() == expected.keys()
  for name, tensor in actual.items():
    torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_a_shard_is_written_as_soon_as_it_is_full(saved, tmp_path, monkeypatch):
  made, held, to_tensors, save = [], [], export._to_tensors, export._save

  def count(*args):
    for name, tensor in to_tensors(*args):
      made.append(tensor.nbytes)
      yield name, tensor

  def look(file, tensors):
    held.append((sum(made), sum(t.nbytes for t in tensors.values())))
    save(file, tensors)

  monkeypatch.setattr(export, "_to_tensors", count)
  monkeypatch.setattr(export, "_save", look)
  model = load.load_model(saved)
  raw = model.family.config_dict(model.config)
  limit = 100_000
  export.save_module(tmp_path / "o", model.params, raw, max_shard_bytes=limit)
  written = 0
  assert len(held) > 2
  for total, size in held:
    assert total - written - size <= max(made)  # one more, that did not fit
    written += size
  assert written == sum(made)
  assert not list((tmp_path / "o").glob("*.part"))


def test_autoencoder_round_trip(tmp_path):
  reference = references.autoencoder(seed=2, use_quant_conv=True)
  reference.save_pretrained(tmp_path / "in")
  model = load.load_autoencoder(tmp_path / "in")
  raw = autoencoder_kl.config_dict(model.config)
  export.save_module(tmp_path / "out", model.params, raw)
  again = AutoencoderKL.from_pretrained(tmp_path / "out")
  expected = reference.state_dict()
  for name, tensor in again.state_dict().items():
    torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
  assert again.config.shift_factor == reference.config.shift_factor
  assert again.config.block_out_channels == [8, 16]


def test_pipeline_export_replaces_the_transformer_alone(pipeline, tmp_path):
  params = jax.tree.map(lambda x: x * 2, load.load_model(pipeline).params)
  out = tmp_path / "deep" / "out"
  (pipeline / "README.md").write_text("# A pipeline")
  (pipeline / "LICENSE").write_text("free")
  (pipeline / "tokenizer_2" / "templates").mkdir(parents=True)
  (pipeline / "tokenizer_2" / "templates" / "one.jinja").write_text("{}")
  wanted = sorted(p.relative_to(pipeline) for p in pipeline.rglob("*"))
  for name in (
    "flux1-dev.safetensors",
    ".git/HEAD",
    ".gitattributes",
    "run/config.json",
    f"vae/{FILE.replace('.', '.fp16.')}",
    "vae/diffusion_pytorch_model.bin",
    "transformer/single_file.safetensors",
  ):
    (pipeline / name).parent.mkdir(exist_ok=True)
    (pipeline / name).write_text("{}")
  (pipeline / "log.txt").write_bytes(bytes(2**20 + 1))
  export.export_pipeline(pipeline, out, params)
  assert sorted(p.relative_to(out) for p in out.rglob("*")) == wanted
  assert (out / "vae" / FILE).read_bytes() == (
    pipeline / "vae" / FILE
  ).read_bytes()
  before = load_file(pipeline / "transformer" / FILE)
  after = load_file(out / "transformer" / FILE)
  np.testing.assert_array_equal(after[TENSOR], 2 * before[TENSOR])

  with pytest.raises(UserError, match="not empty"):
    export.export_pipeline(pipeline, out, params)
  assert list(out.parent.iterdir()) == [out]


def test_what_lies_beside_the_components_is_not_the_checkpoint(pipeline):
  before = load.fingerprint(pipeline)
  for name in ("run", "embeddings", "export"):
    (pipeline / name).mkdir()
    (pipeline / name / "config.json").write_text("{}")
    (pipeline / name / "x.safetensors").write_bytes(b"1")
  for name in (
    "flux1-dev.safetensors",
    "notes.json",
    f"vae/{FILE.replace('.', '.fp16.')}",
    f"vae/{FILE}.index.fp16.json",
    "transformer/single_file.safetensors",
    "transformer/.cache.json",
  ):
    (pipeline / name).write_text("{}")
  assert load.fingerprint(pipeline) == before
  for file in ("vae/config.json", f"vae/{FILE}", "model_index.json"):
    content = (pipeline / file).read_bytes()
    (pipeline / file).write_bytes(content + b"\n")
    assert load.fingerprint(pipeline) != before
    (pipeline / file).write_bytes(content)
  (pipeline / "text_encoder").mkdir()  # in the index
  (pipeline / "text_encoder" / "model.safetensors").write_bytes(b"1")
  assert load.fingerprint(pipeline) != before
  with pytest.raises(UserError, match="no_file does not exist"):
    load.fingerprint(pipeline, "no_file")
  with pytest.raises(UserError, match=r"run.* has no \.safetensors file"):
    (pipeline / "run" / "x.safetensors").unlink()
    load.fingerprint(pipeline, pipeline / "run")


def test_merging_keeps_the_dtypes_of_the_checkpoint(pipeline, tmp_path):
  """Of a float32 checkpoint that is computed in bfloat16, in parts of both."""
  key, value = TENSOR, TENSOR.replace("to_q", "to_v")
  plain = TENSOR.replace("attn.to_q", "ff.net.2")

  def round_some(tensors):
    for name in (value, plain):
      tensors[name] = tensors[name].astype(jnp.bfloat16)

  edit(pipeline / "transformer", round_some)
  mesh = mesh_lib.make_mesh(dict(fsdp=4), jax.devices()[:4])
  model = load.load_model(
    pipeline, dtype="bfloat16", mesh=mesh, rules=rules.TRAINER
  )
  model = lora.adapt(
    model, rank=3, alpha=5.0, targets=("attn",), key=jax.random.key(0)
  )
  # An update far below the rounding of the kernels it is added to.
  params = jax.tree.map_with_path(
    lambda path, x: x + 1e-4 if path[-1].key == "lora_b" else x, model.params
  )
  adapters.merge_pipeline(pipeline, tmp_path / "out", params, alpha=5.0)
  before, after = (
    safetensors.list_tensors(path / "transformer")
    for path in (pipeline, tmp_path / "out")
  )
  assert before.keys() == after.keys()
  for name, tensor in after.items():
    assert tensor.dtype == before[name].dtype
    if ".attn." not in name or "weight" not in name or "norm" in name:
      np.testing.assert_array_equal(tensor.view(), before[name].view())
  assert before[value].dtype == before[plain].dtype == jnp.bfloat16
  layer = params["double_blocks"]["attn"]
  for name, leaf in ((key, layer["to_q"]), (value, layer["to_v"])):
    a, b = (np.asarray(leaf[x][1], float) for x in ("lora_a", "lora_b"))
    old, new = (np.asarray(x[name].view(), float) for x in (before, after))
    expected = old + 5 / 3 * (a @ b).T
    rounding = 1e-7 if name == key else 2**-8
    np.testing.assert_allclose(new, expected, rtol=rounding, atol=1e-9)
  # The update of the float32 kernel is all there.
  old, new = (np.asarray(x[key].view(), float) for x in (before, after))
  assert 1e-5 < np.abs(new - old).max() < 2e-3


def test_adapters_of_another_checkpoint_are_not_merged(pipeline, tmp_path):
  model = load.load_model(pipeline)
  model = lora.adapt(
    model, rank=3, alpha=5.0, targets=("proj_out",), key=jax.random.key(0)
  )
  edit(pipeline / "transformer", lambda t: t.pop("proj_out.weight"))
  with pytest.raises(UserError, match="lacks proj_out, which have adapters"):
    adapters.merge_pipeline(pipeline, tmp_path / "o", model.params, alpha=5.0)
  assert not (tmp_path / "o").exists()


def test_what_was_not_trained_is_as_in_the_source(pipeline, tmp_path):
  params = load.load_model(pipeline).params
  params["proj_out"]["bias"] = jax.ShapeDtypeStruct(
    params["proj_out"]["bias"].shape, jnp.float32
  )

  def halve(tensors):
    tensors["proj_out.bias"] = tensors["proj_out.bias"].astype(np.float16)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].astype(np.float16)

  edit(pipeline / "transformer", halve)
  export.export_pipeline(pipeline, tmp_path / "out", params)
  before, after = (
    load_file(path / "transformer" / FILE)
    for path in (pipeline, tmp_path / "out")
  )
  assert before.keys() == after.keys()
  assert after["proj_out.bias"].dtype == np.float16
  np.testing.assert_array_equal(after["proj_out.bias"], before["proj_out.bias"])
  assert after["proj_out.weight"].dtype == np.float32  # as it was trained


def test_failed_export_leaves_nothing(pipeline, tmp_path):
  def tensors():
    yield "x", np.ones(3, np.float32)
    raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    export.write_pipeline(pipeline, tmp_path / "new" / "out", tensors())
  assert list((tmp_path / "new").iterdir()) == []
  params = load.load_model(pipeline).params
  (pipeline / "transformer" / "config.json").write_text(
    '{"_class_name": "UNet2DModel"}'
  )
  with pytest.raises(UserError, match="UNet2DModel"):
    export.export_pipeline(pipeline, tmp_path / "new" / "out", params)
  assert list((tmp_path / "new").iterdir()) == []


def test_where_an_export_can_be_written(tmp_path, monkeypatch):
  """Through links, into what is empty; a mount point shows at once."""
  (tmp_path / "disk" / "empty").mkdir(parents=True)
  for name, target in (("link", "disk/empty"), ("dangling", "disk/new")):
    (tmp_path / name).symlink_to(target)
    with export.fresh_directory(tmp_path / name) as temporary:
      (temporary / "file").touch()
    assert (tmp_path / name).is_symlink()
    assert (tmp_path / target / "file").exists()
  assert len(list((tmp_path / "disk").iterdir())) == 2
  (tmp_path / "mounted").mkdir()
  mounts = [tmp_path / "mounted"]
  monkeypatch.setattr(Path, "is_mount", lambda path: path in mounts)
  with pytest.raises(UserError, match=r"mount point.*directory inside it"):
    export.check_fresh(tmp_path / "mounted")
  export.check_fresh(tmp_path / "mounted" / "export")
