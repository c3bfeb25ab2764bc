"""Load OFT, Save OFT, Extract OFT."""

from __future__ import annotations

from comfy_api.latest import io

from ..rg_engine.adapters import CONVENTIONS, ReadOptions
from ..rg_engine.comfy_host.adapters.folders import NONE, adapter_names, adapter_version, find_adapter
from ..rg_engine.comfy_host.adapters.load import load_oft
from ..rg_engine.errors import AdapterError
from .schema import Oft, schema


class LoadOFT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_LoadOFT",
            "Load OFT",
            aliases=["readout guidance", "oft", "coft", "boft", "lora", "load adapter", "orthogonal finetuning"],
            description="Puts an orthogonal adapter (OFT, COFT, BOFT) on a model, from every tool's files: the authors', "
            "PEFT's, LyCORIS', kohya's, OneTrainer's, ComfyUI's and this extension's. It stays orthogonal at every strength. "
            "Put it before LoRAs.",
            inputs=[
                io.Model.Input("model", tooltip="What the adapter goes on. LoRAs belong after this node."),
                io.Combo.Input(
                    "file", options=adapter_names(), default=NONE,
                    tooltip="From models/oft or models/loras. none: what is connected to oft.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05,
                    tooltip="1 is what the file means, 0 the model itself, -1 the way back. An angle a becomes 2 atan(strength "
                    "tan(a / 2)), so the weights keep their lengths and angles at every strength.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="For files that turn the text encoder too."),
                io.Float.Input(
                    "strength_clip", default=1.0, min=-10.0, max=10.0, step=0.05, optional=True,
                    tooltip="Of the part for the text encoder.",
                ),
                io.Float.Input(
                    "coft_eps", default=0.0, min=0.0, max=1000.0, step=0.00001, round=False, optional=True,
                    tooltip="For the authors' files that were trained with COFT: eps of the training, which the file does not "
                    "say. 0: plain OFT.",
                ),
                io.Combo.Input(
                    "convention", options=list(CONVENTIONS), default="auto", optional=True,
                    tooltip="For PEFT's files without their adapter_config.json: neumann is PEFT's default, cayley is "
                    "use_cayley_neumann off. They turn opposite ways.",
                ),
                io.Boolean.Input(
                    "orthogonal", default=False, optional=True,
                    tooltip="Files of PEFT and OneTrainer are polynomials that are nearly orthogonal. On: exactly orthogonal at "
                    "strength 1 too. Off: as they were trained.",
                ),
                Oft.Input("oft", optional=True, tooltip="Instead of a file: from Train OFT or Extract OFT."),
            ],
            outputs=[
                io.Model.Output("MODEL"),
                io.Clip.Output("CLIP"),
                Oft.Output("OFT", tooltip="What was loaded, for Save OFT in another format."),
                io.String.Output("report", display_name="report", tooltip="Layers, side, angle, energy, what was not used."),
                io.ControlNet.Output("CONTROL_NET", tooltip="Of the authors' control checkpoints, for Apply ControlNet."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        """Older ComfyUIs don't hold a name against the list."""
        try:
            if file not in (None, NONE):
                find_adapter(file)
        except AdapterError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, **_others) -> str:
        """A file that was replaced is loaded again."""
        return NONE if file == NONE else adapter_version(file)

    @classmethod
    def execute(
        cls, model, file, strength, clip=None, strength_clip=1.0, coft_eps=0.0, convention="auto", orthogonal=False, oft=None
    ) -> io.NodeOutput:
        options = ReadOptions(coft_eps=coft_eps, convention=convention)
        loaded = load_oft(
            model, clip, file, oft, strength=strength, clip_strength=strength_clip, options=options, orthogonal=orthogonal
        )
        return io.NodeOutput(
            loaded.model, loaded.clip, loaded.oft, loaded.report, loaded.control, ui={"text": [loaded.report]}
        )


NODES = (LoadOFT,)
