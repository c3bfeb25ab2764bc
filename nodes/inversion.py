"""Invert Latent."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from ..rg_engine.comfy_host.edits.inversion import REFINEMENTS, invert_latent
from .schema import schema


class InvertLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_InvertLatent",
            "Invert Latent",
            aliases=["readout guidance", "ddim inversion", "unsampler", "edit real photo"],
            description="Finds the noise from which the model makes a given picture, so that a real photo can be dragged. "
            "Sample it with Readout-Guided KSampler, euler, the same steps, scheduler, cfg and prompt, denoise 1.",
            inputs=[
                io.Model.Input("model"),
                io.Latent.Input("latent", tooltip="The picture, through VAE Encode."),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="The sampler's steps; more lose less."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal"),
                io.Conditioning.Input("positive", optional=True, tooltip="What is in the picture; without one it is empty."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="The sampler's cfg. 1 loses least, above it the way back is less exact.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed where cfg is not 1."),
                io.Int.Input(
                    "refinements", default=REFINEMENTS, min=0, max=50, optional=True,
                    tooltip="Further model calls a step that make the way back exact. 0 is plain DDIM inversion.",
                ),
            ],
            outputs=[
                io.Latent.Output("LATENT", tooltip="To sample from, instead of an empty latent."),
                io.Float.Output("error", display_name="error", tooltip="RMS of the way back against the latent, as a part "
                    "of it."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, latent, steps, scheduler, cfg, positive=None, negative=None, refinements=REFINEMENTS
    ) -> io.NodeOutput:
        inverted, error = invert_latent(
            model, latent, steps=steps, scheduler=scheduler, positive=positive, negative=negative, cfg=cfg,
            refinements=refinements,
        )  # fmt: skip
        return io.NodeOutput(inverted, error, ui={"text": [f"reconstruction error {error:.4f}"]})


NODES = (InvertLatent,)
