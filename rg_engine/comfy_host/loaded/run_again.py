"""Parts of a network that keep their inputs alone, and run again in backward (checkpointing, arXiv 1604.06174)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .kitchen import have_backward, kernels_with_backward
from .random_state import random_state_kept, random_states, set_random_states
from .saved_tensors import beside_other_nodes, is_beside_other_nodes


def run_again(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """``function(*inputs)``, a tensor or a tuple of tensors and None, of which the inputs alone are kept. It runs again in
    backward; other nodes' code in it (ToMe) draws the same random numbers then."""
    return _RunAgain.apply(function, *inputs)


def block_again(block: nn.Module) -> Callable[..., Any]:
    """A forward for a transformer's block that keeps the streams which it is given, and nothing else.

    A block may write into its streams, also into one without a gradient (the first block's text): each run gets copies, or
    the second would begin from what the first has left. Options are taken as they are now: the network changes them from
    block to block.
    """
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = list({id(tensor): tensor for tensor in _tensors([*args, *kwargs.values()])}.values())
        moving = [tensor for tensor in given if tensor.requires_grad]
        if not moving or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        still = [tensor for tensor in given if not tensor.requires_grad and _is_stream(tensor)]
        args, kwargs = _copied(args, {}), {name: _copied(value, {}) for name, value in kwargs.items()}

        def run(*inputs: Tensor) -> Any:
            fresh = {id(tensor): tensor.clone() for tensor in still}
            fresh |= {id(old): new.clone() for old, new in zip(moving, inputs, strict=True)}
            return original(*_copied(args, fresh), **{name: _copied(value, fresh) for name, value in kwargs.items()})

        return run_again(run, *moving)

    return forward


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *inputs: Tensor) -> Any:  # type: ignore[override]
        ctx.function, ctx.beside, ctx.kernels = function, is_beside_other_nodes(), have_backward()
        ctx.states = random_states(inputs[0].device) if ctx.beside else []
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        with contextlib.ExitStack() as scope:
            scope.enter_context(torch.enable_grad())
            scope.enter_context(kernels_with_backward(ctx.kernels))
            scope.enter_context(beside_other_nodes(ctx.beside))
            if ctx.beside:
                scope.enter_context(random_state_kept(saved[0].device))
                set_random_states(ctx.states)
            inputs = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(saved, needed, strict=True)]
            out = ctx.function(*inputs)
        pairs = [
            (output, gradient)
            for output, gradient in zip((out,) if isinstance(out, Tensor) else out, gradients, strict=True)
            if gradient is not None and isinstance(output, Tensor) and output.requires_grad
        ]
        outputs, given = ([pair[k] for pair in pairs] for k in (0, 1))
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
        return None, *(next(found) if asked else None for asked in needed)


def _is_stream(tensor: Tensor) -> bool:
    """Whether it may be a block's stream: (B, L, C), (B, C, h, w) or (B, F, h, w, C). Tables of places have more axes."""
    return tensor.is_floating_point() and 3 <= tensor.ndim <= 5


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors, also in lists and tuples; options (dictionaries) are no streams."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _copied(value: Any, fresh: dict[int, Tensor]) -> Any:
    """The same with tensors replaced by ``fresh`` ones, by id; options are copied."""
    if isinstance(value, Tensor):
        return fresh.get(id(value), value)
    if type(value) in (list, tuple):
        return type(value)(_copied(item, fresh) for item in value)
    return dict(value) if type(value) is dict else value
