"""Train Readout Head, Save Readout Head."""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io

from ..rg_engine.comfy_host.folders import save_named_head
from ..rg_engine.comfy_host.training.node import train_in_graph
from ..rg_engine.training import TrainingSettings
from ..rg_engine.training.settings import Precision
from ..rg_engine.types import HEAD_KINDS
from .schema import Readout, ReadoutHead, Tracks, schema

DEFAULTS = TrainingSettings()


class TrainReadoutHead(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_TrainReadoutHead",
            "Train Readout Head",
            aliases=["readout guidance", "train control", "train pose", "finetune", "lora training"],
            description="Trains a head on the model that is loaded, which stays as it is. 100 pictures with their "
            "control maps (from any preprocessor node) are enough to begin with. An interrupt saves the best head so "
            "far.",
            inputs=[
                io.Model.Input("model", tooltip="The model whose features the head learns to read."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt of the pictures. An empty CLIP Text Encode is a good one."
                ),
                io.Combo.Input(
                    "kind", options=list(HEAD_KINDS), default="spatial",
                    tooltip="spatial: control pictures (pose, depth, edges). keypoint: heat maps, one a joint. "
                    "correspondence: pairs of pictures and point tracks. appearance: triplets of pictures (one, the "
                    "same identity elsewhere, another identity). lgp: encoded edge maps, as Sketch-Guided Diffusion.",
                ),
                io.Int.Input("steps", default=DEFAULTS.steps, min=1, max=1000000, tooltip="Optimiser steps."),
                io.Float.Input(
                    "learning_rate", default=DEFAULTS.learning_rate, min=1e-6, max=0.1, step=1e-5, round=1e-6,
                    tooltip="Lower it where the loss jumps about.",
                ),
                io.Int.Input("batch_size", default=DEFAULTS.batch, min=1, max=1024, tooltip="Examples a step."),
                io.Int.Input(
                    "accumulate", default=1, min=1, max=1024,
                    tooltip="Parts that a batch is learned in, one after another: the same result in less memory.",
                ),
                io.Combo.Input(
                    "width", options=["384", "256", "128", "64"], default="384",
                    tooltip="Channels of the head. 384 is the paper's (6 to 8M parameters); the demo model needs 64.",
                ),
                io.Boolean.Input(
                    "sparse", default=True,
                    tooltip="Targets are mostly black (pose, edges, heat maps): black and the rest count alike. Off "
                    "for depth.",
                ),
                io.Float.Input(
                    "shift", default=DEFAULTS.shift, min=0.0, max=0.5, step=0.005,
                    tooltip="Moves examples about by up to so much of the picture, where what they show may stand anywhere.",
                ),
                io.Int.Input(
                    "noise_draws", default=0, min=0, max=1000,
                    tooltip="0: new noise every step. Else so many for each example, whose features are kept in "
                    "memory: faster when the model is large.",
                ),
                io.Combo.Input("precision", options=list(get_args(Precision)), default="fp32", tooltip="Of the head's "
                    "arithmetic."),
                io.Float.Input(
                    "validation_share", default=0.1, min=0.0, max=0.5, step=0.01,
                    tooltip="Examples kept back to see how good the head is on what it has not learned. The best one "
                    "counts.",
                ),
                io.Int.Input(
                    "validate_every", default=DEFAULTS.validate_every, min=0, max=100000, tooltip="Steps; 0 never."
                ),
                io.Int.Input(
                    "patience", default=0, min=0, max=1000,
                    tooltip="Stop after so many validations without a better one; 0 never.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
                io.String.Input(
                    "checkpoint", default="",
                    tooltip="A name: the training is saved every minute (output/readout_heads) and goes on from there "
                    "when it is queued again. Empty: not.",
                ),
                io.Latent.Input("latents", optional=True, tooltip="The pictures through VAE Encode."),
                io.Image.Input("images", optional=True, tooltip="Instead of latents: the pictures, with vae."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes images."),
                io.MultiType.Input(
                    "targets", types=[io.Image, Readout, io.Latent, Tracks, io.Mask], optional=True,
                    tooltip="What the head should read: control pictures (spatial), heat maps (keypoint), a latent "
                    "(lgp), tracks (correspondence), masks or nothing (appearance).",
                ),
                io.String.Input(
                    "block", default="", optional=True,
                    tooltip="Which block of the model the head reads: its name (double_blocks.9, layers.11) or its number, "
                    "from 0. Empty: a transformer's usual one, all maps of a UNet. An earlier block makes guided steps "
                    "cheaper.",
                ),
            ],
            outputs=[
                ReadoutHead.Output("HEAD", display_name="READOUT_HEAD"),
                io.Image.Output("loss_plot", display_name="loss plot"),
                io.Image.Output("readouts", display_name="readouts", tooltip="Of examples kept back, above their targets."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, kind, steps, learning_rate, batch_size, accumulate, width, sparse, shift, noise_draws,
        precision, validation_share, validate_every, patience, seed, checkpoint, latents=None, images=None, vae=None,
        targets=None, block="",
    ) -> io.NodeOutput:  # fmt: skip
        settings = TrainingSettings(
            steps=steps, learning_rate=learning_rate, batch=batch_size, accumulate=accumulate, shift=shift,
            noise_draws=noise_draws, precision=precision, validation_share=validation_share, validate_every=validate_every,
            patience=patience, seed=seed,
        )  # fmt: skip
        return io.NodeOutput(
            *train_in_graph(
                model, positive, latents, images, vae, targets, kind=kind, sparse=sparse, projection=int(width),
                settings=settings, checkpoint=checkpoint, block=block,
            )
        )  # fmt: skip


class SaveReadoutHead(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_SaveReadoutHead",
            "Save Readout Head",
            aliases=["readout guidance", "save head", "export"],
            description="Saves a head into models/readout_heads, from where Load Readout Head loads it (refresh its list).",
            inputs=[
                ReadoutHead.Input("head", tooltip="From Train Readout Head."),
                io.String.Input("name", default="my_head", tooltip="File name without folder; .safetensors is added."),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace a head of this name; off: number the new one."
                ),
            ],
            outputs=[io.String.Output("head_name", display_name="head_name")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, head, name: str, overwrite: bool) -> io.NodeOutput:
        saved = save_named_head(head, name, overwrite)
        return io.NodeOutput(saved, ui={"text": [saved]})


NODES = (TrainReadoutHead, SaveReadoutHead)
