"""The text parts of tiny pipelines of every family, written to disk."""

import dataclasses
import json
import shutil
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from digen_jax.data.prompt_recipes import HUNYUAN_TEMPLATE, QWEN_TEMPLATE
from digen_jax.data.tokenizer import write_tokenizers

WORDS = (
  *("a", "two", "three", "red", "blue", "green", "left", "of", "and"),
  *("circle", "circles", "square", "squares"),
)
LENGTH = 16
PROMPTS = [
  "two red circles left of a blue square",
  "",
  "A zebra,  3 m tall &amp; {}!",
  "red " * 20,
  "green squares",
]


@dataclasses.dataclass(frozen=True)
class Reference:
  """A directory, and diffusers' pipeline of the same components.

  Attributes:
    directory: with model_index.json, text encoders and tokenizers.
    pipe: has `encode_prompt`; no other components.
  """

  directory: Any
  pipe: Any


def randomise(model):
  generator = torch.Generator().manual_seed(0)
  for name, parameter in model.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
      parameter.data = 1 + 0.25 * noise
    else:
      scale = 0.15 if parameter.ndim == 1 else 0.6 / parameter.shape[-1] ** 0.5
      parameter.data = scale * noise
  return model.eval()


def clip(info, projection=None, hidden=24):
  config = transformers.CLIPTextConfig(
    vocab_size=info.clip_vocab_size,
    hidden_size=hidden,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=info.max_length,
    bos_token_id=info.clip_bos_id,
    eos_token_id=info.clip_eos_id,
    pad_token_id=info.clip_eos_id,
    projection_dim=projection or hidden,
  )
  if projection:
    return randomise(transformers.CLIPTextModelWithProjection(config))
  return randomise(transformers.CLIPTextModel(config))


def t5(info, kind="T5", width=32):
  config = getattr(transformers, f"{kind}Config")(
    vocab_size=info.t5_vocab_size,
    d_model=width,
    d_kv=8,
    d_ff=40,
    num_layers=2,
    num_heads=3,
    feed_forward_proj="gated-gelu",
  )
  return randomise(getattr(transformers, f"{kind}EncoderModel")(config))


def flux(directory):
  info = write_tokenizers(directory, WORDS, LENGTH)
  parts = {
    "text_encoder": clip(info),
    "tokenizer": ("CLIPTokenizer", None),
    "text_encoder_2": t5(info),
    "tokenizer_2": ("T5TokenizerFast", None),
  }
  return assemble(directory, diffusers.FluxPipeline, parts)


def stable_diffusion_3(directory):
  info = write_tokenizers(directory, WORDS, LENGTH)
  (directory / "tokenizer_2").rename(directory / "tokenizer_3")
  shutil.copytree(directory / "tokenizer", directory / "tokenizer_2")
  parts = {
    "text_encoder": clip(info, projection=12),
    "tokenizer": ("CLIPTokenizer", None),
    "text_encoder_2": clip(info, projection=20, hidden=16),
    "tokenizer_2": ("CLIPTokenizer", None),
    "text_encoder_3": t5(info, width=48),
    "tokenizer_3": ("T5TokenizerFast", None),
  }
  return assemble(directory, diffusers.StableDiffusion3Pipeline, parts)


def wan(directory):
  info = write_tokenizers(directory, WORDS, LENGTH)
  shutil.rmtree(directory / "tokenizer")
  (directory / "tokenizer_2").rename(directory / "tokenizer")
  parts = {
    "text_encoder": t5(info, "UMT5"),
    "tokenizer": ("T5TokenizerFast", None),
  }
  return assemble(directory, diffusers.WanPipeline, parts)


def byte_pairs(text, special):
  """A byte-level tokenizer to which every word of a text is one token."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  # As Llama 3 and Qwen2 split: words with a leading blank, single digits and
  # signs here, line breaks together.
  pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
  split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
  as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=2000,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  for token in special:
    text = text.replace(token, "\n")
  tokenizer.train_from_iterator([text, " ".join(WORDS)], trainer)
  return tokenizer


def qwen_image(directory):
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  tokenizer = byte_pairs(QWEN_TEMPLATE, special)
  folder = directory / "tokenizer"
  folder.mkdir()
  tokenizer.model.save(str(folder))
  size = tokenizer.get_vocab_size()
  added = {
    str(size + i): {"content": token, "special": True, "normalized": False}
    for i, token in enumerate(special)
  }
  settings = {
    "tokenizer_class": "Qwen2Tokenizer",
    "added_tokens_decoder": added,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 131072,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  language = decoder_sizes(size + 8) | {
    "rope_parameters": dict(
      rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2]
    )
  }
  vision = dict(
    depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=2
  )
  config = transformers.Qwen2_5_VLConfig(
    text_config=language,
    vision_config=vision | dict(out_hidden_size=32),
    image_token_id=size + 4,
    video_token_id=size + 5,
    vision_start_token_id=size + 6,
    vision_end_token_id=size + 7,
  )
  model = transformers.Qwen2_5_VLForConditionalGeneration(config)
  parts = {
    "text_encoder": randomise(model),
    "tokenizer": ("Qwen2Tokenizer", None),
  }
  return assemble(directory, diffusers.QwenImagePipeline, parts)


def hunyuan_video(directory):
  special = [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<pad>"),
  ]
  tokenizer = byte_pairs(HUNYUAN_TEMPLATE, special)
  tokenizer.add_special_tokens(special)
  start = special[0], tokenizer.token_to_id(special[0])
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{special[0]} $A", special_tokens=[start]
  )
  info = write_tokenizers(directory, WORDS, 77)
  (directory / "tokenizer").rename(directory / "clip")
  shutil.rmtree(directory / "tokenizer_2")
  (directory / "clip").rename(directory / "tokenizer_2")
  folder = directory / "tokenizer"
  folder.mkdir()
  tokenizer.save(str(folder / "tokenizer.json"))
  settings = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "pad_token": "<pad>",
    "model_max_length": 256,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  config = transformers.LlamaConfig(
    **decoder_sizes(tokenizer.get_vocab_size()) | {"num_hidden_layers": 4}
  )
  parts = {
    "text_encoder": randomise(transformers.LlamaModel(config)),
    # What tokenizer.json says; the class of the index reads it otherwise.
    "tokenizer": ("LlamaTokenizerFast", "PreTrainedTokenizerFast"),
    "text_encoder_2": clip(info),
    "tokenizer_2": ("CLIPTokenizer", None),
  }
  return assemble(directory, diffusers.HunyuanVideoPipeline, parts)


def decoder_sizes(vocab_size):
  return dict(
    vocab_size=vocab_size,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
  )


def assemble(directory, cls, parts):
  """Writes encoders and model_index.json, and makes diffusers' pipeline.

  Args:
    directory: already holds the tokenizers.
    cls: diffusers' class.
    parts: encoders by component, and the classes of tokenizers: the one for
      the index and, where another is to read the files, that one.
  """
  index, loaded = {"_class_name": cls.__name__}, {}
  for name, part in parts.items():
    if isinstance(part, tuple):
      index[name] = ["transformers", part[0]]
      reader = getattr(transformers, part[1] or part[0])
      loaded[name] = reader.from_pretrained(directory / name)
    else:
      index[name] = ["transformers", type(part).__name__]
      part.save_pretrained(directory / name)
      loaded[name] = part
  (directory / "model_index.json").write_text(json.dumps(index))
  absent = dict.fromkeys(("transformer", "vae", "scheduler"))
  return Reference(directory, cls(**absent, **loaded))


FAMILIES = {
  "flux": flux,
  "stable_diffusion_3": stable_diffusion_3,
  "wan": wan,
  "qwen_image": qwen_image,
  "hunyuan_video": hunyuan_video,
}
