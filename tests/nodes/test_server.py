"""The extension in a real ComfyUI server: what its page is told, and what happens to what the page sends."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from comfyui_host import REPOSITORY
from comfyui_server import Server, running_server
from PIL import Image

KSAMPLER = [
    "model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image", "denoise",
]  # fmt: skip
GUIDANCE = ["strength", "mode", "iterations", "source_cfg"]
OPTIONAL = ["keyframes", "feature_steps", "keep_negative"]

#: Ids, input names in order (required, optional) and output types: shared workflows depend on them, so append only.
CONTRACT: dict[str, tuple[list[str], list[str], list[str]]] = {
    "RG_LoadReadoutHead": (["head_name", "kind"], [], ["READOUT_HEAD"]),
    "RG_ReadoutTarget": (
        ["head", "weight", "start_percent", "end_percent"],
        ["image", "mask", "drag_points", "reference_latent", "previous", "readout", "reference_mask", "keyframes"],
        ["READOUT_TARGET"],
    ),
    "RG_DragPoints": (["points"], ["image", "frames"], ["DRAG_POINTS", "IMAGE"]),
    "RG_ReadoutGuider": (["model", "positive", "negative", "cfg", "target", *GUIDANCE], OPTIONAL, ["GUIDER"]),
    "RG_ReadoutGuidedKSampler": ([*KSAMPLER, "target", *GUIDANCE], OPTIONAL, ["LATENT"]),
    "RG_ApplyReadoutGuidance": (["model", "target", *GUIDANCE], OPTIONAL, ["MODEL"]),
    "RG_ReadOut": (["model", "head", "latent", "noise_percent", "seed"], ["positive"], ["READOUT", "IMAGE"]),
    "RG_LoadDemoModel": ([], ["network"], ["MODEL", "CLIP", "VAE"]),
    "RG_DemoScene": (
        ["seed", "count", "figure_only"],
        ["sequence"],
        ["IMAGE", "IMAGE", "IMAGE", "IMAGE", "STRING", "READOUT", "TRACKS", "MASK"],
    ),
    "RG_TrainReadoutHead": (
        [
            "model", "positive", "kind", "steps", "learning_rate", "batch_size", "accumulate", "width", "sparse", "shift",
            "noise_draws", "precision", "validation_share", "validate_every", "patience", "seed", "checkpoint",
        ],
        ["latents", "images", "vae", "targets", "block"],
        ["READOUT_HEAD", "IMAGE", "IMAGE"],
    ),
    "RG_SaveReadoutHead": (["head", "name", "overwrite"], [], ["STRING"]),
    "RG_InvertLatent": (
        ["model", "latent", "steps", "scheduler", "cfg"], ["positive", "negative", "refinements"], ["LATENT", "FLOAT"],
    ),
    "RG_ReadoutKeyframes": (["keyframes", "interpolation"], ["values"], ["READOUT_KEYFRAMES", "IMAGE"]),
    "RG_FollowCrops": (["positive", "image"], [], ["CONDITIONING"]),
    "RG_OptimizeNoise": (
        [*KSAMPLER, "vae", "updates", "strength", "mode"],
        [
            "loss", "target", "couple", "keep_norm", "noise", "clip", "loss_scale", "preset", "noise_like", "nesterov",
            "noises",
        ],
        ["LATENT", "LATENT", "IMAGE", "FLOAT", "IMAGE"],
    ),
    "RG_ClipLoss": (
        ["clip_vision", "weight", "crops", "crop_power", "crop_loss"],
        ["clip", "text", "image", "previous"],
        ["PICTURE_LOSS"],
    ),
    "RG_AestheticLoss": (
        ["clip_vision", "head", "weight", "target", "crops", "crop_power"],
        ["previous"],
        ["PICTURE_LOSS"],
    ),
    "RG_ClassifierLoss": (["classifier", "label", "weight", "crops", "crop_power"], ["previous"], ["PICTURE_LOSS"]),
    "RG_PictureLoss": (["kind", "weight"], ["image", "mask", "previous"], ["PICTURE_LOSS"]),
    "RG_FitBoundary": (
        ["model", "having", "space", "mixing_step", "steps", "solver", "held_out"],
        ["lacking", "vae", "positive", "labels", "mask", "mask_lacking", "refinements"],
        ["BOUNDARY", "STRING", "IMAGE", "IMAGE"],
    ),
    "RG_BoundaryEdit": (
        ["model", "boundary", "latent", "strength", "move", "cfg", "eta", "seed"],
        [
            "positive", "negative", "mask", "strengths", "distance", "previous", "target", "target_strength", "steps",
            "noise_steps", "refinements", "h_calls",
        ],
        ["LATENT", "STRING", "BOUNDARY_EDIT"],
    ),
    "RG_LoadBoundary": (["boundary_name"], [], ["BOUNDARY"]),
    "RG_SaveBoundary": (["boundary", "name", "overwrite"], [], ["STRING"]),
    "RG_DemoSubject": (["seed", "count"], [], ["IMAGE", "STRING"]),
    "RG_LoadDemoClip": ([], [], ["CLIP_VISION", "CLIP"]),
    "RG_LoadOFT": (
        ["model", "file", "strength"], ["clip", "strength_clip", "coft_eps", "convention", "orthogonal", "oft"],
        ["MODEL", "CLIP", "OFT", "STRING", "CONTROL_NET"],
    ),
    "RG_SaveOFT": (["oft", "name", "format", "precision", "overwrite"], ["model"], ["STRING"]),
    "RG_ExtractOFT": (["model", "changed", "layers", "blocks", "block_size"], [], ["OFT", "STRING"]),
    "RG_TrainOFT": (
        ["model", "positive", "latents", "steps", "learning_rate", "batch_size", "blocks", "block_size", "coft_eps",
         "layers", "prior_weight", "weight_decay", "accumulate", "ema", "schedule", "memory", "precision",
         "validation_share", "validate_every", "preview_every", "seed", "checkpoint"],
        ["class_positive", "class_latents", "negative"], ["MODEL", "OFT", "IMAGE", "STRING"],
    ),
}  # fmt: skip
DEMO_HEAD = REPOSITORY / "rg_engine" / "demo" / "weights" / "heads" / "demo_pose.safetensors"
#: Known from KSampler, or plain; a tooltip would only repeat the name.
NEED_NO_TOOLTIP = {"model", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"}


@pytest.fixture(scope="session")
def started_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(started_server: Server) -> Iterator[Server]:
    """The server; what it logged in a test is shown if the test fails."""
    before = len(started_server.log())
    yield started_server
    print(started_server.log()[before:][-6000:])


@pytest.fixture
def workflow(server: Server) -> Any:
    """workflow(name) is an example workflow as a prompt, in four steps."""
    nodes = server.json("/object_info")

    def read(name: str) -> dict[str, Any]:
        page = json.loads((REPOSITORY / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
        prompt = to_prompt(page, lambda node: nodes[node]["input"])
        for class_type in ("RG_ReadoutGuidedKSampler", "RG_InvertLatent", "KSamplerAdvanced"):
            if any(node["class_type"] == class_type for node in prompt.values()):
                change(prompt, class_type, steps=4)
        return prompt

    return read


def to_prompt(page: dict[str, Any], node_inputs: Any) -> dict[str, Any]:
    """The engine's own conversion, imported by its folder: this process needs no ComfyUI."""
    name = "rg_engine_for_the_server_tests"
    if name not in sys.modules:
        root = REPOSITORY / "rg_engine"
        spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.lab.workflow").to_prompt(page, node_inputs)


def change(prompt: dict[str, Any], class_type: str, **inputs: Any) -> str:
    """Set inputs of the only node of a class; returns its id."""
    (node_id,) = (key for key, node in prompt.items() if node["class_type"] == class_type)
    prompt[node_id]["inputs"].update(inputs)
    return node_id


def picture(server: Server, outputs: dict[str, Any], kind: str = "output") -> Image.Image:
    """The only picture that a run saved (``output``) or previewed (``temp``), as the page loads it."""
    (only,) = pictures(server, outputs, kind)
    return only


def pictures(server: Server, outputs: dict[str, Any], kind: str = "output") -> list[Image.Image]:
    loaded = []
    for output in outputs.values():
        for image in output.get("images", []):
            if image["type"] == kind:
                status, content = server.request(f"/view?filename={image['filename']}&type={kind}")
                assert status == 200
                loaded.append(Image.open(io.BytesIO(content)).convert("RGB"))
    return loaded


def refusal(server: Server, prompt: dict[str, Any], node_id: str) -> str:
    """What the page says about a node of a prompt that is refused when it is handed in."""
    return "\n".join(error["details"] for error in server.refusal(prompt)[node_id]["errors"])


def complaint(server: Server, prompt: dict[str, Any], node_id: str) -> str:
    """What the page says about a node of a prompt that is refused when it is handed in, or fails when the node runs."""
    status, content = server.request("/prompt", {"prompt": prompt})
    answer = json.loads(content)
    if status == 400:
        return "\n".join(error["details"] for error in answer["node_errors"][node_id]["errors"])
    ended = dict(server.finished(answer["prompt_id"])["status"]["messages"])
    assert ended["execution_error"]["node_id"] == node_id
    return ended["execution_error"]["exception_message"]


# What the page is told


def test_the_nodes_are_the_contracts(server):
    ours = {key: node for key, node in server.json("/object_info").items() if key.startswith("RG_")}
    assert set(ours) == set(CONTRACT)
    for node_id, (required, optional, outputs) in CONTRACT.items():
        order = ours[node_id]["input_order"]
        assert order.get("required", []) == required, node_id
        assert order.get("optional", []) == optional, node_id
        assert ours[node_id]["output"] == outputs, node_id


@pytest.mark.parametrize("node_id", CONTRACT)
def test_a_node_explains_itself(server, node_id):
    node = server.json(f"/object_info/{node_id}")[node_id]
    assert node["category"] == "Readout Guidance"
    assert node["description"].endswith(".")
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    silent = {name for name, (_, options) in inputs.items() if not options.get("tooltip")}
    assert silent <= NEED_NO_TOOLTIP


@pytest.mark.parametrize("node_id", CONTRACT)
def test_a_help_page_explains_every_input_of_its_node(server, node_id):
    node = server.json(f"/object_info/{node_id}")[node_id]
    extension = node["python_module"].removeprefix("custom_nodes.")  # as the page finds it
    status, content = server.request(f"/extensions/{extension}/docs/{node_id}.md")
    assert status == 200
    text = content.decode()
    assert text.startswith(f"# {node['display_name']}\n")
    required, optional, _ = CONTRACT[node_id]
    assert re.findall(r"^\| `(\w+)` \|", text.partition("## Outputs")[0], re.MULTILINE) == required + optional


# What happens to what the page sends


@pytest.mark.parametrize("name", ["pose", "depth", "edges"])
def test_an_example_workflow_of_the_demo_model_makes_pictures(server, workflow, name):
    prompt = workflow(name)
    outputs = server.run(prompt)
    guided, read = picture(server, outputs), picture(server, outputs, "temp")
    assert guided.size == read.size == (128, 128)
    assert max(high - low for low, high in guided.getextrema()) > 0, "the picture is one flat colour"
    change(prompt, "RG_ReadoutGuidedKSampler", strength=0.0)
    assert guided.tobytes() != picture(server, server.run(prompt)).tobytes(), "guidance changed nothing"


@pytest.mark.parametrize("name", ["drag", "drag_object", "drag_photo", "identity"])
def test_an_example_workflow_of_an_edit_makes_pictures(server, workflow, name):
    prompt = workflow(name)
    guided = pictures(server, server.run(prompt))
    assert [each.size for each in guided] == [(128, 128)] * (4 if name == "drag_object" else 1)  # dragged in four frames
    change(prompt, "RG_ReadoutGuidedKSampler", strength=0.0)
    plain = pictures(server, server.run(prompt))[0]
    assert all(each.tobytes() != plain.tobytes() for each in guided), "guidance changed nothing"


def test_the_example_workflow_of_a_guided_model_makes_a_picture_for_each_strength_from_one_noise(server, workflow):
    prompt = workflow("apply")
    guided = [each.tobytes() for each in pictures(server, server.run(prompt))]
    change(prompt, "RG_ApplyReadoutGuidance", strength=0.0)
    plain = [each.tobytes() for each in pictures(server, server.run(prompt))]
    assert len(plain) == 4
    assert len(set(plain)) == 1, "without guidance the pictures differ"
    assert guided[0] == plain[0], "the picture of strength 0 is guided"
    assert len(set(guided)) == 4, "a strength changed nothing"


def test_the_oft_workflow_teaches_a_figure_saves_it_and_steers_it(server, workflow):
    prompt = workflow("oft")
    change(prompt, "RG_TrainOFT", steps=6, preview_every=3)
    (classes,) = (n["inputs"] for n in prompt.values() if n["class_type"] == "KSampler")
    classes["steps"] = 2
    outputs = server.run(prompt)
    shown = [image["type"] for output in outputs.values() for image in output.get("images", ())]
    assert sorted(shown) == ["output"] * 4 + ["temp"] * (8 + 1 + 4), "four pictures; the figure, the loss and the poses"
    texts = [output["text"][0] for output in outputs.values() if "text" in output]
    assert "my_figure.safetensors" in texts
    assert any("6 steps in" in text and "drift" in text for text in texts)
    names = server.json("/object_info/RG_LoadOFT")["RG_LoadOFT"]["input"]["required"]["file"][1]["options"]
    assert "my_figure.safetensors" in names


def test_the_training_workflow_trains_a_head_saves_it_and_steers_with_it(server, workflow):
    prompt = workflow("train_head")
    change(prompt, "RG_TrainReadoutHead", steps=10, batch_size=4)
    (scenes,) = (n["inputs"] for n in prompt.values() if n["class_type"] == "RG_DemoScene" and n["inputs"]["count"] > 1)
    scenes["count"] = 12
    outputs = server.run(prompt)
    shown = [image["type"] for output in outputs.values() for image in output.get("images", ())]
    assert sorted(shown) == ["output"] * 4 + ["temp"] * 2, "four pictures, the loss plot and the readouts"
    assert [output["text"] for output in outputs.values() if "text" in output] == [["my_pose_head.safetensors"]]
    loader = server.json("/object_info/RG_LoadReadoutHead")["RG_LoadReadoutHead"]
    assert "my_pose_head.safetensors" in loader["input"]["required"]["head_name"][1]["options"]
    change(prompt, "RG_ReadoutGuidedKSampler", strength=0.0)
    unguided = server.run(prompt)

    def saved(outputs: dict[str, Any]) -> list[bytes]:
        names = [image["filename"] for output in outputs.values() for image in output.get("images", ())]
        found = (server.request(f"/view?filename={name}&type=output") for name in names)
        return [content for status, content in found if status == 200]

    assert len(saved(outputs)) == 4
    assert not set(saved(outputs)) & set(saved(unguided)), "guidance changed nothing"


CHECKPOINT, PARTS = {("CheckpointLoaderSimple", "ckpt_name")}, {("UNETLoader", "unet_name"), ("VAELoader", "vae_name")}
FILES = {
    "pose_sd15": CHECKPOINT,
    "pose_sdxl": CHECKPOINT,
    "train_flux": PARTS | {("DualCLIPLoader", "clip_name1"), ("DualCLIPLoader", "clip_name2")},
    "train_z_image": PARTS | {("CLIPLoader", "clip_name")},
}


@pytest.mark.parametrize("name", list(FILES))
def test_an_example_workflow_of_a_big_model_lacks_its_files_only(server, workflow, name):
    refused = server.refusal(workflow(name))
    lacking = {(node["class_type"], e["extra_info"]["input_name"]) for node in refused.values() for e in node["errors"]}
    # ComfyUI 0.3.75 does not look at a V3 node's choices (the head's name) before the node runs; 0.33 does.
    assert lacking - {("RG_LoadReadoutHead", "head_name")} == FILES[name] | {("LoadImage", "image")}


def test_a_head_outside_the_folder_is_not_loaded_though_it_exists(server, workflow):
    prompt = workflow("pose")
    shutil.copy(DEMO_HEAD, server.base / "models" / "secret.safetensors")
    loader = change(prompt, "RG_LoadReadoutHead", head_name="../secret.safetensors")
    assert "'../secret.safetensors'" in complaint(server, prompt, loader)


def test_a_head_put_into_the_folder_can_be_chosen_at_once(server, workflow):
    prompt = workflow("pose")
    shutil.copy(DEMO_HEAD, server.base / "models" / "readout_heads" / "mine.safetensors")
    loader = server.json("/object_info/RG_LoadReadoutHead")["RG_LoadReadoutHead"]  # what the page asks for on refresh
    assert "mine.safetensors" in loader["input"]["required"]["head_name"][1]["options"]
    change(prompt, "RG_LoadReadoutHead", head_name="mine.safetensors")
    assert server.run(prompt)


def test_a_target_that_ends_before_it_starts_is_refused(server, workflow):
    prompt = workflow("pose")
    target = change(prompt, "RG_ReadoutTarget", start_percent=0.7, end_percent=0.6)
    assert "start_percent 0.7 is not before end_percent 0.6: the target would never guide" in refusal(server, prompt, target)


def test_malformed_points_are_refused_where_they_are_wrong(server):
    prompt = {
        "1": {"class_type": "RG_DragPoints", "inputs": {"points": '{"version": 1, "drags": [}'}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 1]}},
    }
    assert "points is not JSON (line 1, column 26): expected {" in refusal(server, prompt, "1")


def keyframes_prompt(**inputs):
    """Readout Keyframes and its preview."""
    return {
        "1": {"class_type": "RG_ReadoutKeyframes", "inputs": {"interpolation": "linear", **inputs}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 1]}},
    }


def test_malformed_keyframes_are_refused_where_they_are_wrong(server):
    prompt = keyframes_prompt(keyframes="0.0: 1\n0.5 1")
    assert "line 2 of keyframes is '0.5 1': expected a percent, a colon and a value" in refusal(server, prompt, "1")


def test_keyframes_are_drawn_from_text_and_from_other_nodes(server):
    text = keyframes_prompt(keyframes="0.0: 1\n0.5: 0.5")
    number = keyframes_prompt(keyframes="0.0: 1", values=["3", 0])
    number["3"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 0.5}}
    for prompt in (text, number):
        assert len(server.run(prompt)["2"]["images"]) == 1


def test_after_an_interrupt_a_prompt_gives_what_it_gave_before(server, workflow):
    prompt, long = workflow("pose"), workflow("pose")
    change(prompt, "RG_ReadoutGuidedKSampler", seed=2)
    before = picture(server, server.run(prompt))
    change(long, "RG_ReadoutGuidedKSampler", steps=1000, mode="reference")
    stopped = server.queue(long)
    server.wait(lambda: re.search(r"\b[1-9]\d*/1000\b", server.log()), "a few of the steps")
    server.request("/interrupt", {})
    assert "execution_interrupted" in dict(server.finished(stopped)["status"]["messages"])
    change(prompt, "RG_ReadoutGuidedKSampler", source_cfg=1.0)  # a pose ignores it, but ComfyUI's cache of results does not
    assert picture(server, server.run(prompt)).tobytes() == before.tobytes()
