"""Gradients through networks that write in place to what backward needs."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine


def network(x, weights, in_place):
    """Layers whose outputs are saved for backward (by the product with themselves) and then written to."""
    for weight in weights:
        h = torch.tanh(x @ weight)
        x = h * h.sigmoid()
        del h
        if in_place:
            x += 0.1
            x *= 1.1
        else:
            x = (x + 0.1) * 1.1
        x = x * x.exp()
        if in_place:
            x[:, :4] = x[:, 4:8].sin()
        else:
            x = torch.cat([x[:, 4:8].sin(), x[:, 4:]], 1)
    return x.square().sum()


@pytest.mark.usefixtures("comfyui")
def test_writes_in_place_do_not_change_the_gradient():
    beside_other_nodes = engine("comfy_host.loaded.saved_tensors").beside_other_nodes
    with torch.inference_mode(False), torch.enable_grad():
        weights = torch.randn(12, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.3
        for seed in range(50):
            leaf = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            (expected,) = torch.autograd.grad(network(leaf, weights, False), leaf)
            with beside_other_nodes():
                loss = network(leaf, weights, True)
                for _ in range(2):  # the graph serves more than one backward
                    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
                    torch.testing.assert_close(gradient, expected)


@pytest.mark.usefixtures("comfyui")
def test_weights_of_inference_mode_may_be_multiplied_with():
    """Other nodes' own weights, which autograd would refuse to keep, as they are, in lists and by name."""
    weight, bias = torch.randn(4, 4), torch.nn.Parameter(torch.randn(4), requires_grad=False)
    assert weight.is_inference()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.randn(2, 4).requires_grad_()
        with pytest.raises(RuntimeError, match="Inference tensors"):
            leaf @ weight
        expected = torch.autograd.grad((((leaf @ weight.clone() + bias.clone()) * weight[0].clone()) ** 2).sum(), leaf)[0]
        with engine("comfy_host.loaded.saved_tensors").beside_other_nodes():
            out = torch.nn.functional.linear(leaf, weight.T, bias=bias) * torch.cat([weight[0][:2], weight[0][2:]])
            torch.testing.assert_close(torch.autograd.grad((out**2).sum(), leaf)[0], expected)
