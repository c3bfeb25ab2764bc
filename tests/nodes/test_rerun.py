"""A step of the way that keeps its input only: the same gradient, whatever its size, and one more try in less memory."""

from __future__ import annotations

import contextlib

import pytest
import torch
from comfyui_host import engine

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def rerun():
    with torch.inference_mode(False):
        yield engine("comfy_host.optimized.rerun")


def function(x):
    return torch.sin(x) * x.flip(-1)


def gradients(rerun, scale=1.0, **settings):
    """Of three steps, by stages and by autograd itself."""
    start, found = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)), []
    for step in (rerun.Stage(function, contextlib.nullcontext, **settings), function):
        x = start.clone().requires_grad_()
        y = scale * step(step(step(x))).sum()
        found.append(torch.autograd.grad(y, x)[0])
    return found


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_gradient_is_autograds(rerun, scale, on_cpu):
    found, wanted = gradients(rerun, scale, on_cpu=on_cpu)
    torch.testing.assert_close(found / scale, wanted / scale)


def test_a_step_in_half_precision_sees_gradients_of_about_one(rerun):
    seen = []

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.half()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(gradient.abs().amax())
            return gradient.float()

    stage = rerun.Stage(lambda x: Half.apply(x).float() * 3, contextlib.nullcontext)
    x = torch.ones(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(1e-12 * stage(x).sum(), x)
    torch.testing.assert_close(gradient, torch.full((4,), 3e-12))
    assert 1 <= float(seen[0]) <= 6


def test_nothing_runs_again_where_no_gradient_comes(rerun):
    runs = []
    stage = rerun.Stage(lambda x: runs.append(1) or 2 * x, contextlib.nullcontext)
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad((stage(x) * 0).sum(), x)
    assert not gradient.any()
    assert len(runs) == 1
    with torch.no_grad():
        assert not stage(x).requires_grad


def test_out_of_memory_is_tried_once_more(rerun):
    import comfy.model_management

    failures, lighter = [1, 2], []

    def with_graph(x):
        if failures:
            failures.pop()
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return function(x)

    def lighten():
        lighter.append(1)
        return True

    stage = rerun.Stage(function, contextlib.nullcontext, with_graph=with_graph, lighten=lighten)
    x = torch.ones(3, requires_grad=True)
    y = stage(x).sum()
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        torch.autograd.grad(y, x, retain_graph=True)
    assert len(lighter) == 1
    assert torch.autograd.grad(y, x)[0].any()
