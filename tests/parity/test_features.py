"""Features, readouts, losses and gradients of the paper's code, through this extension's taps in real ComfyUI."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine
from safetensors.torch import load_file
from small_models import PARITY, parity_model

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def golden():
    return load_file(PARITY / "golden.safetensors")


def head(name: str):
    return engine("heads").load_head(PARITY / f"head_{name}.pt")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture
def forward(golden):
    """eps, features and emb of the kit's forward pass."""
    model = parity_model()
    network = model.model.diffusion_model
    backbone = engine("comfy_host.loaded.model").backbone_of(model)
    with engine("features").FeatureTap(network, backbone) as tap:
        timestep = golden["fwd.timestep"].float().expand(2)
        eps = network(golden["fwd.x"], timestep, context=golden["fwd.ctx"])
        return eps, *tap.take()


def test_prediction_features_and_emb(golden, forward):
    eps, features, emb = forward
    assert relative(eps, golden["fwd.eps"]) < 1e-4
    assert relative(emb, golden["fwd.emb"]) < 1e-4
    assert len(features) == 9
    for i, feature in enumerate(features):
        assert relative(feature, golden[f"fwd.feat.{i:02d}"]) < 1e-4


@pytest.mark.parametrize("name", ["spatial", "appearance", "correspondence"])
def test_readouts_with_and_without_emb(golden, forward, name):
    _, features, emb = forward
    network = head(name).network
    assert relative(network(features, emb, (16, 16)), golden[f"fwd.readout.{name}"]) < 1e-4
    assert relative(network(features, None, (16, 16)), golden[f"fwd.readout_no_emb.{name}"]) < 1e-4


@pytest.mark.parametrize("run", ["spatial", "drag"])
def test_loss_and_gradient_of_one_branch(golden, run):
    """Row 1 is guided, row 0 the source; the gradient goes through ComfyUI's apply_model and this extension's scope."""
    guidance, branches, host = engine("guidance"), engine("comfy_host.guided.branches"), engine("comfy_host.loaded.model")
    model = parity_model()
    backbone, model_sampling = host.backbone_of(model), model.model.model_sampling
    target = _target(run, golden, guidance)
    targets = guidance.chain(target)
    sigma = model_sampling.sigma(golden["fwd.timestep"].float())[None]
    x = golden["fwd.x"] * (1 + sigma**2).sqrt()

    def reader(row, **more):
        with torch.inference_mode(False):
            objective = guidance.Objective(targets, (16, 16), 1, x.device, paper_drags=True)
        made = branches.BranchReader(backbone, objective, x[row], **more)
        options = made.install({})["transformer_options"]
        model.model.apply_model(x[row], sigma, c_crossattn=golden["fwd.ctx"][row], transformer_options=options)
        return made

    source = reader(slice(0, 1)).found[branches.CONDITIONAL]
    guided = reader(slice(1, 2), active=tuple(range(len(targets))), sources={branches.CONDITIONAL: source})
    weight = targets[0].weight
    assert float(guided.loss() / weight) == pytest.approx(float(golden[f"grad.{run}.loss"]), rel=1e-4)
    assert relative(guided.gradient / weight, golden[f"grad.{run}.dx"][1:]) < 1e-4
    assert float(golden[f"grad.{run}.dx"][0].abs().max()) == 0


def _target(run, golden, guidance):
    if run == "spatial":
        return guidance.Target(head=head("spatial"), image=(golden["spatial.control"] + 0.5).permute(1, 2, 0)[None])
    drag = engine("types").Drag
    starts, ends = ((golden["drag.points"].flip(-1) + 0.5) / 16).tolist()  # (row, column) cells to (x, y) fractions
    drags = tuple(drag(tuple(a), tuple(b)) for a, b in zip(starts, ends, strict=True))
    look = guidance.Target(head=head("appearance"))
    return guidance.Target(head=head("correspondence"), drags=drags, previous=look)
