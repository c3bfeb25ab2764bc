"""Fit Boundary, Boundary Edit, Load Boundary, Save Boundary."""

from __future__ import annotations

from comfy_api.latest import io

from ..rg_engine.boundaries import MOVES, SOLVERS, SPACES
from ..rg_engine.comfy_host.boundary_folder import (
    boundary_names,
    boundary_version,
    find_boundary,
    load_named_boundary,
    save_named_boundary,
)
from ..rg_engine.comfy_host.edits.boundary_edit import Edit, EditSettings, edit_pictures, parse_strengths
from ..rg_engine.comfy_host.edits.boundary_fit import FitSettings
from ..rg_engine.comfy_host.edits.boundary_node import fit_in_graph
from ..rg_engine.comfy_host.edits.passes import Prompts
from ..rg_engine.comfy_host.guided.model import guide
from ..rg_engine.errors import BoundaryError
from ..rg_engine.guidance import GuidanceSettings
from .schema import Boundary, BoundaryEditChain, ReadoutTarget, schema

DEFAULTS = FitSettings()


class FitBoundary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        pictures = [io.Image, io.Latent]
        return schema(
            "RG_FitBoundary",
            "Fit Boundary",
            aliases=["readout guidance", "boundary diffusion", "attribute slider", "concept slider", "latent direction"],
            description="Learns an attribute from pictures that have it and pictures that lack it, without training: ten to "
            "fifty of each kind. Boundary Edit then moves any picture across, with a slider.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will edit. It is not changed."),
                io.MultiType.Input(
                    "having", types=pictures, tooltip="Pictures with the attribute (and vae), or latents; of one size."
                ),
                io.Combo.Input(
                    "space", options=list(SPACES), default=DEFAULTS.space,
                    tooltip="z: the whole latent, for walls, light and what stands in one place in all pictures. region: "
                        "its colours inside a mask, for what stands anywhere. h: the network's innermost features; both: "
                        "z and h, as the paper. On many models h moves nothing: the report says so.",
                ),
                io.Int.Input(
                    "mixing_step", default=0, min=0, max=998,
                    tooltip="The timestep (of 999) at which pictures are told apart and moved. 0: several are tried and the "
                    "best is taken. The paper's is 500.",
                ),
                io.Int.Input(
                    "steps", default=DEFAULTS.steps, min=2, max=999,
                    tooltip="Noise levels from the picture up to the mixing step.",
                ),
                io.Combo.Input(
                    "solver", options=list(SOLVERS), default=DEFAULTS.solver,
                    tooltip="svm: the paper's. mean difference and fisher do nearly the same.",
                ),
                io.Float.Input(
                    "held_out", default=DEFAULTS.share, min=0.0, max=0.5, step=0.05,
                    tooltip="The share of pictures kept back, on which accuracy, flips and change are measured. 0: none.",
                ),
                io.MultiType.Input(
                    "lacking", types=pictures, optional=True, tooltip="Pictures without the attribute, or their latents."
                ),
                io.Vae.Input("vae", optional=True, tooltip="Encodes pictures, and draws the strip."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="A prompt for all pictures, or one each; empty without it. Edit with "
                    "the same one."
                ),
                io.String.Input(
                    "labels", default="", optional=True,
                    tooltip="In place of lacking: 1 for each picture of having that has the attribute, 0 for others: 1 0 "
                        "0 1.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="What it is about, in each picture of having, or one for all."),
                io.Mask.Input("mask_lacking", optional=True, tooltip="The same for the pictures of lacking."),
                io.Int.Input(
                    "refinements", default=0, min=0, max=10, optional=True,
                    tooltip="Further model calls a step of the inversion. 0 is the paper's; more change hardly anything.",
                ),
            ],
            outputs=[
                Boundary.Output("BOUNDARY"),
                io.String.Output("report", display_name="report"),
                io.Image.Output("plot", display_name="plot", tooltip="Accuracy, flips and change at each step tried."),
                io.Image.Output(
                    "strip", display_name="strip", tooltip="Pictures kept back, moved by strengths from -1.5 to 1.5."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, having, space, mixing_step, steps, solver, held_out, lacking=None, vae=None, positive=None, labels="",
        mask=None, mask_lacking=None, refinements=0,
    ) -> io.NodeOutput:  # fmt: skip
        settings = FitSettings(
            space=space, mixing_step=mixing_step, steps=steps, solver=solver, share=held_out, refinements=refinements
        )
        found = fit_in_graph(model, having, lacking, labels, vae, mask, mask_lacking, positive, settings)
        return io.NodeOutput(*found, ui={"text": [found[1]]})


class BoundaryEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_BoundaryEdit",
            "Boundary Edit",
            aliases=["readout guidance", "boundary diffusion", "attribute slider", "concept slider", "edit real photo"],
            description="Moves a picture across a boundary: up to its noise level, one step aside, and down again. The way "
            "up is kept, so the next strength costs the way down only.",
            inputs=[
                io.Model.Input("model", tooltip="The kind of model that the boundary was fitted on; it may be guided."),
                Boundary.Input("boundary", tooltip="From Fit Boundary or Load Boundary."),
                io.Latent.Input(
                    "latent", tooltip="A picture through VAE Encode. An empty latent is sampled, and moved on its way."
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-3.0, max=3.0, step=0.05, display_mode=io.NumberDisplay.slider,
                    tooltip="0 leaves the picture, 1 moves it by the distance of the two kinds of pictures, -1 the other "
                        "way.",
                ),
                io.Combo.Input(
                    "move", options=list(MOVES), default="by",
                    tooltip="by: strength times the two kinds' distance, from where the picture is. to: to the same place "
                        "for every picture, 1 and -1 are the two kinds' means. distance: as the paper's code, in the "
                        "latent's own units.",
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Both ways. 1 loses least."
                ),
                io.Float.Input(
                    "eta", default=0.0, min=0.0, max=1.0, step=0.05,
                    tooltip="Noise on the way down. 0 keeps the picture's details, 1 is the paper's code and makes new "
                        "ones.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Of the noise: where eta is above 0, and of a picture that is sampled.",
                ),
                io.Conditioning.Input("positive", optional=True, tooltip="As it was fitted with; without one it is empty."),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed where cfg is not 1."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the picture is moved. A boundary of a region needs what it is "
                    "about."
                ),
                io.String.Input(
                    "strengths", default="", optional=True,
                    tooltip="A strip: a picture for each of these in one batch, as -2, -1, 0, 1, 2, in place of strength.",
                ),
                io.Float.Input(
                    "distance", default=0.0, min=-100000.0, max=100000.0, step=0.1, optional=True,
                    tooltip="Of move distance, in place of strength.",
                ),
                BoundaryEditChain.Input(
                    "previous", optional=True, tooltip="Another Boundary Edit: its edits are made too, before this one "
                    "and at right "
                    "angles to it."
                ),
                ReadoutTarget.Input("target", optional=True, tooltip="Guides the way down, from Readout Target."),
                io.Float.Input(
                    "target_strength", default=1.0, min=0.0, max=10.0, step=0.05, optional=True, tooltip="Of the target."
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=999, optional=True, tooltip="Levels up to the mixing step. 0: the "
                    "boundary's."
                ),
                io.Int.Input(
                    "noise_steps", default=0, min=0, max=999, optional=True,
                    tooltip="Levels of the whole way, of a picture that is sampled from noise. 0: as dense as steps.",
                ),
                io.Int.Input(
                    "refinements", default=0, min=0, max=10, optional=True,
                    tooltip="Further model calls a step of the inversion, which bring strength 0 closer to the picture.",
                ),
                io.Combo.Input(
                    "h_calls", options=["as the paper's code", "first"], default="as the paper's code", optional=True,
                    tooltip="Of boundaries in h: the paper's code replaces h in the first call and hands on the call "
                        "before's from then on; first: the first call only.",
                ),
            ],
            outputs=[
                io.Latent.Output("LATENT"),
                io.String.Output("report", display_name="report"),
                BoundaryEditChain.Output("edits", display_name="edits", tooltip="For previous of another Boundary Edit."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, strengths: str = "") -> bool | str:
        try:
            parse_strengths(strengths or "")
        except BoundaryError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, boundary, latent, strength, move, cfg, eta, seed, positive=None, negative=None, mask=None, strengths="",
        distance=0.0, previous=None, target=None, target_strength=1.0, steps=0, noise_steps=0, refinements=0,
        h_calls="as the paper's code",
    ) -> io.NodeOutput:  # fmt: skip
        edit = Edit(
            boundary=boundary, strength=distance if move == "distance" else strength, move=move, mask=mask, previous=previous
        )
        settings = EditSettings(
            strengths=parse_strengths(strengths), eta=eta, seed=seed, steps=steps, noise_steps=noise_steps,
            refinements=refinements, stale=h_calls != "first",
        )  # fmt: skip
        prompts = Prompts(positive=positive, negative=negative, cfg=cfg)
        guided = None if target is None else guide(model, target, GuidanceSettings(strength=target_strength))
        made, report = edit_pictures(model, edit, latent, settings, prompts, guided=guided)
        return io.NodeOutput(made, report, edit, ui={"text": [report]})


class LoadBoundary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_LoadBoundary",
            "Load Boundary",
            aliases=["readout guidance", "boundary diffusion", "attribute slider"],
            description="Loads a boundary from models/readout_boundaries.",
            inputs=[
                io.Combo.Input(
                    "boundary_name", options=boundary_names(), tooltip="A .safetensors file that Save Boundary wrote."
                )
            ],
            outputs=[Boundary.Output("BOUNDARY")],
        )

    @classmethod
    def validate_inputs(cls, boundary_name: str) -> bool | str:
        """Older ComfyUIs don't hold a name against the list."""
        try:
            if boundary_name is not None:
                find_boundary(boundary_name)
        except BoundaryError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, boundary_name: str) -> str:
        """A file that was replaced is loaded again."""
        return boundary_version(boundary_name)

    @classmethod
    def execute(cls, boundary_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_named_boundary(boundary_name))


class SaveBoundary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_SaveBoundary",
            "Save Boundary",
            aliases=["readout guidance", "boundary diffusion", "export"],
            description="Saves a boundary into models/readout_boundaries, from where Load Boundary loads it (refresh its "
            "list).",
            inputs=[
                Boundary.Input("boundary", tooltip="From Fit Boundary."),
                io.String.Input("name", default="my_boundary", tooltip="File name without folder; .safetensors is added."),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace a boundary of this name; off: number the new one."
                ),
            ],
            outputs=[io.String.Output("boundary_name", display_name="boundary_name")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, boundary, name: str, overwrite: bool) -> io.NodeOutput:
        saved = save_named_boundary(boundary, name, overwrite)
        return io.NodeOutput(saved, ui={"text": [saved]})


NODES = (FitBoundary, BoundaryEdit, LoadBoundary, SaveBoundary)
