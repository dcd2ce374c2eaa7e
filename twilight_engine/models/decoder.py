"""The decoder that every supported family is; what differs is in its ModelConfig.

How a runner drives it:

    rotary = model.rotary(positions, lengths)        # once a step
    x = model.embed(token_ids)
    for layer in range(model.config.num_layers):     # layer-major prefill: all chunks of a layer
        x = model.run_layer(layer, x, rotary, attend)    # rotary.slice(start, end) for a chunk
    logits = model.logits(x[-1:])                    # only the rows that are wanted

`lengths` matters to dynamic NTK alone: the prompt length of each token's request, fixed at prefill
and given again at every decode step. No method reads a device value on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twilight_engine.layers.attention import Attend, AttentionProjections
from twilight_engine.layers.linear import Linear
from twilight_engine.layers.mlp import SwiGLU
from twilight_engine.layers.norm import RMSNorm
from twilight_engine.layers.rope import Rope, Rotary
from twilight_engine.loaders.config import ModelConfig


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = AttentionProjections(config)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, layer: int, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        x = x + self.attention(layer, self.input_norm(x), rotary, attend)
        y: Tensor = x + self.mlp(self.post_attention_norm(x))
        return y


class DecoderModel(nn.Module):
    """Embedding, pre-norm layers, final norm and output head; its weights start uninitialised.

    T tokens of any number of sequences run side by side: the model sees only their positions, and
    `attend` knows which belong together.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.dtype, self.device = dtype, device
        with torch.device("meta"):  # shapes first: memory is taken once, in the right dtype
            self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            tied = config.tie_word_embeddings
            self.lm_head = (
                None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)
            )
        self.requires_grad_(False)
        self.to(dtype)
        self.rope = Rope(config.rope, config.head_dim, config.max_position_embeddings, device)

    def allocate(self) -> None:
        """Take the memory of the weights, whose shapes are known since construction."""
        self.to_empty(device=self.device)

    def rotary(self, positions: Tensor, lengths: Tensor | int | None = None) -> Rotary:
        """The rotation of each token, for all layers (see Rope)."""
        return self.rope(positions, lengths)

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> x [T, hidden]."""
        return F.embedding(token_ids, self.embed_tokens)

    def run_layer(self, layer: int, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Run one layer on x [T, hidden]; calls `attend` once."""
        y: Tensor = self.layers[layer](layer, x, rotary, attend)
        return y

    def logits(self, x: Tensor) -> Tensor:
        """x [T, hidden] after the last layer -> logits [T, vocab] float32."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head.weight
        return F.linear(self.norm(x), head).float()

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        lengths: Tensor | int | None = None,
    ) -> Tensor:
        """Embed, run every layer, and return the logits of all T tokens."""
        rotary = self.rotary(positions, lengths)
        x = self.embed(token_ids)
        for layer in range(self.config.num_layers):
            x = self.run_layer(layer, x, rotary, attend)
        return self.logits(x)
