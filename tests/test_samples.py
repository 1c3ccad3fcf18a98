"""The samples of a step: which advantages are known when."""

import jax
import numpy as np
import pytest

from digen_jax.config import Advantage
from digen_jax.grpo.windows import window_start
from digen_jax.pipeline.units import Kind, Unit, Workload
from digen_jax.rewards.compose import Scores
from digen_jax.samples import BLOCK, WINDOW_STREAM, Samples, window_starts


def samples(scope="group"):
  work = Workload(groups=2, group_size=4, window=2, scope=scope)
  return Samples(3, work, ["a", "b"], np.arange(2), np.zeros(2), ["r"])


def take(found, start, rewards, scope="group"):
  values = np.asarray(rewards, np.float32)
  unit = Unit(Kind.SCORE, 3, start, start + len(rewards))
  return found.take(
    unit, Scores(values, {"r": 2 * values}), Advantage(scope=scope)
  )


def test_a_group_has_advantages_with_its_last_reward():
  found = samples()
  assert take(found, 0, [1, 2]) == frozenset()
  assert np.isnan(found.advantages).all()
  take(found, 2, [3, 4])
  assert (np.diff(found.advantages[:4]) > 0).all()
  assert found.advantages[:4].sum() == pytest.approx(0, abs=1e-6)
  assert np.isnan(found.advantages[4:]).all()
  np.testing.assert_array_equal(found.parts["r"][:4], [2, 4, 6, 8])


def test_groups_without_differences_are_dead_once_they_are_whole():
  found = samples()
  assert take(found, 4, [5, 5]) == frozenset()
  assert take(found, 6, [5, 5]) == {1}
  assert take(found, 0, [1, 2, 3, 4]) == frozenset()
  assert found.dead(range(2)) == {1}


def test_a_global_scope_waits_for_every_group():
  found = samples("global")
  take(found, 4, [0, 10, 0, 10], "global")
  assert np.isnan(found.advantages).all()
  assert take(found, 0, [1, 1, 1, 1], "global") == {0}
  # One deviation for all: small differences weigh less than large ones.
  assert found.advantages[5] > 1 > abs(found.advantages[0])


def test_windows_are_drawn_by_seed_step_and_group():
  window = (10, 2, 9)
  first = window_starts(0, 5, 64, window)
  np.testing.assert_array_equal(first, window_starts(0, 5, 64, window))
  np.testing.assert_array_equal(first[:8], window_starts(0, 5, 8, window))
  for step in (6, BLOCK + 5):
    assert (first != window_starts(0, step, 64, window)).any()
  assert (first != window_starts(1, 5, 64, window)).any()
  # As each is defined, whichever others are drawn with it.
  key = jax.random.fold_in(jax.random.key(0), WINDOW_STREAM)
  for step, group in ((5, 3), (2 * BLOCK + 7, 11)):
    one = jax.random.fold_in(jax.random.fold_in(key, step), group)
    drawn = window_starts(0, step, 64, window)[group]
    assert drawn == window_start(one, *window)
  assert first.min() == 0
  assert first.max() == 7
