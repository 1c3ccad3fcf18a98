"""Meshes, rules, resharding."""

import platform
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from digen_jax.errors import UserError
from digen_jax.lanes import check_lanes, divide
from digen_jax.parallel import rules
from digen_jax.parallel.mesh import (
  batch_shards,
  make_mesh,
  make_meshes,
  padded_size,
)
from digen_jax.parallel.reshard import check, checksums, reshard


@pytest.mark.parametrize(
  ("rollout", "trainer", "counts"),
  [
    (1, 1, (1, 1)),
    (2, 6, (2, 6)),
    (5, 3, (5, 3)),
    ("auto", 3, (5, 3)),
    ("auto", "auto", (4, 4)),
    ({"data": 2, "tensor": 2}, {"fsdp": 4}, (4, 4)),
    ([1, {"data": 2, "tensor": 2}], 3, (1, 4, 3)),
    (["auto", "auto", 1], 3, (2, 2, 1, 3)),
    (["auto", "auto"], 3, (2, 3, 3)),
    (["auto", "auto"], "auto", (2, 2, 4)),
    ([5], 3, (5, 3)),
  ],
)
def test_disaggregated_meshes_are_disjoint(rollout, trainer, counts):
  meshes = make_meshes("disaggregated", rollout, trainer)
  assert tuple(m.size for m in meshes.values()) == counts
  *rollouts, last = meshes
  names = [f"rollout{i}" for i in range(len(rollouts))]
  assert last == "trainer"
  assert rollouts == (names if len(rollouts) > 1 else ["rollout"])
  ids = [d.id for m in meshes.values() for d in m.devices.flat]
  assert len(ids) == len(set(ids))


FAULTS = """
import resource, sys
import numpy as np
from digen_jax.parallel.allocator import keep_freed_memory
if sys.argv[1] == "keep":
  keep_freed_memory()
np.ones(5_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
  np.ones(5_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_kept():
  """Else every array of 40 MB has its pages anew."""
  faults = {
    what: int(subprocess.check_output([sys.executable, "-c", FAULTS, what]))
    for what in ("keep", "leave")
  }
  assert faults["keep"] < 100 < faults["leave"]


def test_samples_are_divided_by_devices():
  assert divide(9, {"a": 2, "b": 4}) == {"a": range(3), "b": range(3, 9)}
  assert divide(1, {"a": 1, "b": 3}) == {"b": range(1)}
  for count in range(20):
    parts = divide(count, {"a": 3, "b": 1, "c": 4})
    assert [i for part in parts.values() for i in part] == list(range(count))


def test_colocated_mesh_has_the_devices_of_both():
  (mesh,) = make_meshes("colocated", 5, 3).values()
  assert mesh.size == 8
  (mesh,) = make_meshes("colocated", "auto", "auto").values()
  assert mesh.size == 8


@pytest.mark.parametrize(
  ("rollout", "trainer", "words"),
  [
    (4, 5, "asks for 4 .rollout. . 5 .trainer. devices, but there are 8"),
    (8, "auto", "left without a device"),
    (0, 1, "positive integer; got 0"),
    ({"dta": 2}, 1, "no axis 'dta'"),
    ("half", 1, "device count, axis sizes"),
    ({"data": 2.0}, 1, "positive integer"),
    ([], 1, r"or a list of these\); got \[\]"),
    ([2, "half"], 1, "device count, axis sizes .* got 'half'"),
    ([2, 4], 3, "2 .rollout0. . 4 .rollout1. . 3 .trainer. devices, but"),
    (1, [2], "'auto'; got"),
  ],
)
def test_impossible_meshes_say_so(rollout, trainer, words):
  with pytest.raises(UserError, match=words):
    make_meshes("disaggregated", rollout, trainer)


def test_colocated_tensor_axis_must_divide():
  with pytest.raises(UserError, match="does not divide"):
    make_meshes("colocated", 3, {"tensor": 2})


def test_padding():
  mesh = make_mesh({"data": 5}, jax.devices()[:5])
  assert batch_shards(mesh) == 5
  assert [padded_size(n, mesh) for n in (1, 5, 16)] == [5, 5, 20]


def spec(axes, shape, table, **sizes):
  count = int(np.prod(list(sizes.values())))
  mesh = make_mesh(sizes, jax.devices()[:count])
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  tree = rules.param_shardings(mesh, {"w": axes}, {"w": leaf}, table)
  return tree["w"].spec


def test_rules():
  kernel = ("layers", "embed", "mlp")
  trainer, rollout = rules.TRAINER, rules.ROLLOUT
  assert spec(kernel, (3, 8, 16), trainer, fsdp=4) == P(None, "fsdp", None)
  assert spec(kernel, (3, 8, 16), rollout, data=4) == P(None, None, None)
  both = spec(kernel, (3, 8, 16), trainer, fsdp=2, tensor=2)
  assert both == P(None, "fsdp", "tensor")
  # A size that fsdp does not divide is stored elsewhere, or whole.
  assert spec(kernel, (3, 8, 15), trainer, fsdp=3) == P(None, None, "fsdp")
  assert spec(kernel, (3, 8, 16), trainer, fsdp=3) == P(None, None, None)
  assert spec((None,), (7,), trainer, fsdp=2) == P(None)
  # Gradients on their way are split over all devices of a mesh.
  assert spec(kernel, (3, 8, 16), rules.PARTS, data=4) == P(None, "data", None)
  every = spec(kernel, (3, 8, 16), rules.PARTS, data=2, fsdp=2)
  assert every == P(None, "fsdp", "data")


def test_tensor_axis_must_divide():
  with pytest.raises(UserError, match=r"tensor axis.*does not divide.*'mlp'"):
    spec(("embed", "mlp"), (8, 10), rules.ROLLOUT, tensor=4)


def test_tensor_axis_must_not_cut_heads():
  mesh = make_mesh({"tensor": 8}, jax.devices())
  rules.check_heads(mesh.shape, 24, "FLUX")
  # 12 heads of 128 features: 8 divides the features, not the heads.
  with pytest.raises(UserError, match=r"8, .* 12 attention heads.* axis of 4"):
    rules.check_heads(mesh.shape, 12, "Wan")


def test_sequence_axis_must_divide_tokens():
  class_name = types.SimpleNamespace(class_name="FLUX")
  config = types.SimpleNamespace(num_attention_heads=24)
  assembly = types.SimpleNamespace(
    model=types.SimpleNamespace(config=config, family=class_name),
    recipe=types.SimpleNamespace(latent_shape=(128, 128, 16)),
  )
  check_lanes({"rollout": {"data": 2, "sequence": 4}}, assembly)
  with pytest.raises(UserError, match=r"6, does not divide the 4096.* as 2,"):
    check_lanes({"rollout": {"sequence": 6}}, assembly)


def tree():
  key = jax.random.key(0)
  return {
    "a": jax.random.normal(key, (30, 8)),
    "b": {"c": jnp.arange(24, dtype=jnp.int32), "d": jnp.float32(3.5)},
    "e": jax.random.normal(key, (30, 4)).astype(jnp.bfloat16),
  }


def layouts(mesh):
  axes = {
    "a": ("embed", "mlp"),
    "b": {"c": ("embed",), "d": ()},
    "e": ("embed", None),
  }
  return rules.param_shardings(mesh, axes, tree(), rules.TRAINER)


@pytest.mark.parametrize(("left", "right"), [(1, 1), (2, 6), (5, 3), (4, 4)])
def test_reshard_is_exact_and_verified(left, right):
  devices = jax.devices()
  source = layouts(make_mesh({"fsdp": left}, devices[:left]))
  target = layouts(make_mesh({"fsdp": right}, devices[left : left + right]))
  sent = reshard(tree(), source)
  got = reshard(sent, target)
  jax.tree.map(np.testing.assert_array_equal, got, tree())
  assert jax.tree.map(lambda x: x.sharding, got) == target
  check(checksums(sent), checksums(got))


def test_verify_finds_any_change():
  good = tree()
  for change in (
    {"a": good["a"].at[3, 4].add(1e-7)},
    {"a": good["a"][::-1]},
    {"a": jnp.roll(good["a"], 1, axis=1)},
    {"b": {"c": good["b"]["c"]}},
    {"e": jnp.zeros_like(good["e"])},
  ):
    with pytest.raises(RuntimeError, match="weight publish failed"):
      check(checksums(good), checksums({**good, **change}))
  assert len(checksums(good)) == 4
