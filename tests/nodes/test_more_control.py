"""More control for each backward pass: targets in feature space, and guided steps without the negative prompt's pass."""

from __future__ import annotations

import copy

import pytest
import torch
from comfyui_host import engine, node
from small_models import PARITY, parity_model

SIGMA = 3.0


def guided(small, model=None, target=None, **settings):
    """A guided model."""
    given = engine("guidance").GuidanceSettings(**{"strength": 2.0, **settings})
    return engine("comfy_host.guided.model").guide(model or small.model, target or small.target(), given)


def counted(model):
    """A clone of a model, and the list of the rows of its network's passes."""
    from comfy.patcher_extension import WrappersMP

    rows, clone = [], model.clone()

    def apply(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", apply)
    return clone, rows


@pytest.mark.usefixtures("comfyui")
@pytest.mark.parametrize("graph", ["full", "light"])
def test_the_way_to_the_target_in_feature_space_is_taken_back_through_the_network(graph):
    """J^T (f - f*), by plain autograd."""
    features, guidance = engine("features"), engine("guidance")
    gap_of = engine("guidance.feature_target").feature_gap
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 8, 32, generator=generator)
    x, control, sigma, scale = (
        x * (1 + SIGMA**2) ** 0.5,
        torch.rand(1, 16, 16, 3),
        torch.full((2,), SIGMA),
        (1 + SIGMA**2) ** -0.5,
    )
    target = guidance.Target(head=engine("heads").load_head(PARITY / "head_spatial.pt"), image=control)
    with torch.inference_mode(False), torch.enable_grad():
        objective = guidance.Objective((target,), (16, 16), 2, torch.device("cpu"))
        model, leaf = parity_model(), x.clone().requires_grad_()
        network = model.model.diffusion_model.requires_grad_(False)
        options = {"optimized_attention_override": engine("comfy_host.guided.attention").ATTENTION[graph]}
        with features.FeatureTap(network, features.detect_backbone(network)) as tap:
            model.model.apply_model(leaf, sigma, c_crossattn=context.clone(), transformer_options=options)
            maps, emb = tap.take()

        shapes = [map_.shape[1:] for map_ in maps]

        def as_maps(rows):
            pieces = rows.split([shape.numel() for shape in shapes], 1)
            return [piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True)]

        def evaluate(at):
            rows = at.detach().requires_grad_()
            z = (leaf * scale).detach()
            branch = guidance.Branch(features=as_maps(rows), emb=emb.detach(), z=z, noise_level=sigma * scale)
            loss, _ = objective.loss(branch, (0,), None)
            return loss.detach(), torch.autograd.grad(loss.sum(), rows)[0]

        rows = torch.cat([map_.detach().flatten(1) for map_ in maps], 1)
        gap = gap_of(rows, evaluate(rows), evaluate, 4)
        wanted = torch.autograd.grad(maps, leaf, as_maps(gap), retain_graph=True)[0] / scale
        plain = torch.autograd.grad(maps, leaf, as_maps(evaluate(rows)[1]))[0] / scale
    model = parity_model()
    backbone = engine("comfy_host.loaded.model").backbone_of(model)
    scope = engine("comfy_host.loaded.gradient_scope").GradientScope(model.model.diffusion_model, graph)
    reader = engine("comfy_host.guided.branches").BranchReader(
        backbone, objective, x, active=(0,), scope=scope, feature_steps=4
    )  # fmt: skip
    seen = reader.install({})["transformer_options"]
    model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=seen)
    assert (reader.gradient - wanted).norm() <= 1e-4 * wanted.norm()
    assert torch.cosine_similarity(plain.flatten(1), wanted.flatten(1)).max() < 0.99  # another direction than the gradient's


def test_a_look_has_no_target_in_feature_space(small):
    """Nobody knows the least value of its loss: the gradient is taken."""
    target = small.target("appearance", reference_latent={"samples": small.plain(seed=7)})
    one, many = (small.plain(model=guided(small, target=target, feature_steps=steps)) for steps in (1, 4))
    assert torch.equal(one, many)


def test_reference_mode_takes_neither(small):
    settings = {"mode": "reference", "iterations": 2}
    model = guided(small, **settings, feature_steps=4, keep_negative=2)
    alone = guided(small, **settings, feature_steps=1, keep_negative=0)
    assert torch.equal(small.plain(model=model), small.plain(model=alone))


def test_guided_steps_run_one_prompt_where_the_other_is_kept(small, caplog):
    """Of six steps three are guided: the first one has nothing to keep yet, and at most so many in a row keep it."""
    caplog.set_level("INFO", "readout_guidance")
    found = {}
    for most in (0, 1, 2, 9):
        model, rows = counted(small.model)
        small.plain(model=guided(small, model, interval=0.0, keep_negative=most, strength=0.1))
        found[most] = sum(rows)
    assert found == {0: 12, 1: 11, 2: 10, 9: 10}
    said = [record.message for record in caplog.records if "guided 3 of 6 steps" in record.message]
    assert ["without the negative prompt's pass" in line for line in said] == [False, True, True, True]
    assert "; 2 of them without" in said[-1]


def test_pictures_that_do_not_move_are_made_by_both_prompts(small):
    keyframes, _ = node("RG_ReadoutKeyframes", keyframes=["0.0: 0, 1"], interpolation=["linear"])
    latent = {"samples": torch.zeros(2, 4, 16, 16)}
    guided_pictures = small.plain(model=guided(small, keyframes=keyframes, strength=0.5), latent_image=latent)
    torch.testing.assert_close(guided_pictures[:1], small.plain(latent_image=latent)[:1], rtol=1e-3, atol=1e-3)


def test_prompts_that_do_not_differ_are_kept_without_a_trace(small):
    """The difference kept is 0, so that the picture is the one without."""
    alike = {"negative": [[small.positive[0][0].clone(), {}]]}
    kept, plain = (small.plain(model=guided(small, interval=0.0, keep_negative=k), **alike) for k in (2, 0))
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-4)


def test_what_is_kept_is_close_to_what_it_stands_for(small):
    """Much closer than leaving the negative prompt out (cfg 1 there) would be."""
    settings = {"steps": 30, "sampler_name": "euler_ancestral"}
    kept, plain = (small.plain(model=guided(small, keep_negative=k, feature_steps=1), **settings) for k in (1, 0))
    without = small.plain(model=guided(small, feature_steps=1), **settings, cfg=1.0)
    assert not torch.equal(kept, plain)
    assert (kept - plain).norm() < 0.2 * (without - plain).norm()


def test_without_a_negative_prompt_nothing_is_kept(small):
    kept, plain = (small.plain(model=guided(small, keep_negative=k), cfg=1.0) for k in (2, 0))
    assert torch.equal(kept, plain)


def test_parts_of_the_picture_run_both_prompts(small):
    """What was seen of the whole says nothing of a part, and the other way round: another latent's shape is let through."""
    kept_prompt = engine("comfy_host.guided.run").KeptPrompt(2, (1, 4, 16, 16))
    calls = []

    def calculate(model, conds, x, timestep):
        calls.append([cond is not None for cond in conds])
        return [x * 2, x * 3]

    conds, sigma = [["positive"], ["negative"]], torch.ones(1)

    def call(shape, guided, conds=conds):
        return kept_prompt._call(guided, calculate, None, copy.copy(conds), torch.ones(shape), sigma)

    call((1, 4, 16, 16), guided=False)
    call((1, 4, 8, 8), guided=True)
    call((1, 4, 16, 16), guided=True, conds=[["positive"], ["negative"], ["third"]])
    positive, negative = call((1, 4, 16, 16), guided=True)
    assert calls == [[True, True], [True, True], [True, True, True], [True, False]]
    assert torch.equal(positive, torch.full((1, 4, 16, 16), 2.0))
    assert torch.equal(negative, torch.full((1, 4, 16, 16), 3.0))
