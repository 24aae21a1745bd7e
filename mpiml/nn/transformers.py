"""Models for tokens: transformers."""

from __future__ import annotations

import math

from mpiml.nn.activations import GELU
from mpiml.nn.attention import CausalSelfAttention
from mpiml.nn.base import Layer
from mpiml.nn.basic import Linear, Residual
from mpiml.nn.embedding import Embedding, PositionalEmbedding, Unembedding
from mpiml.nn.norms import LayerNorm
from mpiml.nn.parameters import Shape
from mpiml.nn.perceptrons import dropout_if_any
from mpiml.nn.recompute import Recompute


def gpt(
    shape: Shape,
    outputs: int,
    tokens: int | None = None,
    width: int = 128,
    heads: int = 4,
    blocks: int = 2,
    dropout: float = 0.0,
    recompute: bool = False,
    tie: bool = False,
) -> list[Layer]:
    """A language model: token and positional embeddings, pre-norm blocks of attention and perceptron, and a linear map
    to the scores of the next token at every position.

    Radford et al., "Language models are unsupervised multitask learners", 2019.

    Args:
        shape: of an input row: (positions,), token ids.
        outputs: the number of different tokens that it predicts.
        tokens: the number of different tokens that it reads; by default `outputs`.
        width: features of the vector for each position.
        recompute: whether the forward pass of each block is computed again in its backward pass, to save memory.
        tie: whether the linear map is by the array of the token embedding (`Unembedding`), without a bias.
    """
    if len(shape) != 1:
        raise ValueError(f"gpt takes rows of token ids, of shape (positions,), got {shape}")
    tokens = tokens or outputs
    if tie and tokens > outputs:
        few = f"rows hold {tokens} different tokens, and labels {outputs}"
        raise ValueError(f"--tie: one array is to be for both, but {few}; --classes {tokens} would work")
    embedding = Embedding(outputs if tie else tokens, width)
    layers: list[Layer] = [embedding, PositionalEmbedding(shape[0], width)]
    gain = 1 / math.sqrt(2 * blocks)  # each block adds two terms to the residual stream
    for _ in range(blocks):
        attention = CausalSelfAttention(width, heads, gain)
        perceptron = [Linear(width, 4 * width), GELU(), Linear(4 * width, width, gain)]
        block = [Residual(LayerNorm(width), *part, *dropout_if_any(dropout)) for part in ([attention], perceptron)]
        layers += [Recompute(*block)] if recompute else block
    head = Unembedding(embedding) if tie else Linear(width, outputs, gain=1.0)
    return [*layers, LayerNorm(width), head]
