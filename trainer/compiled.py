"""Compiled layers: where it pays, what a stack repeats is made into kernels of its own. Knows torch.compile, no step.

One layer is compiled, and all its like use what was made; lengths and rows are left open, so that a run's many shapes
need no kernels of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from autotune.plan import Switch

KINDS_OF_LAYER = 32
"""How often a layer's code may be compiled, for the first of a stack, for a single row, and so on; torch's own limit of
8 is met by an encoder with a decoder, and what is beyond it runs eagerly."""


def compile_layers(model: nn.Module) -> None:
    """Have each layer of the model's stacks compiled at its first call."""
    import torch._dynamo  # takes a second
    import torch.fx.experimental._config

    torch._dynamo.config.recompile_limit = KINDS_OF_LAYER
    # Else a length that happens to be the width is taken to be always so, and the next length compiled anew.
    torch.fx.experimental._config.use_duck_shape = False
    for stack in _stacks(model):
        for layer in stack:
            layer.compile(dynamic=True)


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _stacks(child)


def eagerly(switch: Switch) -> AbstractContextManager[object]:
    """Run a model as it is written, compiled or not: for forwards too few or too varied to be worth kernels."""
    return torch.compiler.set_stance("force_eager") if switch == "on" else nullcontext()


def is_compile_error(error: BaseException) -> bool:
    """Say whether an error is that of a compiler, or of its not being there."""
    import torch._dynamo.exc
    import torch._inductor.exc

    kinds = (
        torch._dynamo.exc.TorchDynamoException,
        torch._inductor.exc.CppCompileError,
        torch._inductor.exc.InvalidCxxCompiler,
    )
    return isinstance(error, kinds)
