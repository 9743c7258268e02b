"""A BERT-shaped encoder whose feed-forward parts can be exchanged, and a multi-task model on top of it.

Shapes: B samples, T tokens, d hidden size, H heads, f feed-forward width. Dropout acts only in training mode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgeml.errors import InputError

__all__ = ["Encoder", "EncoderConfig", "FeedForward", "Layer", "MultiTaskModel", "load_bert"]


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a BERT-shaped encoder; `dropout` is the rate used while training."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int = 512
    token_types: int = 2
    norm_eps: float = 1e-12
    dropout: float = 0.1


class FeedForward(nn.Module):
    """`down(gelu(up(x)))`, x (B, T, d); `bias` is accepted and ignored so that a mixture can take its place."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, intermediate)
        self.down = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.down(F.gelu(self.up(x))))


class Layer(nn.Module):
    """Post-norm transformer layer: attention, add, norm, feed-forward, add, norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.output = nn.Linear(config.hidden, config.hidden)
        self.norm1 = nn.LayerNorm(config.hidden, config.norm_eps)
        self.feed_forward: nn.Module = FeedForward(config.hidden, config.intermediate)
        self.norm2 = nn.LayerNorm(config.hidden, config.norm_eps)

    def forward(self, x: Tensor, padding: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, T, d); padding (B, 1, 1, T) float, 0 or -inf; bias (B, E) or None."""
        batch, tokens, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=padding)
        attended = self.output(attended.transpose(1, 2).reshape(batch, tokens, hidden))
        x = self.norm1(x + F.dropout(attended, self.dropout, self.training))
        return cast(Tensor, self.norm2(x + F.dropout(self.feed_forward(x, bias), self.dropout, self.training)))


class Encoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocabulary, config.hidden)
        self.positions = nn.Embedding(config.positions, config.hidden)
        self.types = nn.Embedding(config.token_types, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def embed(self, ids: Tensor, types: Tensor) -> Tensor:
        """ids, types (B, T) int64 -> hidden0 (B, T, d)."""
        places = self.positions.weight[: ids.shape[1]]
        return cast(Tensor, self.norm(self.words(ids) + places + self.types(types)))

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor, bias: Tensor | None = None) -> Tensor:
        """ids, types (B, T) int64; mask (B, T), 1 for real tokens; bias (B, site, E) or None -> (B, T, d)."""
        x = self.embed(ids, types)
        x = F.dropout(x, self.config.dropout, self.training)
        padding = torch.zeros_like(mask).masked_fill(mask == 0, float("-inf"))[:, None, None, :]
        for site, layer in enumerate(self.layers):
            x = layer(x, padding, None if bias is None else bias[:, site])
        return x


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real tokens: hidden (B, T, d), mask (B, T) -> (B, d)."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class MultiTaskModel(nn.Module):
    """One encoder, one linear head a task on the mean-pooled hidden state, and a sentence-vector head."""

    def __init__(self, encoder: Encoder, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.encoder = encoder
        hidden = encoder.config.hidden
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, count) for name, count in classes.items()})
        self.embed_head = nn.Linear(hidden, hidden, bias=False)
        nn.init.eye_(self.embed_head.weight)

    def pooled(self, ids: Tensor, mask: Tensor, types: Tensor, bias: Tensor | None = None) -> Tensor:
        """The sentence's mean hidden state (B, d), before any head."""
        return mean_pool(self.encoder(ids, mask, types, bias), mask)

    def vector(self, pooled: Tensor) -> Tensor:
        """The sentence vector (B, d) of length 1."""
        return F.normalize(self.embed_head(pooled), dim=-1)


def load_bert(directory: Path, dropout: float = 0.1) -> Encoder:
    """Read a BERT-shaped Hugging Face directory (`config.json`, `model.safetensors`) into an `Encoder`."""
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
        tensors = load_file(directory / "model.safetensors")
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}: config.json and model.safetensors are needed ({error})") from error
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise InputError(
            f"{directory}: model type {config.get('model_type')!r} with {config.get('hidden_act')!r} is not supported, only bert with gelu"
        )
    encoder = Encoder(
        EncoderConfig(
            config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
            config["intermediate_size"], config["max_position_embeddings"], config["type_vocab_size"], config["layer_norm_eps"], dropout,
        )
    )  # fmt: skip
    encoder.load_state_dict(_from_bert(tensors, config["num_hidden_layers"]))
    return encoder


def _from_bert(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    names = {
        "words.weight": "embeddings.word_embeddings.weight",
        "positions.weight": "embeddings.position_embeddings.weight",
        "types.weight": "embeddings.token_type_embeddings.weight",
    }
    modules = {"norm": "embeddings.LayerNorm"}
    for i in range(layers):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        modules |= {
            f"{ours}.output": f"{theirs}.attention.output.dense",
            f"{ours}.norm1": f"{theirs}.attention.output.LayerNorm",
            f"{ours}.feed_forward.up": f"{theirs}.intermediate.dense",
            f"{ours}.feed_forward.down": f"{theirs}.output.dense",
            f"{ours}.norm2": f"{theirs}.output.LayerNorm",
        }
    names |= {f"{a}.{part}": f"{b}.{part}" for a, b in modules.items() for part in ("weight", "bias")}
    state = {ours: tensors[theirs].float() for ours, theirs in names.items()}
    for i in range(layers):
        for part in ("weight", "bias"):
            state[f"layers.{i}.qkv.{part}"] = torch.cat(
                [tensors[f"encoder.layer.{i}.attention.self.{name}.{part}"].float() for name in ("query", "key", "value")]
            )
    return state
