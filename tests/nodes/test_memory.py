"""The memory that is asked for covers the graph, on the shapes that people run (counted without computing anything)."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.usefixtures("comfyui")


@contextlib.contextmanager
def most_kept(network, *others):
    """Counts the bytes that are kept for backward at a time, weights (and others) apart; gives a list of the most."""
    weights = {p.untyped_storage()._cdata for p in (*network.parameters(), *others)}
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
    cells = shape.cells**2
    assert 0.95 * most[0] <= 2 * cells * memory.GRAPH_ELEMENTS_PER_CELL[backbone.name][graph] <= 1.1 * most[0]
    features_in_fp32 = 4 * sum(map_.numel() for map_ in maps)
    assert 0.95 * features_in_fp32 <= 4 * cells * memory.FEATURE_ELEMENTS_PER_CELL <= 1.1 * features_in_fp32
    of_head, estimated = kept_by_head(graph == "light", maps)
    assert 0.9 * of_head <= estimated <= 1.1 * of_head
    head = SimpleNamespace(network=engine("heads.aggregation").AggregationNetwork(backbone.channels, output_channels=3))
    for branches in (1, 2):
        size = memory.GraphSize(backbone=backbone, heads=(head, head), branches=branches)
        roomy = memory.with_room_for_graph(patcher, size, latent, graph)
        plain, asked = (model.memory_required([2 * b, *latent[1:]]) for b in (1, roomy[0]))
        assert asked >= plain + branches * most[0] + 2 * features_in_fp32 + of_head


def kept_by_head(light, maps) -> tuple[int, int]:
    """Bytes that a head of the authors' size keeps for backward: counted, and by its own count.

    Of bottlenecks that run again those of one are counted (torch's checkpoint has hooks of its own).
    """
    aggregation = engine("heads.aggregation")
    size = tuple(maps[-1].shape[-2:])
    with FakeTensorMode(), torch.inference_mode(False), torch.enable_grad():
        network = aggregation.AggregationNetwork([map_.shape[1] for map_ in maps], output_channels=3).requires_grad_(False)
        copies = [torch.empty(map_.shape, requires_grad=True) for map_ in maps]
        with most_kept(network, *copies) as whole:
            readout = network(copies, torch.empty(1, network.emb_width), size, light=light)
        with most_kept(network, *copies) as one:
            again = network.bottleneck_layers[-1](copies[-1], torch.empty(1, network.emb_width), size)
        del readout, again
    aggregation._interpolation.cache_clear()  # of tensors without numbers
    return whole[0] + (one[0] if light else 0), 4 * math.prod(size) * network.kept_channels(light)


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
    size = engine("comfy_host.memory").GraphSize(
        backbone=guided_model.backbone_of(small.model), heads=(small.head("spatial"),), branches=branches
    )
    needed = size.bytes(small.model, [1, 4, 16, 16], graph)
    assert needed <= all_pictures - picture < needed + picture
