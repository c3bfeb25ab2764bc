"""The memory that is asked for covers the graph, on the shapes that people run (counted without computing anything)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.mark.parametrize("graph", ["full", "light"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_estimate_is_near_what_is_kept(name, graph):
    memory, shape = engine("comfy_host.loaded.memory"), engine("lab.cost.models").SHAPES[name]
    counts = engine("lab.cost.operations").count(shape, graph)
    cells, backbone = shape.cells**2, counts.backbone
    head = engine("heads.aggregation").AggregationNetwork(backbone.channels, output_channels=3)
    assert 0.95 * counts.kept <= 2 * cells * memory.GRAPH_ELEMENTS_PER_CELL[backbone.name][graph] <= 1.1 * counts.kept
    assert 0.9 * counts.kept_by_head <= 4 * cells * head.kept_channels(graph == "light") <= 1.1 * counts.kept_by_head
    assert 0.95 * counts.features <= 4 * cells * memory.FEATURE_ELEMENTS_PER_CELL <= 1.1 * counts.features

    patcher = SimpleNamespace(model=SimpleNamespace(manual_cast_dtype=None), model_dtype=lambda: torch.float16)
    for branches, kept in ((1, counts.guided_bytes), (2, counts.guided_bytes + counts.kept)):
        size = memory.GraphSize(backbone=backbone, heads=(SimpleNamespace(network=head),) * 2, branches=branches)
        assert kept <= size.bytes(patcher, [1, 4, shape.cells, shape.cells], graph) <= 1.3 * kept


@pytest.mark.parametrize("graph", ["full", "light"])
@pytest.mark.parametrize(
    ("settings", "branches", "maps"),
    [({}, 1, 2), ({"feature_steps": 4}, 1, 5), ({"mode": "reference", "feature_steps": 4}, 2, 2)],
    ids=["fast", "feature target", "reference"],
)
def test_a_run_asks_for_the_graphs_of_as_many_branches_as_it_guides_at_once(small, settings, branches, maps, graph):
    from comfy.patcher_extension import WrappersMP

    guided_model = engine("comfy_host.guided.model")
    asked = []

    def prepare(executor, model, noise_shape, *args, **kwargs):
        asked.append(noise_shape)
        return executor(model, noise_shape, *args, **kwargs)

    guided = guided_model.guide(small.model, small.target(), engine("guidance").GuidanceSettings(**settings), graph)
    guided.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", prepare)
    small.plain(model=guided, steps=3)
    (asked_shape,) = asked
    picture, all_pictures = (small.model.model.memory_required([2 * b, 4, 16, 16]) for b in (1, asked_shape[0]))
    size = engine("comfy_host.loaded.memory").GraphSize(
        backbone=engine("comfy_host.loaded.model").backbone_of(small.model),
        heads=(small.head("spatial"),),
        branches=branches,
        feature_maps=maps,
    )
    needed = size.bytes(small.model, [1, 4, 16, 16], graph)
    assert needed <= all_pictures - picture < needed + picture
