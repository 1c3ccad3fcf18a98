"""Configs: conversion and checks."""

import importlib
import math
import pathlib

import pytest

from digen_jax.assemble import workload
from digen_jax.config import (
  Config,
  Mesh,
  default_config,
  from_config_dict,
  to_dict,
)
from digen_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def test_defaults_round_trip():
  assert from_config_dict(default_config()) == Config()
  assert from_config_dict(to_dict(Config())) == Config()


def test_a_typo_in_a_file_is_an_error():
  config = default_config()
  with pytest.raises(AttributeError, match="group_size"):
    config.batch.grup_size = 3


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"sed": 1}, r"config\.sed: did you mean config\.seed\?"),
    (
      {"batch": {"grup_size": 4}},
      r"config\.batch\.grup_size: did you mean config\.batch\.group_size\?",
    ),
    ({"batch": 3}, "is a section with fields prompts, group_size"),
    ({"steps": "many"}, "takes a value of type int; got 'many'"),
    ({"steps": True}, "type int; got True"),
    ({"steps": 0}, "must be at least 1"),
    ({"batch": {"group_size": 1}}, "group_size must be at least 2"),
    ({"sampling": {"kernel": "sde"}}, "must be one of 'flow_sde'"),
    ({"sampling": {"noise_level": 0.0}}, "noise_level must be positive"),
    ({"sampling": {"window": 10}}, "does not fit"),
    ({"sampling": {"window": 3, "window_first": 2}}, "does not fit"),
    ({"sampling": {"window_first": 10}}, "never trained"),
    ({"sampling": {"window": 0, "window_first": 2}}, r"window=0 \(0 is all\)"),
    (
      {"sampling": {"kernel": "flow_cps", "noise_level": 1.2}},
      "noise_level is the share .* at most 1; got 1.2",
    ),
    ({"seed": -1}, r"config\.seed must be from 0 to 2\*\*32 - 1; got -1"),
    ({"seed": 2**32}, r"config\.seed must be from 0"),
    ({"eval": {"batch_size": -1}}, r"eval\.batch_size must be at least 0"),
    ({"advantage": {"eps": -1.0}}, r"advantage\.eps must be in \[0, inf\)"),
    ({"advantage": {"ddof": -1}}, r"advantage\.ddof must be at least 0"),
    ({"advantage": {"clip": math.nan}}, "clip must be positive and finite"),
    ({"train": {"kl_weight": -0.1}}, r"kl_weight must be in \[0, inf\)"),
    ({"train": {"kl_weight": math.nan}}, r"kl_weight .*; got nan"),
    ({"train": {"weight_decay": -0.1}}, "weight_decay must be in"),
    ({"train": {"weight_decay": math.inf}}, "weight_decay .*; got inf"),
    ({"train": {"adam_b1": 1.0}}, r"adam_b1 must be in \[0, 1\); got 1"),
    ({"train": {"adam_b2": -0.1}}, r"adam_b2 must be in \[0, 1\)"),
    ({"train": {"adam_eps": -1e-8}}, "adam_eps must be in"),
    ({"train": {"learning_rate": math.inf}}, "learning_rate must be positive"),
    ({"train": {"kl_form": "exact"}}, "kl_form must be one of 'auto', 'diff"),
    ({"train": {"updates_per_batch": 3}}, "does not divide"),
    ({"train": {"ema_decay": 1.0}}, r"in \[0, 1\)"),
    ({"train": {"lora_targets": "q"}}, "takes a list of strings"),
    (
      {"train": {"lora_rank": 4, "lora_targets": ("*attn",)}},
      r"'\*attn' is no regular expression",
    ),
    ({"train": {"lora_rank": 4, "lora_targets": ()}}, "lora_targets is empty"),
    ({"pipeline": {"generate_size": 3}}, "must divide the group size 8"),
    ({"pipeline": {"train_size": 12}}, "or be a multiple of it"),
    ({"dtype": {"compute": "float16"}}, "must be one of"),
    ({"vae": {"sequential": "no"}}, "one of 'videos', 'always', 'never'"),
    ({"vae": {"tiling": -8}}, "vae.tiling must be at least 0"),
    ({"sampling": {"guidance_scale": 0}}, "1 is without guidance .*; got 0"),
    ({"sampling": {"guidance_scale": math.nan}}, "positive.*; got nan"),
    (
      {"sampling": {"embedded_guidance": -1}},
      r"embedded_guidance must be in \[0",
    ),
    ({"advantage": {"ddof": 8}}, "less than config.batch.group_size=8"),
    ({"pipeline": {"reward_timeout": -1}}, r"reward_timeout must be in \[0"),
  ],
)
def test_bad_values_say_what_is_wrong(values, words):
  with pytest.raises(UserError, match=words):
    from_config_dict(values)


def test_meshes_as_flags_give_them():
  mesh = {"rollout": "{'data': 2, 'tensor': 2}", "trainer": "6"}
  config = from_config_dict({"mesh": mesh})
  assert config.mesh == Mesh({"data": 2, "tensor": 2}, 6)
  assert from_config_dict({"mesh": {"trainer": "auto"}}).mesh == Mesh()


def test_integers_stand_for_floats():
  config = from_config_dict({"train": {"learning_rate": 1}})
  assert config.train.learning_rate == 1.0
  assert isinstance(config.train.learning_rate, float)


@pytest.mark.parametrize(
  "file", sorted(CONFIGS.glob("*.py")), ids=lambda f: f.stem
)
def test_every_config_is_one(file):
  module = importlib.import_module(f"configs.{file.stem}")
  if hasattr(module, "get_config") and "pretrain" not in file.stem:
    config = from_config_dict(module.get_config())
    assert config.steps > 0
    assert workload(config).samples >= 64


def test_stale_units_are_at_most_the_part_that_may_be():
  def stale(prompts, tcss):
    config = {"batch": {"prompts": prompts}, "pipeline": {"tcss": tcss}}
    return workload(from_config_dict(config)).stale

  assert [stale(n, 0.5) for n in (2, 3, 7)] == [1, 1, 3]
  assert (stale(10, 0.3), stale(3, 1.0), stale(5, 0.1)) == (3, 3, 0)
  assert 100 * 0.29 < 29 == stale(100, 0.29)  # but for rounding
