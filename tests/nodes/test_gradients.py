"""Every way of differentiating the model gives plain autograd's gradient, and none copies or keeps weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from comfyui_host import engine
from small_models import parity_model

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 16, 16), (2, 8, 32), (2, 4, 16, 16))
    with torch.inference_mode(False):
        return [torch.randn(shape, generator=generator) for shape in shapes]


def gradient(network, inputs) -> torch.Tensor:
    """Of <output, direction> with respect to the latent, inside the scope."""
    x, context, direction = inputs
    with engine("comfy_host.gradient_scope").GradientScope(network):
        leaf = x.clone().requires_grad_()
        out = network(leaf, torch.tensor([500.0, 500.0]), context=context)
        return torch.autograd.grad(out, leaf, direction)[0]


@pytest.fixture
def reference(inputs) -> torch.Tensor:
    """Plain autograd on a copy of the model that was never in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        network = parity_model().model.diffusion_model.requires_grad_(False)
        leaf = inputs[0].clone().requires_grad_()
        out = network(leaf, torch.tensor([500.0, 500.0]), context=inputs[1])
        return torch.autograd.grad(out, leaf, inputs[2])[0]


def relative(ours, theirs) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def cast_every_layer(network) -> None:
    """ComfyUI's own switch for weights that are cast or moved when a layer runs (offloading)."""
    for module in network.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True


def test_inference_weights_through_aliases(inputs, reference):
    network = parity_model().model.diffusion_model
    assert all(p.is_inference() for p in network.parameters())
    assert relative(gradient(network, inputs), reference) < 1e-5


def test_weights_that_are_cast_when_a_layer_runs(inputs, reference):
    network = parity_model().model.diffusion_model
    cast_every_layer(network)
    assert relative(gradient(network, inputs), reference) < 1e-5


def test_half_precision_weights_under_manual_cast(inputs):
    """The kit's weights are fp16 on disk, so a half copy computes the same."""
    network = parity_model().model.diffusion_model
    wanted = gradient(network, inputs)
    for parameter in network.parameters():
        parameter.data = parameter.data.half()
    cast_every_layer(network)
    assert relative(gradient(network, inputs), wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computation_points_the_same_way(inputs, reference, dtype):
    network = parity_model().model.diffusion_model.to(dtype)
    network.dtype = dtype
    halves = [t.to(dtype) for t in inputs]
    ours = gradient(network, halves).float()
    assert torch.nn.functional.cosine_similarity(ours.flatten(), reference.flatten(), dim=0) > 0.99


def test_no_weight_is_copied(inputs):
    """Inside the scope each parameter is another tensor over the very same storage."""
    network = parity_model().model.diffusion_model
    pointers = {name: p.data_ptr() for name, p in network.named_parameters()}
    objects = {name: id(p) for name, p in network.named_parameters()}
    with engine("comfy_host.gradient_scope").GradientScope(network):
        assert {name: p.data_ptr() for name, p in network.named_parameters()} == pointers
        assert not any(p.is_inference() for p in network.parameters())
    assert {name: id(p) for name, p in network.named_parameters()} == objects


def test_no_cast_weight_lives_between_forward_and_backward(inputs, monkeypatch):
    import comfy.ops

    network = parity_model().model.diffusion_model
    cast_every_layer(network)
    made = []
    original = comfy.ops.cast_bias_weight

    def tracked(*args, **kwargs):
        out = original(*args, **kwargs)
        copies = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in out[:2])
        made.extend(weakref.ref(t) for t in copies if t is not None)
        return (*copies, *out[2:])

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", tracked)
    with engine("comfy_host.gradient_scope").GradientScope(network):
        leaf = inputs[0].clone().requires_grad_()
        out = network(leaf, torch.tensor([500.0, 500.0]), context=inputs[1])
        gc.collect()
        assert made
        assert sum(ref() is not None for ref in made) == 0
        torch.autograd.grad(out, leaf, inputs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tiny_loss_does_not_underflow_in_half_precision(dtype):
    """The gradient at the taps is scaled before it meets half precision: a loss of 2^-40 points where one of 1 does."""
    from types import SimpleNamespace

    branches, guidance, heads = engine("comfy_host.branches"), engine("guidance"), engine("heads")
    model = parity_model()
    model.model.diffusion_model.to(dtype)
    model.model.manual_cast_dtype = dtype
    backbone = engine("comfy_host.guided_model").backbone_of(model)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 8, 32, generator=generator)
    head = heads.load_head(engine("comfy_host.bootstrap").REPOSITORY / "tests/parity/data/head_spatial.pt")
    sigma = torch.tensor([2.0])
    found = []
    for weight in (1.0, 2.0**-40):
        target = guidance.Target(head=head, weight=weight, image=torch.zeros(1, 16, 16, 3))
        with torch.inference_mode(False):
            objective = guidance.Objective((target,), (16, 16), 1, x.device)
        reader = branches.BranchReader(backbone, objective, x, active=(0,))
        options = reader.install({})["transformer_options"]
        model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options)
        found.append(SimpleNamespace(gradient=reader.gradient / weight, loss=reader.loss()))
    assert found[1].gradient.abs().max() > 0
    assert relative(found[1].gradient, found[0].gradient) < 1e-3
