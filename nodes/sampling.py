"""Readout-Guided KSampler, Readout Guider, Apply Readout Guidance. Their inputs on guidance are named as its settings."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from ..rg_engine.comfy_host.guided.sampling import guided_ksampler, guided_model, readout_guider
from ..rg_engine.guidance import GuidanceSettings
from .schema import ReadoutTarget, economy, mode_and_strength, schema, strength_keyframes


class ReadoutGuidedKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_ReadoutGuidedKSampler",
            "Readout-Guided KSampler",
            aliases=["readout guidance", "guided sampler", "ksampler", "pose control", "drag sampler"],
            description="KSampler whose picture follows a Readout Target. With strength 0 it is KSampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture; LoRAs and ControlNets work as usual."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
                io.Int.Input("steps", default=20, min=1, max=10000),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS),
                io.Conditioning.Input("positive", tooltip="What should be in the picture."),
                io.Conditioning.Input("negative", tooltip="What should not."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
                ReadoutTarget.Input("target", tooltip="What the picture should read like."),
                *mode_and_strength(),
                strength_keyframes(),
                *economy(),
            ],
            outputs=[io.Latent.Output("LATENT", tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, target, **guidance
    ) -> io.NodeOutput:
        latent = guided_ksampler(
            model, target, GuidanceSettings(**guidance), seed=seed, steps=steps, cfg=cfg, sampler_name=sampler_name,
            scheduler=scheduler, positive=positive, negative=negative, latent=latent_image, denoise=denoise,
        )  # fmt: skip
        return io.NodeOutput(latent)


class ReadoutGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_ReadoutGuider",
            "Readout Guider",
            aliases=["readout guidance", "guider", "custom sampling"],
            description="A guider for SamplerCustomAdvanced whose picture follows a Readout Target.",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive", tooltip="What should be in the picture."),
                io.Conditioning.Input("negative", tooltip="What should not."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01),
                ReadoutTarget.Input("target", tooltip="What the picture should read like."),
                *mode_and_strength(),
                strength_keyframes(),
                *economy(),
            ],
            outputs=[io.Guider.Output("GUIDER")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, target, **guidance) -> io.NodeOutput:
        return io.NodeOutput(readout_guider(model, positive, negative, cfg, target, GuidanceSettings(**guidance)))


class ApplyReadoutGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_ApplyReadoutGuidance",
            "Apply Readout Guidance",
            aliases=["readout guidance", "guided model", "pose control", "detailer", "tiled upscale", "ksampler advanced"],
            description="The model, guided by a Readout Target wherever it is sampled: any sampler node, guider, detailer "
            "or tiled upscaler. Applied twice, the picture follows both. Where crops of a picture are sampled, put Follow "
            "Crops on the positive prompt.",
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture; LoRAs and ControlNets work as usual."),
                ReadoutTarget.Input("target", tooltip="What the picture should read like."),
                *mode_and_strength(),
                strength_keyframes(),
                *economy(),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The guided model; the one that was given stays as it is.")],
        )

    @classmethod
    def execute(cls, model, target, **guidance) -> io.NodeOutput:
        return io.NodeOutput(guided_model(model, target, GuidanceSettings(**guidance)))


NODES = (ReadoutGuidedKSampler, ReadoutGuider, ApplyReadoutGuidance)
