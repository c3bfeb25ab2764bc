"""Load OFT, Save OFT, Extract OFT."""

from __future__ import annotations

from comfy_api.latest import io

from ..rg_engine.adapters import CONVENTIONS, ReadOptions
from ..rg_engine.adapters.learning import LAYERS
from ..rg_engine.adapters.saving import FORMATS
from ..rg_engine.comfy_host.adapters.extract import extract_oft
from ..rg_engine.comfy_host.adapters.folders import NONE, adapter_names, adapter_version, find_adapter
from ..rg_engine.comfy_host.adapters.load import load_oft
from ..rg_engine.comfy_host.adapters.save import PRECISIONS, save_oft
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
            "PEFT's, LyCORIS', kohya's, OneTrainer's, ComfyUI's and this extension's. It stays orthogonal at every "
            "strength. Put it before LoRAs.",
            inputs=[
                io.Model.Input("model", tooltip="What the adapter goes on. LoRAs belong after this node."),
                io.Combo.Input(
                    "file", options=adapter_names(), default=NONE,
                    tooltip="From models/oft or models/loras. none: what is connected to oft.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05,
                    tooltip="1 is what the file means, 0 the model itself, -1 the way back. An angle a becomes 2 "
                    "atan(strength tan(a / 2)), so the weights keep their lengths and angles at every strength.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="For files that turn the text encoder too."),
                io.Float.Input(
                    "strength_clip", default=1.0, min=-10.0, max=10.0, step=0.05, optional=True,
                    tooltip="Of the part for the text encoder.",
                ),
                io.Float.Input(
                    "coft_eps", default=0.0, min=0.0, max=1000.0, step=0.00001, round=False, optional=True,
                    tooltip="For the authors' files that were trained with COFT: eps of the training, which the file does "
                    "not say. 0: plain OFT.",
                ),
                io.Combo.Input(
                    "convention", options=list(CONVENTIONS), default="auto", optional=True,
                    tooltip="For PEFT's files without their adapter_config.json: neumann is PEFT's default, cayley is "
                    "use_cayley_neumann off. They turn opposite ways.",
                ),
                io.Boolean.Input(
                    "orthogonal", default=False, optional=True,
                    tooltip="Files of PEFT and OneTrainer are polynomials that are nearly orthogonal. On: exactly "
                    "orthogonal at strength 1 too. Off: as they were trained.",
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


class SaveOFT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_SaveOFT",
            "Save OFT",
            aliases=["readout guidance", "save oft", "convert oft", "export adapter", "peft", "lycoris"],
            description="Saves an orthogonal adapter into models/oft, in this extension's format or in another tool's, "
            "exactly or not at all. It takes what Load OFT loaded, too, and so converts files.",
            inputs=[
                Oft.Input("oft", tooltip="From Train OFT, Load OFT or Extract OFT."),
                io.String.Input("name", default="my_oft", tooltip="File name without folder."),
                io.Combo.Input(
                    "format", options=list(FORMATS), default="native",
                    tooltip="native holds everything. authors, PEFT, OneTrainer: what turns inputs, as Train OFT's do. "
                    "LyCORIS: what turns outputs. difference: W' - W in full size, for ComfyUI's Load LoRA, which has no "
                    "adapter that turns inputs.",
                ),
                io.Combo.Input(
                    "precision", options=list(PRECISIONS), default="fp32",
                    tooltip="fp16 is half as large; Q in fp16 still gives an orthogonal R.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of this name. Off: number it."),
                io.Model.Input("model", optional=True, tooltip="The model it is for, where the format is not native."),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="Its name in the list, after a refresh.")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, oft, name, format, precision, overwrite, model=None) -> io.NodeOutput:
        saved = save_oft(oft, name, format, model, precision, overwrite)
        return io.NodeOutput(saved, ui={"text": [saved]})


class ExtractOFT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_ExtractOFT",
            "Extract OFT",
            aliases=["readout guidance", "extract oft", "procrustes", "extract lora", "model difference"],
            description="The rotations that best take one model to another (a finetuned one, or one with LoRAs), and how "
            "much of the change no rotation explains.",
            inputs=[
                io.Model.Input("model", tooltip="Where the change starts."),
                io.Model.Input("changed", tooltip="A model finetuned from it, or it with LoRAs."),
                io.Combo.Input("layers", options=list(LAYERS), default="transformers", tooltip="Which layers are compared."),
                io.Int.Input("blocks", default=1, min=1, max=1024, tooltip="Blocks in each layer; 1 explains most."),
                io.Int.Input("block_size", default=0, min=0, max=4096, tooltip="Their size instead; 0: by number."),
            ],
            outputs=[
                Oft.Output("OFT"),
                io.String.Output(
                    "report", display_name="report", tooltip="How far it turns, and what no rotation explains."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, changed, layers, blocks, block_size) -> io.NodeOutput:
        oft, report = extract_oft(model, changed, layers, blocks, block_size)
        return io.NodeOutput(oft, report, ui={"text": [report]})


NODES = (LoadOFT, SaveOFT, ExtractOFT)
