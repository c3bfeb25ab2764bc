"""The light graph: what it saves, when it is used, and that the picture is the full graph's."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from comfyui_host import engine

LOG = "readout_guidance"
SHAPE = [1, 4, 8, 8]
RUN = {"latent_image": {"samples": torch.zeros(SHAPE)}, "steps": 2}
ONE_MOVE = 0.1  # end_percent: on a network of random weights, several moves at once make much of a last digit


def guided(small, graph, model):
    """The finished latent of a run that is guided with this graph, by the gradient alone: on the way to where features
    should go, a head of random weights makes much of a last digit."""
    settings = engine("guidance").GuidanceSettings(strength=2.0, feature_steps=1)
    return small.plain(
        model=engine("comfy_host.guided.model").guide(model, small.target(end_percent=ONE_MOVE), settings, graph), **RUN
    )


def logged(caplog, words: str) -> list[str]:
    return [record.message for record in caplog.records if record.name == LOG and words in record.message]


@pytest.mark.usefixtures("comfyui")
@pytest.mark.parametrize(("name", "mode"), [("small", "fast"), ("demo", "reference")])
def test_a_guided_step_keeps_less_than_half(name, mode, monkeypatch):
    benchmark, models = engine("lab.cost.benchmark"), engine("lab.cost.models")
    monkeypatch.setattr(benchmark, "STEPS", 2)  # of which one is guided
    shape = dataclasses.replace(models.SHAPES[name], cells=16)
    model = models.random_model(shape, torch.float32)
    heads = models.random_heads(model, shape, 1)
    conds = [models.random_conds(model, shape, seed) for seed in (1, 2)]
    settings = engine("guidance").GuidanceSettings(mode=mode, interval=0.0)
    kept = {}
    for graph in ("full", "light"):
        way = benchmark.Way(heads=1, settings=settings, graph=graph)
        with benchmark.count_kept_bytes(*model.model.diffusion_model.parameters()) as most:
            benchmark.step_seconds(model, way, heads, conds, models.zero_latent(shape, 1))
        kept[graph] = most[0]
    assert 0 < kept["light"] <= kept["full"] / 2


def scaled_by_block(n, context, value, options):
    """An attn1_patch that writes in place, and whose effect depends on where it is."""
    kind, number = options["block"]
    n *= 1.0 + 0.05 * number + 0.1 * (kind == "output")
    return n, context, value


def sharpened(q, k, v, options):
    """An attn2_replace."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(q * 1.5, k, v, options["n_heads"])


def replaced(model):
    for number in range(9):
        model.set_model_attn2_replace(sharpened, "output", number)


def freeu(model):
    from comfy_extras.nodes_freelunch import FreeU

    return FreeU, (1.3, 1.4, 0.9, 0.2)


def pag(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance, (3.0,)


def tome(model):
    """Merges tokens at random."""
    from comfy_extras.nodes_tomesd import TomePatchModel

    return TomePatchModel, (0.5,)


PATCHES = {
    "attn1_patch": lambda model: model.set_model_attn1_patch(scaled_by_block),
    "attn2_replace": replaced,
    "FreeU": freeu,
    "PAG": pag,
    "ToMe": tome,
}


@pytest.mark.parametrize("patch", list(PATCHES))
def test_patches_of_other_nodes_give_the_same_picture(small, patch):
    model = small.model.clone()
    found = PATCHES[patch](model)
    if found is not None:  # one of ComfyUI's nodes
        kind, inputs = found
        model = kind.execute(model, *inputs).result[0] if hasattr(kind, "execute") else kind().patch(model, *inputs)[0]
    torch.manual_seed(7)
    full = guided(small, "full", model)
    torch.manual_seed(7)
    light = guided(small, "light", model)
    unguided = small.plain(model=model, **RUN)
    assert not torch.allclose(unguided, small.plain(**RUN), atol=1e-2)
    assert not torch.allclose(full, unguided, atol=1e-2)
    torch.testing.assert_close(light, full, rtol=1e-3, atol=1e-3)


def test_a_patch_sees_its_own_block_when_blocks_run_again(small):
    """Backward runs them when ``transformer_options`` has long gone on to other blocks."""
    first, again = {}, {}

    def note(n, context, value, options):
        if not torch.is_inference_mode_enabled():
            place = (*options["block"], options["block_index"], int(options["sigmas"][0] * 1000))
            (again if torch.is_grad_enabled() else first)[place] = n.detach().clone()
        return n, context, value

    model = small.model.clone()
    model.set_model_attn1_patch(note)
    guided(small, "light", model)
    assert len(again) >= 10
    for place, n in again.items():
        torch.testing.assert_close(n, first[place])


def has_free(monkeypatch, size: float) -> None:
    import comfy.model_management

    def get_free_memory(dev=None, torch_free_too=False):
        return (size, size) if torch_free_too else size

    monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)


def size_of(model, branches=1):
    backbone = engine("comfy_host.loaded.model").backbone_of(model)
    return engine("comfy_host.loaded.memory").GraphSize(backbone=backbone, heads=(), branches=branches)


def chosen(model, branches=1):
    return engine("comfy_host.loaded.memory").choose_graph(model, size_of(model, branches), SHAPE)


def needed(model, branches=1) -> float:
    """By a guided run with the full graph: what ComfyUI asks for, the weights that are not loaded yet, and the graph."""
    import comfy.model_management

    graph = size_of(model, branches).bytes(model, SHAPE, "full")
    sampling = model.model.memory_required([2, *SHAPE[1:]])
    weights = model.model_size() - model.loaded_size()
    return sampling + weights + graph + comfy.model_management.extra_reserved_memory()


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("branches", [1, 2])
def test_it_is_chosen_where_memory_is_short(small, branches, loaded, monkeypatch, caplog):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    if loaded:
        comfy.model_management.load_models_gpu([small.model])
        assert small.model.loaded_size() > 0
    caplog.set_level(logging.INFO, LOG)
    enough = needed(small.model, branches)
    has_free(monkeypatch, enough + 1)
    assert chosen(small.model, branches) == "full"
    assert not logged(caplog, "")
    has_free(monkeypatch, enough - 1)
    assert chosen(small.model, branches) == "light"
    assert len(logged(caplog, "light graph")) == 1


def test_other_models_that_are_loaded_count_as_free(small, monkeypatch):
    import comfy.model_management
    from small_models import parity_model

    comfy.model_management.unload_all_models()
    other = parity_model()
    comfy.model_management.load_models_gpu([other, small.model])
    assert other.loaded_size() > 0
    has_free(monkeypatch, needed(small.model) - other.loaded_size() + 1)
    assert chosen(small.model) == "full"
    assert chosen(small.model.clone()) == "full"  # a clone's weights are the model's own
    has_free(monkeypatch, needed(small.model) - other.loaded_size() - 1)
    assert chosen(small.model) == "light"


def test_a_run_with_little_memory_is_guided_all_the_same(small, monkeypatch, caplog):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    caplog.set_level(logging.INFO, LOG)
    full = small.sample(small.target(end_percent=ONE_MOVE), **RUN, feature_steps=1)
    assert not logged(caplog, "light graph")
    has_free(monkeypatch, needed(small.model) - 1)
    light = small.sample(small.target(end_percent=ONE_MOVE), **RUN, feature_steps=1)
    assert logged(caplog, "light graph")
    torch.testing.assert_close(light, full, rtol=1e-3, atol=1e-3)


def run_out(small, monkeypatch, times: int) -> list[int]:
    """The network runs out of memory in its first guided passes; gives a list that grows with each."""
    import comfy.model_management

    block = small.model.model.diffusion_model.output_blocks[4][0]
    original, failed = block.forward, []

    def forward(*args):
        if torch.is_grad_enabled() and len(failed) < times:
            failed.append(len(failed))
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return original(*args)

    monkeypatch.setattr(block, "forward", forward)
    return failed


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_without_memory_for_the_full_graph_the_run_goes_on_with_the_light_one(small, mode, monkeypatch, caplog):
    undisturbed = small.sample(small.target(end_percent=ONE_MOVE), **RUN, mode=mode, feature_steps=1)
    assert not logged(caplog, "out of memory")
    failed = run_out(small, monkeypatch, 1)
    picture = small.sample(small.target(end_percent=ONE_MOVE), **RUN, mode=mode, feature_steps=1)
    assert len(failed) == 1
    assert len(logged(caplog, "out of memory")) == 1
    torch.testing.assert_close(picture, undisturbed, rtol=1e-3, atol=1e-3)


def test_without_memory_for_the_light_graph_the_error_is_raised(small, monkeypatch):
    import comfy.model_management

    failed = run_out(small, monkeypatch, 10)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        small.sample(small.target(), **RUN)
    assert len(failed) == 2
