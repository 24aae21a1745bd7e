"""Models for tokens: transformers."""

from __future__ import annotations

import math

from mpiml.nn.activations import GELU
from mpiml.nn.attention import CausalSelfAttention
from mpiml.nn.base import Layer
from mpiml.nn.basic import Linear, Residual
from mpiml.nn.embedding import Embedding, PositionalEmbedding
from mpiml.nn.norms import LayerNorm
from mpiml.nn.parameters import Shape
from mpiml.nn.perceptrons import dropout_if_any


def gpt(
    shape: Shape,
    outputs: int,
    tokens: int | None = None,
    width: int = 128,
    heads: int = 4,
    blocks: int = 2,
    dropout: float = 0.0,
) -> list[Layer]:
    """A language model: token and positional embeddings, pre-norm blocks of attention and perceptron, and a linear map
    to the scores of the next token at every position.

    Radford et al., "Language models are unsupervised multitask learners", 2019.

    Args:
        shape: of an input row: (positions,), token ids.
        outputs: the number of different tokens that it predicts.
        tokens: the number of different tokens that it reads; by default `outputs`.
        width: features of the vector for each position.
    """
    if len(shape) != 1:
        raise ValueError(f"gpt takes rows of token ids, of shape (positions,), got {shape}")
    layers: list[Layer] = [Embedding(tokens or outputs, width), PositionalEmbedding(shape[0], width)]
    gain = 1 / math.sqrt(2 * blocks)  # each block adds two terms to the residual stream
    for _ in range(blocks):
        attention = CausalSelfAttention(width, heads, gain)
        perceptron = [Linear(width, 4 * width), GELU(), Linear(4 * width, width, gain)]
        layers.append(Residual(LayerNorm(width), attention, *dropout_if_any(dropout)))
        layers.append(Residual(LayerNorm(width), *perceptron, *dropout_if_any(dropout)))
    return [*layers, LayerNorm(width), Linear(width, outputs, gain=1.0)]
