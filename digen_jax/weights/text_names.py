"""How our text encoders and transformers' state dicts name the same weights."""

import re
from collections.abc import Iterable

from digen_jax.models.text import Config, clip
from digen_jax.models.text.decoder import DecoderConfig
from digen_jax.models.text.t5 import T5Config
from digen_jax.weights.names import NameMap

# transformers 4 prefixes CLIP's tensors, 5 does not, and reads both.
CLIP = NameMap(
  renames={
    "token_embedding": "text_model.embeddings.token_embedding",
    "position_embedding": "text_model.embeddings.position_embedding",
    "blocks": "text_model.encoder.layers.{i}",
    "norm_1": "layer_norm1",
    "norm_2": "layer_norm2",
    "to_q": "self_attn.q_proj",
    "to_k": "self_attn.k_proj",
    "to_v": "self_attn.v_proj",
    "to_out": "self_attn.out_proj",
    "linear_1": "mlp.fc1",
    "linear_2": "mlp.fc2",
    "norm_out": "text_model.final_layer_norm",
  },
  aliases={
    "text_model.embeddings": "embeddings",
    "text_model.encoder": "encoder",
    "text_model.final_layer_norm": "final_layer_norm",
  },
  ignored=(r"(text_model\.)?embeddings\.position_ids",),
)

_T5_ATTENTION = "encoder.block.{i}.layer.0.SelfAttention"
_T5_FEED_FORWARD = "encoder.block.{i}.layer.1.DenseReluDense"
_T5_RENAMES = {
  "token_embedding": "shared",
  # T5's blocks all add the bias that the first one stores; umT5's each theirs.
  "relative_bias": (
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
  ),
  "blocks.relative_bias": f"{_T5_ATTENTION}.relative_attention_bias",
  "blocks.norm_1": "encoder.block.{i}.layer.0.layer_norm",
  "blocks.to_q": f"{_T5_ATTENTION}.q",
  "blocks.to_k": f"{_T5_ATTENTION}.k",
  "blocks.to_v": f"{_T5_ATTENTION}.v",
  "blocks.to_out": f"{_T5_ATTENTION}.o",
  "blocks.norm_2": "encoder.block.{i}.layer.1.layer_norm",
  "blocks.ff.linear_2": f"{_T5_FEED_FORWARD}.wo",
  "norm_out": "encoder.final_layer_norm",
}
_T5_UNGATED = {"blocks.ff.linear_1": f"{_T5_FEED_FORWARD}.wi"}
_T5_GATED = {
  "blocks.ff.linear_1": f"{_T5_FEED_FORWARD}.wi_0",
  "blocks.ff.gate": f"{_T5_FEED_FORWARD}.wi_1",
}


# From wherever the language model begins in its checkpoint's names.
_DECODER_RENAMES = {
  "token_embedding": "embed_tokens",
  "blocks": "layers.{i}",
  "norm_out": "norm",
}
_DECODER_BLOCK_RENAMES = {
  "norm_1": "input_layernorm",
  "norm_2": "post_attention_layernorm",
  "to_q": "self_attn.q_proj",
  "to_k": "self_attn.k_proj",
  "to_v": "self_attn.v_proj",
  "to_out": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "linear_1": "mlp.up_proj",
  "linear_2": "mlp.down_proj",
}


def text_names(config: Config, tensors: Iterable[str] = ()) -> NameMap:
  """The name map of a text encoder's config record.

  Args:
    config: of the encoder.
    tensors: names of its checkpoint's tensors; those of a language model begin
      with whatever it is a part of.
  """
  if isinstance(config, clip.ClipTextConfig):
    return CLIP
  if isinstance(config, DecoderConfig):
    return decoder_names(config, tensors)
  return t5_names(config)


def decoder_names(config: DecoderConfig, tensors: Iterable[str]) -> NameMap:
  """A language model's names; the rest of its checkpoint is passed over."""
  table = "embed_tokens.weight"
  prefix = next(
    (t.removesuffix(table) for t in tensors if t.endswith(table)), ""
  )
  start = re.escape(prefix)
  first = config.num_hidden_layers - config.skip_layers
  skipped = "|".join(map(str, range(first, config.num_hidden_layers)))
  ignored = (
    r"lm_head\.weight",
    r".*\brotary_emb\.inv_freq",
    r"(.*\.)?visual\..*",
  )
  if skipped:
    ignored += (rf"{start}layers\.({skipped})\..*", rf"{start}norm\.weight")
  renames = {ours: prefix + name for ours, name in _DECODER_RENAMES.items()}
  return NameMap(renames | _DECODER_BLOCK_RENAMES, ignored=ignored)


def t5_names(config: T5Config) -> NameMap:
  """T5's names; a gated feed-forward has two input matrices."""
  gated = config.feed_forward_proj == "gated-gelu"
  return NameMap(
    renames=_T5_RENAMES | (_T5_GATED if gated else _T5_UNGATED),
    # The encoder's own name for the same table, alone or as a duplicate.
    aliases={"shared": "encoder.embed_tokens"},
    ignored=(r"encoder\.embed_tokens\.weight",),
  )
