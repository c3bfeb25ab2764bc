"""Load Readout Head, Read Out."""

from __future__ import annotations

from comfy_api.latest import io

from ..rg_engine.comfy_host.folders import find_head, head_names, head_version, load_named_head
from ..rg_engine.comfy_host.loaded.readout import read_out
from ..rg_engine.errors import HeadFileError
from ..rg_engine.types import HEAD_KINDS
from .schema import Readout, ReadoutHead, schema


class LoadReadoutHead(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_LoadReadoutHead",
            "Load Readout Head",
            aliases=["readout guidance", "load head", "control head", "pose head", "depth head"],
            description="Loads a readout head, a small network that reads a diffusion model's features: pose, depth, edges, "
            "appearance or correspondence. Heads lie in models/readout_heads; those named demo_... go with Load Demo Model.",
            inputs=[
                io.Combo.Input(
                    "head_name", options=head_names(), tooltip="A .safetensors or an authors' .pt in models/readout_heads."
                ),
                io.Combo.Input(
                    "kind", options=["auto", *HEAD_KINDS], default="auto",
                    tooltip="What the head reads. auto takes it from the file; choose it where the file does not say.",
                ),
            ],
            outputs=[ReadoutHead.Output("HEAD", display_name="READOUT_HEAD")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, head_name: str) -> bool | str:
        """Older ComfyUIs don't hold a name against the list."""
        try:
            if head_name is not None:
                find_head(head_name)
        except HeadFileError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, head_name: str, kind: str) -> str:
        """A file that was replaced is loaded again."""
        return f"{kind} {head_version(head_name)}"

    @classmethod
    def execute(cls, head_name: str, kind: str) -> io.NodeOutput:
        return io.NodeOutput(load_named_head(head_name, None if kind == "auto" else kind))  # type: ignore[arg-type]


class ReadOut(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_ReadOut",
            "Read Out",
            aliases=["readout", "pose estimator", "depth estimator", "feature preview"],
            description="Shows what a head reads in a latent: an estimator of pose, depth or edges, and a test of whether "
            "a head fits a model. The model runs once.",
            inputs=[
                io.Model.Input("model", tooltip="The model whose features are read."),
                ReadoutHead.Input("head", tooltip="A head trained on this kind of model."),
                io.Latent.Input("latent", tooltip="What to read, from VAE Encode or a sampler."),
                io.Float.Input(
                    "noise_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="How much noise to add before reading, as a part of the diffusion time. Most heads read best at "
                    "a little noise (0.05 to 0.2).",
                ),
                io.Conditioning.Input("positive", optional=True, tooltip="A prompt; without one it is empty."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip="Of the noise."
                ),
            ],
            outputs=[
                Readout.Output("READOUT", tooltip="The readout itself, (B, D, H, W) at the latent's size."),
                io.Image.Output("preview", display_name="preview", tooltip="The readout as a picture; a control, too."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, head, latent, noise_percent, seed, positive=None) -> io.NodeOutput:
        return io.NodeOutput(*read_out(model, head, latent, noise_percent, positive, seed))


NODES = (LoadReadoutHead, ReadOut)
