"""Load Demo Model, Load Demo CLIP, Demo Scene, Demo Subject."""

from __future__ import annotations

from comfy_api.latest import io

from ..rg_engine.comfy_host.demo_model import NETWORKS, Network, load_demo_model
from ..rg_engine.comfy_host.demo_model.clip import load_demo_clip
from ..rg_engine.demo.scene_pictures import SEQUENCES, scene_pictures, subject_pictures
from .schema import Readout, Tracks, schema


class LoadDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_LoadDemoModel",
            "Load Demo Model",
            aliases=["readout guidance", "demo", "example model"],
            description="A small text-to-image model that comes with this extension, so that its workflows run without "
            "a download. It draws jointed figures, balls, boxes and cones, 128 pixels square. Prompt it like: a red "
            "figure and a blue ball, grey wall.",
            inputs=[
                io.Combo.Input(
                    "network", options=list(NETWORKS), default=NETWORKS[0], optional=True,
                    tooltip="UNet: of Stable Diffusion's kind, with heads demo_... transformer: of Lumina's and Z-Image's "
                    "kind, with heads demo_transformer_...",
                )
            ],
            outputs=[io.Model.Output("MODEL"), io.Clip.Output("CLIP"), io.Vae.Output("VAE")],
        )  # fmt: skip

    @classmethod
    def execute(cls, network: Network = NETWORKS[0]) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_model(network))


class LoadDemoClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_LoadDemoClip",
            "Load Demo CLIP",
            aliases=["readout guidance", "demo", "clip vision", "clip loss"],
            description="A small picture-text model of the demo world that comes with this extension, for CLIP Loss without "
            "a download. It knows what the demo model draws: a red figure and a blue ball, grey wall.",
            inputs=[],
            outputs=[
                io.ClipVision.Output("CLIP_VISION", tooltip="Reads pictures; to clip_vision of CLIP Loss."),
                io.Clip.Output("CLIP", tooltip="Reads texts, to clip of CLIP Loss; prompts are Load Demo Model's."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_clip())


class DemoScene(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_DemoScene",
            "Demo Scene",
            aliases=["readout guidance", "demo", "procedural", "pose map", "depth map"],
            description="Scenes of the demo world with what is true about them: control pictures for the demo model, "
            "and training pairs for heads.",
            inputs=[
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=True, tooltip="Which scenes."),
                io.Int.Input("count", default=1, min=1, max=4096, tooltip="How many."),
                io.Boolean.Input("figure_only", default=False, tooltip="One figure and nothing else in each."),
                io.Combo.Input(
                    "sequence",
                    options=list(SEQUENCES),
                    default="scenes",
                    optional=True,
                    tooltip="scenes: one by one. pairs: two in a row with the same things elsewhere, to train a "
                    "correspondence head. triplets: three in a row, the third with another figure, to train an "
                    "appearance head.",
                ),
            ],
            outputs=[
                io.Image.Output("picture", display_name="picture"),
                io.Image.Output("pose", display_name="pose", tooltip="Bones on black."),
                io.Image.Output("depth", display_name="depth", tooltip="Near is bright."),
                io.Image.Output("edges", display_name="edges", tooltip="Edges on black."),
                io.String.Output("caption", display_name="caption", tooltip="Of the first scene."),
                Readout.Output("keypoints", display_name="keypoints", tooltip="A heat map a joint, for keypoint heads."),
                Tracks.Output("tracks", display_name="tracks", tooltip="Points of pairs, for correspondence heads."),
                io.Mask.Output("figure", display_name="figure", tooltip="Where the figure is."),
            ],
        )

    @classmethod
    def execute(cls, seed: int, count: int, figure_only: bool, sequence: str = "scenes") -> io.NodeOutput:
        drawn = scene_pictures(seed, count, figure_only, sequence)  # type: ignore[arg-type]
        return io.NodeOutput(
            drawn.picture,
            drawn.pose,
            drawn.depth,
            drawn.edges,
            drawn.captions[0],
            drawn.keypoints,
            drawn.tracks,
            drawn.figure,
        )


class DemoSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_DemoSubject",
            "Demo Subject",
            aliases=["readout guidance", "demo", "dreambooth", "subject", "train oft"],
            description="Pictures of one figure that the demo model does not know, to teach it with Train OFT. Its word is "
            "teal: a teal figure, grey wall.",
            inputs=[
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=True, tooltip="Poses, places and walls."
                ),
                io.Int.Input("count", default=8, min=1, max=4096, tooltip="How many pictures."),
            ],
            outputs=[
                io.Image.Output("picture", display_name="picture"),
                io.String.Output("caption", display_name="caption", tooltip="Of the first picture."),
            ],
        )

    @classmethod
    def execute(cls, seed: int, count: int) -> io.NodeOutput:
        pictures, scenes = subject_pictures(seed, count)
        return io.NodeOutput(pictures, scenes[0].caption())


NODES = (LoadDemoModel, DemoScene, DemoSubject, LoadDemoClip)
