"""UniPC against diffusers' scheduler, and against what it must be exact for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digen_jax.errors import UserError
from digen_jax.sampling import sample_unipc, sigma_schedule, unipc

LATENTS = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def apply(params, x, sigma, conditioning):
  """A velocity that bends: what order and corrector do shows."""
  del params, conditioning
  time = 2.5 * sigma.reshape((-1,) + (1,) * (x.ndim - 1))
  return jnp.tanh(0.7 * x) + 0.3 * jnp.sin(2.0 * x + time)


def reference(num_steps, shift):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.UniPCMultistepScheduler(
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=shift,
  )
  scheduler.set_timesteps(num_steps)
  x, states = torch.from_numpy(LATENTS), []
  for t in scheduler.timesteps:
    sigma = np.full(len(LATENTS), float(t) / 1000, np.float32)
    v = np.array(apply(None, jnp.asarray(x.numpy()), sigma, None))
    x = scheduler.step(torch.from_numpy(v), t, x).prev_sample
    states.append(x.numpy())
  return np.stack(states), scheduler.sigmas.numpy()


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 25])
def test_every_step_is_that_of_diffusers(num_steps, shift):
  states, sigmas = reference(num_steps, shift)
  ours = sigma_schedule("wan", num_steps, shift=shift)
  np.testing.assert_array_equal(ours, sigmas)
  run = jax.jit(lambda x: sample_unipc(apply, None, x, None, ours, record=True))
  np.testing.assert_allclose(run(LATENTS), states, atol=5e-6)
  last = sample_unipc(apply, None, LATENTS, None, ours)
  np.testing.assert_allclose(last, states[-1], atol=5e-6)


def test_steps_keep_a_state_on_its_line():
  """While the predicted x0 stays the same, x = (1 - sigma) x0 + sigma noise."""
  sigmas = sigma_schedule("wan", 6)
  table = unipc.coefficients(sigmas)
  for i, row in enumerate(table.predict):
    kept = row[0] * (1 - sigmas[i]) + row[1:].sum()
    assert kept == pytest.approx(1 - sigmas[i + 1], abs=1e-6)
    assert row[0] * sigmas[i] == pytest.approx(sigmas[i + 1], abs=1e-6)
  for i, row in enumerate(table.correct[1:], start=1):
    kept = row[1] * (1 - sigmas[i - 1]) + row[2:].sum()
    assert kept == pytest.approx(1 - sigmas[i], abs=1e-6)
    assert row[1] * sigmas[i - 1] == pytest.approx(sigmas[i], abs=1e-6)


def test_a_schedule_that_starts_at_one_is_refused():
  with pytest.raises(UserError, match="start below 1"):
    unipc.coefficients(np.array([1.0, 0.5, 0.0]))
