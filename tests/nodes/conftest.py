"""A small guided set-up: the parity kit's UNet and heads, a control picture, prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_host import engine, node
from small_models import PARITY, parity_model


@pytest.fixture
def small(comfyui: None) -> SimpleNamespace:
    """model, positive, negative, latent (1, 4, 16, 16), control (1, 16, 16, 3), head(name), target(...), sample(...)."""
    generator = torch.Generator().manual_seed(3)
    # Real prompts come out of a text encoder that ran in inference mode; so do these.
    positive, negative = ([[torch.randn(1, 8, 32, generator=generator), {}]] for _ in range(2))
    kit = SimpleNamespace(
        model=parity_model(),
        positive=positive,
        negative=negative,
        latent={"samples": torch.zeros(1, 4, 16, 16)},
        control=torch.rand(1, 16, 16, 3, generator=generator),
        head=lambda name: engine("heads").load_head(PARITY / f"head_{name}.pt"),
    )

    def target(name: str = "spatial", **inputs: Any) -> Any:
        given: dict[str, Any] = {"weight": 1.0, "start_percent": 0.0, "end_percent": 0.6, **inputs}
        if name == "spatial":
            given.setdefault("image", kit.control)
        return node("RG_ReadoutTarget", head=kit.head(name), **given)

    def sample(target: Any, **inputs: Any) -> torch.Tensor:
        settings = {
            "model": kit.model, "seed": 5, "steps": 6, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
            "positive": kit.positive, "negative": kit.negative, "latent_image": kit.latent, "denoise": 1.0, "target": target,
            "strength": 2.0, "mode": "fast", "iterations": 1, "source_cfg": -1.0, **inputs,
        }  # fmt: skip
        return node("RG_ReadoutGuidedKSampler", **settings)["samples"]

    def plain(**inputs: Any) -> torch.Tensor:
        """ComfyUI's own KSampler with the same inputs."""
        import nodes

        settings = {
            "model": kit.model, "seed": 5, "steps": 6, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
            "positive": kit.positive, "negative": kit.negative, "latent_image": kit.latent, "denoise": 1.0, **inputs,
        }  # fmt: skip
        return nodes.KSampler().sample(**settings)[0]["samples"]

    def control_error(samples: torch.Tensor, control: torch.Tensor | None = None) -> torch.Tensor:
        """How far each finished latent's spatial readout is from the control, (B,)."""
        control = kit.control if control is None else control
        readout, _ = node(
            "RG_ReadOut", model=kit.model, head=kit.head("spatial"), latent={"samples": samples}, noise_percent=0.1,
            seed=0, positive=kit.positive,
        )  # fmt: skip
        wanted = control.permute(0, 3, 1, 2) - 0.5
        return (readout - wanted).square().flatten(1).mean(1)

    kit.target, kit.sample, kit.plain, kit.control_error = target, sample, plain, control_error
    return kit
