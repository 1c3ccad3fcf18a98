"""Schedules against diffusers' own schedulers, built live."""

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from digen_jax import UserError, schedule_from_config, sigma_schedule

STEPS = (1, 2, 6, 10, 28, 50)
FLUX = dict(shift=3.0, use_dynamic_shifting=True)
QWEN = dict(
  use_dynamic_shifting=True,
  max_shift=0.9,
  max_image_seq_len=8192,
  shift_terminal=0.02,
)


def linear_mu(seq_len, base=0.5, top=1.15, first=256, last=4096):
  slope = (top - base) / (last - first)
  return seq_len * slope + base - slope * first


def euler(num_steps, *, explicit=True, mu=None, **config):
  scheduler = FlowMatchEulerDiscreteScheduler(**config)
  if explicit:
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
  else:
    scheduler.set_timesteps(num_steps)
  return scheduler.sigmas.numpy()


@pytest.mark.parametrize("size", [(256, 256), (512, 768), (1024, 1024)])
@pytest.mark.parametrize("n", STEPS)
def test_flux_is_that_of_diffusers(n, size):
  height, width = size
  mu = linear_mu((height // 16) * (width // 16))
  np.testing.assert_array_equal(
    sigma_schedule("flux", n, height=height, width=width),
    euler(n, mu=mu, **FLUX),
  )


@pytest.mark.parametrize("side", [384, 512, 1328])
@pytest.mark.parametrize("n", STEPS[1:])
def test_qwen_image_is_that_of_diffusers(n, side):
  mu = linear_mu((side // 16) ** 2, top=0.9, last=8192)
  ours = sigma_schedule("qwen-image", n, height=side, width=side)
  np.testing.assert_array_equal(ours, euler(n, mu=mu, **QWEN))
  assert ours[-2] == pytest.approx(0.02, abs=1e-7)


@pytest.mark.parametrize("n", STEPS)
def test_static_shifts_are_those_of_diffusers(n):
  np.testing.assert_array_equal(
    sigma_schedule("flux-schnell", n), euler(n, shift=1.0)
  )
  np.testing.assert_array_equal(
    sigma_schedule("hunyuan-video", n), euler(n, shift=7.0)
  )
  np.testing.assert_array_equal(
    sigma_schedule("hunyuan-video", n, shift=5.0), euler(n, shift=5.0)
  )
  np.testing.assert_array_equal(
    sigma_schedule("sd3", n), euler(n, explicit=False, shift=3.0)
  )


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("n", STEPS)
def test_wan_is_that_of_diffusers(n, shift):
  scheduler = UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
  )
  scheduler.set_timesteps(n)
  ours = sigma_schedule("wan", n, shift=shift)
  np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=1e-7)
  assert ours[0] == np.float32(0.999999)


def test_known_values():
  sd3 = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151]
  sd3 += [0.464876, 0.278049, 0.008929, 0]  # shifted twice
  np.testing.assert_allclose(sigma_schedule("sd3", 10), sd3, atol=5e-7)
  flux = [1, 0.903736, 0.789705, 0.652489, 0.484218, 0.273003, 0]
  ours = sigma_schedule("flux", 6, height=512, width=512)
  np.testing.assert_allclose(ours, flux, atol=5e-7)
  ours = sigma_schedule("dance", 16, shift=3)
  assert ours[1] == pytest.approx(3 * (15 / 16) / (1 + 2 * (15 / 16)), abs=1e-7)
  assert ours.shape == (17,) and ours[0] == 1 and ours[-1] == 0


@pytest.mark.parametrize(
  "family", ["flux", "flux-schnell", "qwen-image", "wan", "sd3", "dance"]
)
def test_every_schedule_falls_from_one_to_zero(family):
  sigmas = sigma_schedule(family, 8, height=512, width=512, shift=2.0)
  assert sigmas.dtype == np.float32 and sigmas.shape == (9,)
  assert np.all(np.diff(sigmas) < 0)
  assert sigmas[0] == pytest.approx(1, abs=2e-6) and sigmas[-1] == 0


def test_shift_replaces_the_resolution():
  by_size = sigma_schedule("flux", 10, height=512, width=512)
  by_shift = sigma_schedule("flux", 10, shift=float(np.exp(0.63)))
  np.testing.assert_allclose(by_shift, by_size, atol=1e-6)


def test_config_of_a_checkpoint():
  config = FlowMatchEulerDiscreteScheduler(**FLUX, base_image_seq_len=16).config
  ours = schedule_from_config(dict(config), 8, seq_len=64)
  mu = linear_mu(64, first=16)
  np.testing.assert_array_equal(ours, euler(8, mu=mu, **FLUX))
  # A pipeline that hands nothing over, dynamic as well.
  scheduler = FlowMatchEulerDiscreteScheduler(
    **FLUX, time_shift_type="linear", shift_terminal=0.1
  )
  scheduler.set_timesteps(8, mu=0.7)
  config = {**scheduler.config, "base_shift": 0.7, "max_shift": 0.7}
  ours = schedule_from_config(config, 8, seq_len=1, base="table")
  np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: sigma_schedule("flux-dev", 8), "did you mean 'flux'"),
    (lambda: sigma_schedule("qwen", 8), "did you mean 'qwen-image'"),
    (lambda: sigma_schedule("sd3", 0), "num_steps must be an integer >= 1"),
    (lambda: sigma_schedule("sd3", 8.5), "num_steps must be an integer"),
    (lambda: sigma_schedule("flux", 8, width=512), "height=None"),
    (lambda: sigma_schedule("flux", 8, height=512, width=8), "width=8"),
    (lambda: sigma_schedule("dance", 8), "needs shift"),
    (lambda: sigma_schedule("wan", 8, shift=0.0), "shift must be positive"),
    (
      lambda: sigma_schedule("qwen-image", 1, height=512, width=512),
      "use num_steps >= 2",
    ),
    (lambda: schedule_from_config(FLUX, 8), "pass seq_len"),
    (
      lambda: schedule_from_config({"use_karras_sigmas": True}, 8),
      "use_karras_sigmas",
    ),
    (
      lambda: schedule_from_config({"_class_name": "DDIMScheduler"}, 8),
      "'DDIMScheduler' is not supported",
    ),
    (
      lambda: schedule_from_config(
        {"_class_name": "UniPCMultistepScheduler"}, 8
      ),
      "use_flow_sigmas=false is not supported; set it to true",
    ),
  ],
)
def test_bad_input_is_told_in_one_line(call, message):
  with pytest.raises(UserError, match=message) as error:
    call()
  assert "\n" not in str(error.value)


EULER_ONLY = [("stochastic_sampling", True), ("invert_sigmas", True)]
BOTH = [
  ("num_train_timesteps", 500),
  ("use_karras_sigmas", True),
  ("use_exponential_sigmas", True),
  ("use_beta_sigmas", True),
]
UNIPC_ONLY = [
  ("solver_order", 3),
  ("solver_type", "bh1"),
  ("predict_x0", False),
  ("disable_corrector", [0]),
  ("lower_order_final", False),
  ("thresholding", True),
  ("prediction_type", "epsilon"),
  ("final_sigmas_type", "sigma_min"),
  ("use_dynamic_shifting", True),
  ("shift_terminal", 0.1),
]


@pytest.mark.parametrize(
  ("scheduler", "key", "value"),
  [
    *((FlowMatchEulerDiscreteScheduler, *kv) for kv in EULER_ONLY + BOTH),
    *((UniPCMultistepScheduler, *kv) for kv in UNIPC_ONLY + BOTH),
  ],
)
def test_what_would_change_the_sampler_is_refused(scheduler, key, value):
  config = dict(scheduler().config) | {"_class_name": scheduler.__name__}
  if scheduler is UniPCMultistepScheduler:
    config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
  assert key in config  # diffusers knows it by this name
  assert schedule_from_config(config, 4).shape == (5,)
  with pytest.raises(UserError, match=f"{key}=.* is not supported; set it"):
    schedule_from_config(config | {key: value}, 4)
