"""Optimize Noise."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..rg_engine.comfy_host.optimized.node import optimize_noise
from ..rg_engine.optimization import PRESETS, UpdateSettings
from ..rg_engine.optimization import preset as preset_of
from .schema import PictureLoss, ReadoutTarget, schema

OWN = "own settings"


class OptimizeNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_OptimizeNoise",
            "Optimize Noise (DOODL)",
            aliases=["doodl", "reno", "initial noise optimization", "clip guidance", "aesthetic", "end to end"],
            description="KSampler whose noise is improved until the finished picture is what the losses ask for: the "
            "picture is made, measured on its pixels, and the noise moved by the exact gradient through the whole sampling, "
            "again and again. An update takes about as long as four plain pictures; few-step models are the fast case.",
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture; LoRAs and ControlNets work as usual."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Of the noise that it begins with.",
                ),
                io.Int.Input(
                    "steps", default=4, min=1, max=10000, tooltip="Of each picture. Time grows with them, memory does not."
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="As on KSampler; 1 takes half the time.",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="euler is a good one; samplers without a right gradient are refused by name.",
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As on KSampler."
                ),
                io.Conditioning.Input("positive", tooltip="What should be in the picture."),
                io.Conditioning.Input("negative", tooltip="What should not."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise; one of Invert Latent edits that picture."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="As on KSampler; below 1 the noise on latent_image is improved.",
                ),
                io.Vae.Input("vae", tooltip="Decodes each picture for the losses."),
                PictureLoss.Input("loss", optional=True, tooltip="What the finished picture should be."),
                io.Int.Input("updates", default=20, min=0, max=10000, tooltip="Updates of the noise; 0 is KSampler."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=100.0, step=0.05,
                    tooltip="fast: 1 moves the noise by four tenths of its size in an update. reference: "
                    "multiplies the authors' step. 0 is KSampler.",
                ),
                io.Combo.Input(
                    "mode", options=["fast", "reference"], default="fast",
                    tooltip="fast: each update moves as far, whatever the loss. reference: the authors' own rule, whose "
                    "steps are as large as the loss's gradient.",
                ),
                ReadoutTarget.Input(
                    "target", optional=True,
                    tooltip="A Readout Target that the finished picture is read for; its percents do not count.",
                ),
                io.Combo.Input(
                    "couple", options=["none", "edict"], default="none", optional=True,
                    tooltip="edict: the authors' pair of latents, which takes twice as long; for 25 steps or more.",
                ),
                io.Boolean.Input(
                    "keep_norm", default=True, optional=True, tooltip="The noise keeps its size, so that it stays noise."
                ),
                io.Float.Input(
                    "noise", default=0.0, min=0.0, max=1.0, step=0.0001, round=0.000001, optional=True,
                    tooltip="Random noise added to every update; the authors' is 0.0001.",
                ),
                io.Float.Input(
                    "clip", default=0.001, min=0.0, max=10.0, step=0.0001, round=0.000001, optional=True,
                    tooltip="reference: the largest change of a value in an update, before momentum. 0: no limit.",
                ),
                io.Float.Input(
                    "loss_scale", default=1.0, min=0.0, max=1e6, step=0.01, round=0.0001, optional=True,
                    tooltip="reference: multiplies the loss (the authors' grad_scale).",
                ),
                io.Combo.Input(
                    "preset", options=[OWN, *(each.name for each in PRESETS)], default=OWN, optional=True,
                    tooltip="The authors' settings by name, instead of mode, updates, keep_norm, noise, clip and loss_scale "
                    "here. They go with couple edict, 50 steps and cfg 7.5.",
                ),
                io.Combo.Input(
                    "noise_like", options=["norm", "white"], default="white", optional=True,
                    tooltip="fast: what keep_norm keeps. norm: the noise's size. white: its power in each ring of "
                    "frequencies, so that no pattern grows in it.",
                ),
                io.Boolean.Input(
                    "nesterov", default=False, optional=True,
                    tooltip="fast: momentum that looks a step ahead, as ReNO has it. Slower on the demo world.",
                ),
                io.Combo.Input(
                    "noises", options=["first", "all"], default="first", optional=True,
                    tooltip="first: the noise that sampling begins from. all: also each noise that a sampler such as "
                    "euler_ancestral or lcm draws on its way (DNO); the picture then comes from all of them together.",
                ),
            ],
            outputs=[
                io.Latent.Output("LATENT", tooltip="The best picture, finished: to VAE Decode."),
                io.Latent.Output("best_noise", display_name="noise", tooltip="What it comes from, to sample again."),
                io.Image.Output("history", display_name="history", tooltip="The pictures on the way."),
                io.Float.Output("losses", display_name="losses", is_output_list=True, tooltip="Of each picture."),
                io.Image.Output("plot", display_name="plot", tooltip="The losses."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, vae, loss=None,
        updates=20, strength=1.0, mode="fast", target=None, couple="none", keep_norm=True, noise=0.0, clip=0.001,
        loss_scale=1.0, preset=OWN, noise_like="white", nesterov=False, noises="first",
    ) -> io.NodeOutput:  # fmt: skip
        own: dict[str, Any] = {}  # the authors' rule has none of it
        if mode == "fast":
            own = {"keep": noise_like, "nesterov": nesterov, "momentum": 0.9 if nesterov else 0.0}
        settings = UpdateSettings(mode=mode, strength=strength, clip=clip, loss_scale=loss_scale, noise=noise, **own)
        if not keep_norm:
            settings = dataclasses.replace(settings, keep="none")
        if preset != OWN:
            chosen = preset_of(preset)
            settings, updates = dataclasses.replace(chosen.update, strength=strength), chosen.updates
        done = optimize_noise(
            model, vae, loss, target, settings, updates=updates, coupled=couple == "edict", seed=seed, steps=steps, cfg=cfg,
            sampler_name=sampler_name, scheduler=scheduler, positive=positive, negative=negative, latent=latent_image,
            denoise=denoise, noises=noises,
        )  # fmt: skip
        return io.NodeOutput(done.latent, done.noise, done.history, done.losses, done.plot)


NODES = (OptimizeNoise,)
