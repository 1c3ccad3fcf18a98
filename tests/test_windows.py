"""Where the window of trained steps lies."""

import dataclasses

import jax
import numpy as np
import pytest

import digen_jax as dj
from digen_jax.policy import Recipe


def test_starts_are_uniform_over_all_that_fit():
  keys = jax.random.split(jax.random.key(0), 3000)
  starts = jax.jit(jax.vmap(lambda key: dj.window_start(key, 10, 2, 5)))(keys)
  assert starts.dtype == np.int32
  values, counts = np.unique(starts, return_counts=True)
  np.testing.assert_array_equal(values, [0, 1, 2, 3])
  assert np.all(np.abs(counts - 750) < 120)


def test_by_default_everything_but_the_last_step():
  keys = jax.random.split(jax.random.key(0), 300)
  starts = jax.vmap(lambda key: dj.window_start(key, 6, 2))(keys)
  assert set(np.asarray(starts).tolist()) == {0, 1, 2, 3}  # 3 trains 3 and 4


def test_a_window_with_one_place_stays_there():
  assert int(dj.window_start(jax.random.key(5), 8, 3, 3)) == 0


def test_progressive():
  starts = [
    int(dj.progressive_window_start(step, 7, 3, every=2)) for step in range(10)
  ]
  assert starts == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
  starts = [
    int(dj.progressive_window_start(step, 8, 3, every=1, stride=3))
    for step in range(4)
  ]
  assert starts == [0, 3, 0, 3]
  traced = jax.jit(lambda s: dj.progressive_window_start(s, 7, 3, every=2))(5)
  assert int(traced) == 2 and traced.dtype == np.int32


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((8, 6, 5), "6 steps do not fit in the first 5 of 8"),
    ((8, 0, 5), "0 steps do not fit"),
    ((8, 2, 8), "never the last"),
    ((1, 1), "1 sampling steps"),
  ],
)
def test_windows_that_do_not_fit(arguments, message):
  with pytest.raises(dj.UserError, match=message):
    dj.check_window(*arguments)
  with pytest.raises(dj.UserError):
    dj.window_start(jax.random.key(0), *arguments)


def test_check_returns_the_resolved_range():
  assert dj.check_window(8, 2) == 7
  assert dj.check_window(8, 2, 5) == 5


def test_step_weights_follow_the_noise_of_the_steps():
  recipe = Recipe(*[None] * len(dataclasses.fields(Recipe)))
  sigmas = np.linspace(1, 0, 9).astype(np.float32)
  recipe = dataclasses.replace(
    recipe, sigmas=sigmas, kernel_name="flow_sde", noise_level=0.9
  )
  weights = recipe.step_weights(5)
  assert weights[:5].mean() == pytest.approx(1)
  # Flow-GRPO, eq. 9: the std is a sqrt(s / (1 - s) (s - s_next)).
  s, rest = 0.75, 0.5
  std = [0.9 * np.sqrt(level / (1 - level) * 0.125) for level in (s, rest)]
  assert weights[2] / weights[4] == pytest.approx(std[0] / std[1], rel=1e-5)
