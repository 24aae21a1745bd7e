"""The public face of mpiml: what a program, a model, a layer or a data set of your own imports.

`from mpiml.api import Config, train` imports the modules of these two names and no others; `import mpiml.api` alone
starts no MPI and loads no NumPy.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names and their modules, stated once: for type checkers as imports, for MODULES as text
    from mpiml.config import Config as Config
    from mpiml.data.dataset import Dataset as Dataset
    from mpiml.data.dataset import Split as Split
    from mpiml.data.dataset import open_dataset as open_dataset
    from mpiml.data.formats import Options as Options
    from mpiml.data.sources import ArraySource as ArraySource
    from mpiml.data.sources import Source as Source
    from mpiml.errors import ConfigError as ConfigError
    from mpiml.errors import DataError as DataError
    from mpiml.errors import DirectoryError as DirectoryError
    from mpiml.errors import NotFiniteError as NotFiniteError
    from mpiml.errors import OutputError as OutputError
    from mpiml.errors import RunError as RunError
    from mpiml.errors import StallError as StallError
    from mpiml.evaluate import evaluate as evaluate
    from mpiml.loop.checkpoints import Checkpoints as Checkpoints
    from mpiml.loop.guard import guard as guard
    from mpiml.loop.rows import Rows as Rows
    from mpiml.loop.sums import Sum as Sum
    from mpiml.nn.convnets import cnn as cnn
    from mpiml.nn.convnets import resnet as resnet
    from mpiml.nn.layers import GELU as GELU
    from mpiml.nn.layers import Array as Array
    from mpiml.nn.layers import At as At
    from mpiml.nn.layers import AvgPool2d as AvgPool2d
    from mpiml.nn.layers import Backward as Backward
    from mpiml.nn.layers import BatchNorm2d as BatchNorm2d
    from mpiml.nn.layers import CausalSelfAttention as CausalSelfAttention
    from mpiml.nn.layers import Conv2d as Conv2d
    from mpiml.nn.layers import Dropout as Dropout
    from mpiml.nn.layers import Embedding as Embedding
    from mpiml.nn.layers import Flatten as Flatten
    from mpiml.nn.layers import GlobalAvgPool as GlobalAvgPool
    from mpiml.nn.layers import GroupNorm as GroupNorm
    from mpiml.nn.layers import Layer as Layer
    from mpiml.nn.layers import LayerNorm as LayerNorm
    from mpiml.nn.layers import Linear as Linear
    from mpiml.nn.layers import MaxPool2d as MaxPool2d
    from mpiml.nn.layers import PositionalEmbedding as PositionalEmbedding
    from mpiml.nn.layers import Recompute as Recompute
    from mpiml.nn.layers import ReLU as ReLU
    from mpiml.nn.layers import Reshape as Reshape
    from mpiml.nn.layers import Residual as Residual
    from mpiml.nn.layers import RMSNorm as RMSNorm
    from mpiml.nn.layers import SiLU as SiLU
    from mpiml.nn.layers import Tanh as Tanh
    from mpiml.nn.layers import Unembedding as Unembedding
    from mpiml.nn.layers import forward as forward
    from mpiml.nn.layers import parameters as parameters
    from mpiml.nn.layers import stack_flops as stack_flops
    from mpiml.nn.layers import stack_shapes as stack_shapes
    from mpiml.nn.losses import R2 as R2
    from mpiml.nn.losses import Accuracy as Accuracy
    from mpiml.nn.losses import BinaryAccuracy as BinaryAccuracy
    from mpiml.nn.losses import ExactMatch as ExactMatch
    from mpiml.nn.losses import Labels as Labels
    from mpiml.nn.losses import Loss as Loss
    from mpiml.nn.losses import Metric as Metric
    from mpiml.nn.losses import binary_cross_entropy as binary_cross_entropy
    from mpiml.nn.losses import mean_squared_error as mean_squared_error
    from mpiml.nn.losses import softmax_cross_entropy as softmax_cross_entropy
    from mpiml.nn.parameters import Gradients as Gradients
    from mpiml.nn.parameters import Init as Init
    from mpiml.nn.parameters import Parameter as Parameter
    from mpiml.nn.parameters import Shape as Shape
    from mpiml.nn.parameters import Statistic as Statistic
    from mpiml.nn.parameters import constant as constant
    from mpiml.nn.parameters import normal as normal
    from mpiml.nn.parameters import uniform as uniform
    from mpiml.nn.perceptrons import mlp as mlp
    from mpiml.nn.torch_state import load_into as load_into
    from mpiml.nn.transformers import gpt as gpt
    from mpiml.random import generator as generator
    from mpiml.train import train as train
    from mpiml.training.export import torch_state_dict as torch_state_dict
    from mpiml.training.export import trained as trained

_LINE = re.compile(r"^    from (\S+) import (\w+) as \2$", re.MULTILINE)
MODULES = {name: module for module, name in _LINE.findall(Path(__file__).read_text(encoding="utf-8"))}


def _load(name: str) -> Any:
    """The object of that name. Raises AttributeError if there is none."""
    if name not in MODULES:
        hint = ""
        if not name.startswith("__"):  # Python itself asks for __path__
            from mpiml.flags import guess

            hint = guess(name, list(MODULES))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    globals()[name] = value = getattr(import_module(MODULES[name]), name)  # so Python asks once for each name
    return value


def __dir__() -> list[str]:
    return sorted(MODULES)


if not TYPE_CHECKING:  # type checkers know the names from above; __getattr__ would make them accept any name
    __getattr__ = _load
    __all__ = [name for name in MODULES if name != "load_into"]  # which loads PyTorch, an extra
