"""The memory that is asked for covers the graph, on the shapes that people run (counted without computing anything)."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.usefixtures("comfyui")


@contextlib.contextmanager
def most_kept(network):
    """Counts the bytes that are kept for backward at a time, weights apart; gives a list of the most."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    counts: dict[int, int] = {}
    now, most = [0], [0]

    class Kept:
        def __init__(self, tensor):
            self.tensor, self.storage = tensor.detach(), tensor.untyped_storage()
            self.count(1)
            most[0] = max(most[0], now[0])

        def __del__(self):
            self.count(-1)

        def count(self, change):
            key = self.storage._cdata
            before = counts.get(key, 0)
            counts[key] = before + change
            if key not in weights and 0 in (before, counts[key]):
                now[0] += change * self.storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield most


@pytest.mark.parametrize("graph", ["full", "light"])
@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_the_estimate_is_near_what_is_kept(shape, graph):
    import comfy.supported_models
    from comfy.ldm.modules.attention import attention_pytorch

    memory, features = engine("comfy_host.memory"), engine("features")
    shape = engine("lab.benchmark_models").SHAPES[shape]
    xl = shape.config["adm_in_channels"] is not None
    latent = [1, 4, shape.cells, shape.cells]
    with FakeTensorMode(), torch.inference_mode(False), torch.enable_grad():
        described = (comfy.supported_models.SDXL if xl else comfy.supported_models.SD15)(dict(shape.config))
        described.unet_config["dtype"] = torch.float16
        model = described.get_model({}, "")
        network = model.diffusion_model.requires_grad_(False)
        backbone = features.detect_backbone(network)
        x = torch.randn(latent, dtype=torch.float16, requires_grad=True)
        context = torch.randn(1, 77, shape.config["context_dim"], dtype=torch.float16)
        pooled = {"y": torch.randn(1, 2816, dtype=torch.float16)} if xl else {}
        options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}
        scope = engine("comfy_host.gradient_scope").GradientScope(network, graph)
        with scope, features.FeatureTap(network, backbone) as tap, most_kept(network) as most:
            network(x, torch.tensor([500.0]), context=context, transformer_options=options, **pooled)
            maps, _ = tap.take()
            if graph == "light":  # what runs again in backward keeps something too, on top of what is still kept
                torch.autograd.grad(maps, x, [torch.ones_like(map_) for map_ in maps])
    patcher = SimpleNamespace(model=model, model_dtype=lambda: torch.float16)
    estimated = memory.graph_bytes(patcher, backbone, latent, graph) / (1 + memory.BACKWARD_SHARE)
    assert 0.95 * most[0] <= estimated <= 1.1 * most[0]
    for branches in (1, 2):
        roomy = memory.with_room_for_graph(patcher, backbone, latent, graph, branches)
        plain, asked = (model.memory_required([2 * b, *latent[1:]]) for b in (1, roomy[0]))
        assert asked >= plain + branches * most[0]


@pytest.mark.parametrize("graph", ["full", "light"])
@pytest.mark.parametrize(("mode", "branches"), [("fast", 1), ("reference", 2)])
def test_a_run_asks_for_the_graphs_of_as_many_branches_as_it_guides_at_once(small, mode, branches, graph):
    from comfy.patcher_extension import WrappersMP

    guided_model = engine("comfy_host.guided_model")
    asked = []

    def prepare(executor, model, noise_shape, *args, **kwargs):
        asked.append(noise_shape)
        return executor(model, noise_shape, *args, **kwargs)

    settings = engine("guidance").GuidanceSettings(mode=mode)
    guided = guided_model.guide(small.model, small.target(), settings, graph)
    guided.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", prepare)
    small.plain(model=guided, steps=3)
    (asked_shape,) = asked
    picture, all_pictures = (small.model.model.memory_required([2 * b, 4, 16, 16]) for b in (1, asked_shape[0]))
    one = engine("comfy_host.memory").graph_bytes(small.model, guided_model.backbone_of(small.model), [1, 4, 16, 16], graph)
    assert branches * one <= all_pictures - picture < branches * one + picture
