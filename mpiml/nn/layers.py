"""All layers, and the functions on lists of layers, in one module to import from."""

from mpiml.nn.activations import GELU, ReLU, SiLU, Tanh
from mpiml.nn.attention import CausalSelfAttention
from mpiml.nn.base import Array, At, Backward, Layer, everything, forward, name, parameters, stack_flops, stack_shapes
from mpiml.nn.basic import Dropout, Flatten, Linear, Reshape, Residual
from mpiml.nn.batchnorm import BatchNorm2d
from mpiml.nn.convolution import Conv2d
from mpiml.nn.embedding import Embedding, PositionalEmbedding, Unembedding
from mpiml.nn.norms import GroupNorm, LayerNorm, RMSNorm
from mpiml.nn.pooling import AvgPool2d, GlobalAvgPool, MaxPool2d
from mpiml.nn.recompute import Recompute

# fmt: off
__all__ = [
    "Array", "At", "Backward", "Layer",
    "forward", "stack_shapes", "stack_flops", "name", "everything", "parameters",
    "Linear", "Dropout", "Flatten", "Reshape", "Residual", "Recompute",
    "ReLU", "Tanh", "GELU", "SiLU",
    "LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm2d",
    "Conv2d", "MaxPool2d", "AvgPool2d", "GlobalAvgPool",
    "Embedding", "PositionalEmbedding", "Unembedding", "CausalSelfAttention",
]
# fmt: on
