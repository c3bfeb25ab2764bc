"""Train OFT."""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io

from ..rg_engine.adapters.learning import LAYERS, OftSettings
from ..rg_engine.comfy_host.adapters.training.node import train_oft_in_graph
from ..rg_engine.comfy_host.adapters.training.train import Preview
from ..rg_engine.comfy_host.loaded.gradient_scope import Graph
from ..rg_engine.training.loop import Schedule
from ..rg_engine.training.settings import Precision
from .schema import Oft, schema

DEFAULTS = OftSettings()


class TrainOFT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_TrainOFT",
            "Train OFT",
            aliases=["readout guidance", "train lora", "dreambooth", "finetune", "orthogonal finetuning", "coft"],
            description="Teaches the model that is loaded a subject from a few pictures, by turning its layers without "
            "changing the angles between their neurons (OFT). The model stays as it is; the adapter is small. An "
            "interrupt saves the best so far.",
            inputs=[
                io.Model.Input("model", tooltip="The model to teach. It stays as it is; LoRAs on it stay in force."),
                io.Conditioning.Input("positive", tooltip="The prompt of the pictures, with a word for the subject."),
                io.Latent.Input("latents", tooltip="3 to 10 pictures of the subject through VAE Encode."),
                io.Int.Input("steps", default=DEFAULTS.steps, min=1, max=1000000, tooltip="Optimiser steps."),
                io.Float.Input(
                    "learning_rate", default=DEFAULTS.learning_rate, min=1e-7, max=0.1, step=1e-6, round=1e-7,
                    tooltip="6e-5 is the authors'. Higher learns faster; a small model takes 0.002.",
                ),
                io.Int.Input("batch_size", default=DEFAULTS.batch, min=1, max=1024, tooltip="Pictures a step."),
                io.Int.Input(
                    "blocks", default=DEFAULTS.blocks, min=1, max=1024,
                    tooltip="In each layer. Fewer, larger blocks can do more, and are more numbers.",
                ),
                io.Int.Input("block_size", default=0, min=0, max=4096, tooltip="Their size instead; 0: by number."),
                io.Float.Input(
                    "coft_eps", default=0.0, min=0.0, max=1000.0, step=0.00001, round=False,
                    tooltip="COFT: how far each block may go, in the authors' meaning (6e-5 in their script). 0: plain OFT.",
                ),
                io.Combo.Input("layers", options=list(LAYERS), default=DEFAULTS.layers, tooltip="Which layers learn."),
                io.Float.Input(
                    "prior_weight", default=DEFAULTS.prior_weight, min=0.0, max=100.0, step=0.05,
                    tooltip="How much the class pictures count: they keep the model from making its whole class the "
                    "subject.",
                ),
                io.Float.Input(
                    "weight_decay", default=DEFAULTS.weight_decay, min=0.0, max=1.0, step=0.001, tooltip="AdamW's."
                ),
                io.Int.Input(
                    "accumulate", default=1, min=1, max=1024,
                    tooltip="Parts that a batch is learned in, one after another: the same result in less memory.",
                ),
                io.Float.Input(
                    "ema", default=DEFAULTS.ema, min=0.0, max=0.9999, step=0.01, tooltip="Of the average that you get."
                ),
                io.Combo.Input(
                    "schedule", options=list(get_args(Schedule)), default=DEFAULTS.schedule,
                    tooltip="Of the learning rate: falling to 0, or the authors' constant one.",
                ),
                io.Combo.Input(
                    "memory", options=list(get_args(Graph)), default="full",
                    tooltip="light: transformer blocks run twice, and the training takes about a third of the memory.",
                ),
                io.Combo.Input(
                    "precision", options=list(get_args(Precision)), default=DEFAULTS.precision,
                    tooltip="fp32: the model's own arithmetic. fp16: for models that compute in fp16, with scaled "
                    "gradients.",
                ),
                io.Float.Input(
                    "validation_share", default=0.0, min=0.0, max=0.5, step=0.05,
                    tooltip="Pictures kept back, to keep the adapter that is best on them. 0 with few pictures.",
                ),
                io.Int.Input(
                    "validate_every", default=DEFAULTS.validate_every, min=0, max=100000, tooltip="Steps; 0 never."
                ),
                io.Int.Input(
                    "preview_every", default=0, min=0, max=100000,
                    tooltip="Steps between pictures sampled with the adapter in force, shown on the node; 0 never.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
                io.String.Input(
                    "checkpoint", default="",
                    tooltip="A name: the training is saved every minute (output/oft) and goes on from there when it is "
                    "queued again. Empty: not.",
                ),
                io.Conditioning.Input("class_positive", optional=True, tooltip="The prompt of the class pictures."),
                io.Latent.Input(
                    "class_latents", optional=True,
                    tooltip="Pictures of the subject's class, made by the model itself: what a KSampler makes of "
                    "class_positive.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Of the previews; without one it is empty."),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="With the adapter on it."),
                Oft.Output("OFT", tooltip="For Save OFT, or Load OFT at another strength."),
                io.Image.Output("loss_plot", display_name="loss plot"),
                io.String.Output("report", display_name="report", tooltip="Layers, angle, energy, what was not as asked."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, latents, steps, learning_rate, batch_size, blocks, block_size, coft_eps, layers, prior_weight,
        weight_decay, accumulate, ema, schedule, memory, precision, validation_share, validate_every, preview_every, seed,
        checkpoint, class_positive=None, class_latents=None, negative=None,
    ) -> io.NodeOutput:  # fmt: skip
        settings = OftSettings(
            steps=steps, learning_rate=learning_rate, batch=batch_size, blocks=blocks, block_size=block_size,
            coft_eps=coft_eps, layers=layers, prior_weight=prior_weight, weight_decay=weight_decay, accumulate=accumulate,
            ema=ema, schedule=schedule, precision=precision, validation_share=validation_share,
            validate_every=validate_every, seed=seed,
        )  # fmt: skip
        trained = train_oft_in_graph(
            model, positive, latents, settings, class_positive=class_positive, class_latents=class_latents,
            negative=negative, graph=memory, preview=Preview(every=preview_every), checkpoint=checkpoint,
        )  # fmt: skip
        return io.NodeOutput(trained.model, trained.oft, trained.plot, trained.report, ui={"text": [trained.report]})


NODES = (TrainOFT,)
