"""What a step of training an adapter costs, beside ComfyUI's own Train LoRA, on the demo model in the same run."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.learning import AdapterExamples, OftSettings
from ...comfy_host.adapters.training.train import train_adapter
from ...comfy_host.demo_model import load_demo_model
from ...demo.scene_pictures import subject_pictures
from ..demo_world import World
from ..workflow import load_comfyui_nodes

BATCH, PICTURES = 4, 8
FEW, MANY = 2, 10
#: ComfyUI's algorithms that are compared, and its smallest set-up of them that learns as many numbers or more.
COMFYUI = ("LoRA", "OFT")


def oft_cost_table(world: World) -> list[dict[str, Any]]:
    """Seconds a step (the difference of two runs of other lengths), and what is kept for backward at most, in MB."""
    ways: dict[str, Callable[[int], object]] = {
        "Train OFT, attention": lambda steps: _ours(world, steps, layers="attention"),
        "Train OFT, attention, light": lambda steps: _ours(world, steps, layers="attention", graph="light"),
        "Train OFT, transformers": lambda steps: _ours(world, steps, layers="transformers"),
    }
    load_comfyui_nodes("nodes_train.py")
    for algorithm in COMFYUI:
        for checkpointing in (False, True):
            name = f"ComfyUI's Train LoRA, {algorithm}{', checkpointing' if checkpointing else ''}"
            ways[name] = lambda steps, a=algorithm, c=checkpointing: _comfyuis(world, steps, a, c)  # type: ignore[misc]
    rows = []
    for name, train in ways.items():
        taken = []
        for steps in (FEW, MANY):
            began = time.perf_counter()
            train(steps)
            taken.append(time.perf_counter() - began)
        with kept_bytes() as kept:
            train(1)
        rows.append({
            "way": name, "s a step": round((taken[1] - taken[0]) / (MANY - FEW), 3), "kept, MB": round(kept["most"] / 1e6, 1)
        })  # fmt: skip
    return rows


def _ours(world: World, steps: int, *, layers: str, graph: Any = "full") -> None:
    latents, positive = _data(world)
    with torch.inference_mode(False):
        examples = AdapterExamples(latents=latents.clone())
    train_adapter(
        world.model, examples, OftSettings(steps=steps, batch=BATCH, layers=layers, validate_every=0), positive=positive,
        graph=graph,
    )  # fmt: skip


def _comfyuis(world: World, steps: int, algorithm: str, checkpointing: bool) -> None:
    import nodes

    latents, positive = _data(world)
    with torch.inference_mode(False):  # its weights must be no inference tensors
        model, *_ = load_demo_model()
        each = [{"samples": latent[None].clone()} for latent in latents]
        prompts = [[[context.clone(), dict(facts)] for context, facts in positive]]
    node = nodes.NODE_CLASS_MAPPINGS["TrainLoraNode"]
    given: dict[str, Any] = {
        "model": model, "latents": None, "positive": None, "batch_size": BATCH, "steps": steps, "grad_accumulation_steps": 1,
        "learning_rate": 1e-4, "rank": 8, "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32",
        "lora_dtype": "fp32", "algorithm": algorithm, "gradient_checkpointing": checkpointing, "existing_lora": "[None]",
    }  # fmt: skip
    listed = {name: [value] for name, value in given.items()}
    node.execute(**{**listed, "latents": each, "positive": prompts})


def _data(world: World) -> tuple[Tensor, Any]:
    pictures, _ = subject_pictures(0, PICTURES)
    with torch.inference_mode():
        return world.vae.encode(pictures), [[world.clip.encode("a teal figure"), {}]]


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach() if tensor.grad_fn is None else tensor


@contextlib.contextmanager
def kept_bytes() -> Iterator[dict[str, int]]:
    """What tensors saved for backward take at most at a time (``most``), without parameters. What a part that runs again
    needs while it does is not seen."""
    held: Counter[int] = Counter()
    sizes = {"now": 0, "most": 0}

    def release(address: int, size: int) -> None:
        held[address] -= 1
        if not held[address]:
            sizes["now"] -= size

    def pack(tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            if not held[address]:
                sizes["now"] += size
            held[address] += 1
            sizes["most"] = max(sizes["most"], sizes["now"])
            weakref.finalize(kept, release, address, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield sizes
