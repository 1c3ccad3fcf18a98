"""How each family's pipeline turns prompts into conditioning.

For every family two pure functions: prompts to tokens, and tokens through the
text encoders to `Conditioning`. They do what `encode_prompt` of diffusers'
pipeline of that family does; a negative prompt is encoded like any other.
"""

import dataclasses
import html
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from digen_jax.data.tokens import Tokenizer, Tokens, logger
from digen_jax.types import Conditioning

CLIP = ("CLIPTextModel", "CLIPTokenizer")
CLIP_PROJECTED = ("CLIPTextModelWithProjection", "CLIPTokenizer")
T5 = ("T5EncoderModel", "T5TokenizerFast")
UMT5 = ("UMT5EncoderModel", "T5TokenizerFast")
QWEN = ("Qwen2_5_VLForConditionalGeneration", "Qwen2Tokenizer")
LLAMA = ("LlamaModel", "LlamaTokenizerFast")

Encoders = Sequence[Callable[..., Any]]  # of ids [B, T] and, most, masks


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One family's way.

  Attributes:
    encoders: text encoders by component name, with the classes of encoder and
      tokenizer; a tokenizer's component has the same number as its encoder's.
    tokenize: `tokenize(tokenizers, prompts, length)` -> `Tokens` per encoder.
    encode: `encode(encoders, tokens)` -> `Conditioning`, pure, float32. The
      encoders take tokens; parameters are bound.
    max_length: tokens that prompts are padded or cut to unless told otherwise;
      those of a template that are dropped do not count.
    template: what is put around each prompt, `{}`; "" for nothing.
    dropped: the template's tokens before the prompt, which are dropped.
    skip_layers: blocks of the first encoder that are not needed.
    optional: an encoder that a pipeline may leave out, as [null, null]; zeros
      as wide as the denoiser takes them then stand for its states.
  """

  encoders: Mapping[str, tuple[str, str]]
  tokenize: Callable[[Sequence[Tokenizer], Sequence[str], int], list[Tokens]]
  encode: Callable[[Encoders, Sequence[Tokens]], Conditioning]
  max_length: int
  template: str = ""
  dropped: int = 0
  skip_layers: int = 0
  optional: str = ""


def tokenize_flux(
  tokenizers: Sequence[Tokenizer], prompts: Sequence[str], length: int
) -> list[Tokens]:
  """CLIP at its full length, T5 at `length`."""
  clip, t5 = tokenizers
  return [clip(prompts, clip.max_length), t5(prompts, length)]


def encode_flux(encoders: Encoders, tokens: Sequence[Tokens]) -> Conditioning:
  """T5's token states, padding attended to, and CLIP's pooled state."""
  (clip, t5), (clip_tokens, t5_tokens) = encoders, tokens
  return Conditioning(
    text=t5(t5_tokens.ids), pooled=clip(clip_tokens.ids).pooled
  )


def tokenize_sd3(
  tokenizers: Sequence[Tokenizer], prompts: Sequence[str], length: int
) -> list[Tokens]:
  """Both CLIPs at the first one's full length, T5 at `length`."""
  clip_l, clip_g, t5 = tokenizers
  full = clip_l.max_length
  return [clip_l(prompts, full), clip_g(prompts, full), t5(prompts, length)]


def encode_sd3(encoders: Encoders, tokens: Sequence[Tokens]) -> Conditioning:
  """Both CLIPs side by side, widened with zeros, then T5's token states.

  Source: Esser et al. 2024 (SD3), section 4.
  """
  clip_l, clip_g, t5 = (
    encode(token.ids) for encode, token in zip(encoders, tokens)
  )
  clips = jnp.concatenate([clip_l.penultimate, clip_g.penultimate], axis=-1)
  missing = t5.shape[-1] - clips.shape[-1]
  clips = jnp.pad(clips, ((0, 0), (0, 0), (0, missing)))
  return Conditioning(
    text=jnp.concatenate([clips, t5], axis=1),
    pooled=jnp.concatenate([clip_l.pooled, clip_g.pooled], axis=-1),
  )


QWEN_TEMPLATE = (
  "<|im_start|>system\nDescribe the image by detailing the color, shape, size, "
  "texture, quantity, text, spatial relationships of the objects and "
  "background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
  "<|im_start|>assistant\n"
)
QWEN_DROPPED = 34


def tokenize_qwen_image(
  tokenizers: Sequence[Tokenizer], prompts: Sequence[str], length: int
) -> list[Tokens]:
  """Prompts in the template, padded to the longest of them."""
  texts = [QWEN_TEMPLATE.format(prompt) for prompt in prompts]
  # A causal model: what is cut off has no part in what is kept.
  return [tokenizers[0](texts, QWEN_DROPPED + length, fill=False)]


def encode_qwen_image(
  encoders: Encoders, tokens: Sequence[Tokens]
) -> Conditioning:
  """States after the last norm, from the prompt on; zeros for padding."""
  (qwen,), (prompt,) = encoders, tokens
  states = qwen(prompt.ids, prompt.mask)[:, QWEN_DROPPED:]
  mask = prompt.mask[:, QWEN_DROPPED:]
  return Conditioning(text=jnp.where(mask[..., None], states, 0.0), mask=mask)


HUNYUAN_TEMPLATE = (
  "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by "
  "detailing the following aspects: 1. The main content and theme of the video."
  "2. The color, shape, size, texture, quantity, text, and spatial "
  "relationships of the objects.3. Actions, events, behaviors temporal "
  "relationships, physical movement changes of the objects.4. background "
  "environment, light, style and atmosphere.5. camera angles, movements, and "
  "transitions used in the video:<|eot_id|><|start_header_id|>user"
  "<|end_header_id|>\n\n{}<|eot_id|>"
)
HUNYUAN_DROPPED = 95
HUNYUAN_CLIP_LENGTH = 77


def tokenize_hunyuan_video(
  tokenizers: Sequence[Tokenizer], prompts: Sequence[str], length: int
) -> list[Tokens]:
  """Llama in the template, `length` tokens from the prompt on; CLIP without."""
  llama, clip = tokenizers
  texts = [HUNYUAN_TEMPLATE.format(prompt) for prompt in prompts]
  return [
    llama(texts, HUNYUAN_DROPPED + length),
    clip(prompts, min(HUNYUAN_CLIP_LENGTH, clip.max_length)),
  ]


def encode_hunyuan_video(
  encoders: Encoders, tokens: Sequence[Tokens]
) -> Conditioning:
  """Llama's states two blocks before its end, and CLIP's pooled state.

  The states of padding are kept as they are: the denoiser gets the mask.
  """
  (llama, clip), (prompt, clip_tokens) = encoders, tokens
  return Conditioning(
    text=llama(prompt.ids, prompt.mask)[:, HUNYUAN_DROPPED:],
    pooled=clip(clip_tokens.ids).pooled,
    mask=prompt.mask[:, HUNYUAN_DROPPED:],
  )


def has_ftfy() -> bool:
  """Whether the package ftfy, which mends broken Unicode, is installed."""
  return importlib.util.find_spec("ftfy") is not None


def clean(prompt: str) -> str:
  """A prompt without HTML entities and runs of blanks; Wan's preparation.

  Where ftfy is installed it also mends the encoding, straightens quotes and
  narrows wide characters.
  """
  if has_ftfy():
    import ftfy

    prompt = ftfy.fix_text(prompt)
  prompt = html.unescape(html.unescape(prompt))
  return re.sub(r"\s+", " ", prompt).strip()


def tokenize_wan(
  tokenizers: Sequence[Tokenizer], prompts: Sequence[str], length: int
) -> list[Tokens]:
  """Cleaned prompts at `length`."""
  if not has_ftfy() and not all(prompt.isascii() for prompt in prompts):
    logger.warning(
      "Wan was trained on text mended by ftfy, which is not installed; prompts "
      "with other than ASCII letters may be read differently: pip install ftfy"
    )
  return [tokenizers[0]([clean(prompt) for prompt in prompts], length)]


def encode_wan(encoders: Encoders, tokens: Sequence[Tokens]) -> Conditioning:
  """umT5's token states, zeros for padding, which the denoiser attends to."""
  (umt5,), (prompt,) = encoders, tokens
  states = umt5(prompt.ids, prompt.mask)
  return Conditioning(text=jnp.where(prompt.mask[..., None], states, 0.0))


# By the `_class_name` of model_index.json.
RECIPES = {
  "FluxPipeline": Recipe(
    {"text_encoder": CLIP, "text_encoder_2": T5},
    tokenize_flux,
    encode_flux,
    max_length=512,
  ),
  "StableDiffusion3Pipeline": Recipe(
    {
      "text_encoder": CLIP_PROJECTED,
      "text_encoder_2": CLIP_PROJECTED,
      "text_encoder_3": T5,
    },
    tokenize_sd3,
    encode_sd3,
    max_length=256,
    optional="text_encoder_3",
  ),
  "QwenImagePipeline": Recipe(
    {"text_encoder": QWEN},
    tokenize_qwen_image,
    encode_qwen_image,
    max_length=512,
    template=QWEN_TEMPLATE,
    dropped=QWEN_DROPPED,
  ),
  "HunyuanVideoPipeline": Recipe(
    {"text_encoder": LLAMA, "text_encoder_2": CLIP},
    tokenize_hunyuan_video,
    encode_hunyuan_video,
    max_length=256,
    template=HUNYUAN_TEMPLATE,
    dropped=HUNYUAN_DROPPED,
    skip_layers=2,
  ),
  "WanPipeline": Recipe(
    {"text_encoder": UMT5}, tokenize_wan, encode_wan, max_length=512
  ),
}
