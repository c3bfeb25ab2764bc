"""Fit Boundary and Boundary Edit on the demo model: bright walls against dark ones, measured on finished pixels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine, node

STEPS = 8
FIT = {"space": "z", "mixing_step": 400, "steps": STEPS, "solver": "svm", "held_out": 0.2}
EDIT = {"strength": 1.0, "move": "by", "cfg": 1.0, "eta": 0.0, "seed": 0}
MADE: dict[str, SimpleNamespace] = {}  # fitted once for all tests


@pytest.fixture
def kit(comfyui, monkeypatch):
    """The demo model, pictures with bright and with dark walls, their boundary; edit(...), latent(...), calls()."""
    if not MADE:
        MADE["kit"] = _kit()
    kit = MADE["kit"]
    kit.edit_module = engine("comfy_host.edits.boundary_edit")
    monkeypatch.setattr(
        kit.edit_module, "INVERSIONS", engine("comfy_host.loaded.kept").Kept(kit.edit_module.MOST_INVERSIONS)
    )
    kit.calls.clear()
    return kit


def _kit():
    import nodes

    model, clip, vae = node("RG_LoadDemoModel")
    scenes = engine("demo.scene_pictures").scene_pictures(11, 26, True)
    bright = torch.tensor([scene.wall in ("cream", "pink") for scene in scenes.scenes])
    positive = nodes.CLIPTextEncode().encode(clip, "")[0]
    learned = slice(0, 22)
    kit = SimpleNamespace(
        model=model, vae=vae, clip=clip, positive=positive, unseen=scenes.picture[22:], unseen_bright=bright[22:],
        having=scenes.picture[learned][bright[learned]], lacking=scenes.picture[learned][~bright[learned]], calls=[],
    )  # fmt: skip
    kit.fitted = node(
        "RG_FitBoundary", model=model, having=kit.having, lacking=kit.lacking, vae=vae, positive=positive, **FIT
    )
    kit.boundary = kit.fitted[0]
    network = model.model.diffusion_model
    network.register_forward_hook(lambda *_: kit.calls.append(1))

    def latent(picture):
        return {"samples": vae.encode(picture)}

    def edit(latent, **inputs):
        given = {"model": model, "boundary": kit.boundary, "positive": positive, **EDIT, **inputs}
        return node("RG_BoundaryEdit", latent=latent, **given)

    def wall(made):
        """How bright the upper edge is, (B,)."""
        return vae.decode(made["samples"])[:, :6].mean((1, 2, 3))

    kit.latent, kit.edit, kit.wall = latent, edit, wall
    kit.dark = latent(kit.unseen[~kit.unseen_bright][:1])
    return kit


def far_from(samples, latent):
    return float((samples - latent).square().mean().sqrt() / latent.square().mean().sqrt())


def test_the_fit_says_how_good_it_is(kit):
    boundary, report, plot, strip = kit.fitted
    assert (boundary.mixing_step, boundary.space, boundary.steps) == (400, "z", STEPS)
    assert boundary.accuracy >= 0.75
    assert "400: accuracy z" in report
    assert "flips" in report
    assert plot.shape == (1, 400, 720, 3)
    pictures = len(engine("comfy_host.edits.boundary_measure").STRIP_STRENGTHS)
    assert strip.shape[2] == pictures * 128
    assert strip.shape[1] % 128 == 0


def test_a_wall_that_no_fit_has_seen_turns_bright_and_another_one_dark(kit):
    for picture, bright in zip(kit.unseen, kit.unseen_bright, strict=True):
        latent = kit.latent(picture[None])
        before = float(kit.wall(latent))
        after = float(kit.wall(kit.edit(latent, strength=-1.0 if bright else 1.0)[0]))
        assert (after < before - 0.05) if bright else (after > before + 0.05)


def test_strength_0_is_the_inversion_s_own_way_back(kit):
    made, report, _ = kit.edit(kit.dark, strength=0.0)
    passes, levels = engine("comfy_host.edits.passes"), engine("comfy_host.edits.levels")
    prompts, timesteps = passes.Prompts(positive=kit.positive), levels.timesteps_up_to(400, STEPS)
    (state,) = passes.go_up(kit.model, kit.dark["samples"], timesteps, prompts, keep=[400])
    back, _ = passes.go_down(kit.model, state, timesteps[::-1], prompts)
    assert torch.equal(made["samples"], back.to(made["samples"]))
    assert far_from(made["samples"], kit.dark["samples"]) < 0.4
    assert "began at -" in report
    finer, _, _ = kit.edit(kit.dark, strength=0.0, refinements=3)
    assert far_from(finer["samples"], kit.dark["samples"]) < 0.5 * far_from(made["samples"], kit.dark["samples"])


def test_the_strip_is_monotone_and_each_is_what_it_is_alone(kit):
    strip, _, _ = kit.edit(kit.dark, strengths="-1, 0, 0.5, 1, 1.5")
    assert strip["samples"].shape[0] == 5
    brightness = kit.wall(strip)
    assert bool((brightness.diff() > -0.01).all())
    assert float(brightness[-1] - brightness[0]) > 0.15
    alone, _, _ = kit.edit(kit.dark, strength=0.5)
    assert far_from(alone["samples"], strip["samples"][2:3]) < 1e-3


def test_a_boundary_and_its_negative_undo_each_other(kit):
    """In one chain exactly; one after the other to one and a half times what the inversion loses, since where an edited
    picture came from is known."""
    own, _, _ = kit.edit(kit.dark, strength=0.0)
    there, _, edits = kit.edit(kit.dark, strength=1.0)
    chained, _, _ = kit.edit(kit.dark, boundary=kit.boundary.reversed(), strength=1.0, previous=edits)
    assert far_from(chained["samples"], own["samples"]) < 1e-3
    back, report, _ = kit.edit(there, strength=-1.0)
    assert "kept from before" in report
    lost = far_from(own["samples"], kit.dark["samples"])
    assert far_from(back["samples"], kit.dark["samples"]) < 1.5 * lost


def test_one_inversion_and_one_sampling_and_then_none(kit):
    kit.edit(kit.dark)
    assert len(kit.calls) == STEPS - 1 + STEPS
    _, report, _ = kit.edit(kit.dark, strength=-0.5)
    assert len(kit.calls) == 2 * STEPS - 1 + STEPS
    assert "kept from before" in report
    kit.edit(kit.dark, strengths="-1 0 1")
    assert len(kit.calls) == 2 * STEPS - 1 + 2 * STEPS


def with_lora(kit):
    model = kit.model.clone()
    name = next(key for key in model.model.state_dict() if key.endswith("middle_block.0.in_layers.2.weight"))
    model.add_patches({name: (torch.full_like(model.model.state_dict()[name], 0.01),)})
    return model


def with_option(kit):
    model = kit.model.clone()
    model.set_model_unet_function_wrapper(lambda run, given: run(given["input"], given["timestep"], **given["c"]))
    return model


def with_wrapper(kit):
    from comfy.patcher_extension import WrappersMP

    model = kit.model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", lambda run, *args, **kwargs: run(*args, **kwargs))
    return model


def another_schedule(kit):
    import comfy.model_sampling

    class Shifted(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    model, sampling = kit.model.clone(), Shifted(kit.model.model.model_config)
    sampling.set_sigmas(sampling.sigmas * 1.1)
    model.add_object_patch("model_sampling", sampling)
    return model


def encoded(kit, text):
    import nodes

    return nodes.CLIPTextEncode().encode(kit.clip, text)[0]


def stepped(kit, **more):
    import dataclasses

    return dataclasses.replace(kit.boundary, **more)


CHANGES = {
    "the picture": lambda kit: {"latent": {"samples": kit.dark["samples"] + 0.01}},
    "the prompt": lambda kit: {"positive": encoded(kit, "a red figure, grey wall")},
    "cfg": lambda kit: {"cfg": 2.0, "negative": encoded(kit, "pink wall")},
    "the negative prompt": lambda kit: {"cfg": 2.0, "negative": encoded(kit, "teal wall")},
    "steps": lambda kit: {"steps": STEPS + 1},
    "the mixing step": lambda kit: {"boundary": stepped(kit, mixing_step=401)},
    "the boundary's steps": lambda kit: {"boundary": stepped(kit, steps=STEPS + 2)},
    "refinements": lambda kit: {"refinements": 1},
    "a LoRA": lambda kit: {"model": with_lora(kit)},
    "another node's option": lambda kit: {"model": with_option(kit)},
    "another node's wrapper": lambda kit: {"model": with_wrapper(kit)},
    "the noise schedule": lambda kit: {"model": another_schedule(kit)},
    "another model": lambda kit: {"model": node("RG_LoadDemoModel")[0]},
    "h is needed": lambda kit: {"boundary": stepped(kit, parts=(*kit.boundary.parts, hidden_part()))},
}


def hidden_part():
    return engine("boundaries").Part(
        space="h", normal=torch.eye(128)[0].view(128, 1, 1).expand(128, 4, 4) / 4, middle=0, gap=1
    )


@pytest.mark.parametrize("change", list(CHANGES))
def test_an_inversion_is_never_stale(kit, change):
    """Whatever it depends on: changed, the picture is inverted anew; changed back, the old inversion is still there."""
    kit.edit(kit.dark)
    if change == "the negative prompt":
        kit.edit(kit.dark, **CHANGES["cfg"](kit))
    changed = CHANGES[change](kit)
    latent = changed.pop("latent", kit.dark)
    _, report, _ = kit.edit(latent, **changed)
    assert "Inverted to timestep" in report
    _, report, _ = kit.edit(latent, **changed)
    assert "kept from before" in report
    assert "kept from before" in kit.edit(kit.dark)[1]


def test_what_the_inversion_does_not_depend_on_costs_none(kit):
    kit.edit(kit.dark)
    mask = torch.ones(1, 128, 128)
    for changed in ({"seed": 5}, {"eta": 1.0}, {"mask": mask}, {"move": "to"}, {"boundary": kit.boundary.reversed()}):
        assert "kept from before" in kit.edit(kit.dark, **changed)[1]


def test_what_is_kept_is_not_changed_by_edits(kit):
    one, _, _ = kit.edit(kit.dark, strength=0.7)
    kit.edit(kit.dark, strength=-2.0, eta=1.0)
    again, _, _ = kit.edit(kit.dark, strength=0.7)
    assert torch.equal(one["samples"], again["samples"])


def test_noise_on_the_way_down_is_the_seed_s_and_the_same_for_every_strength(kit):
    one, same, other = (kit.edit(kit.dark, eta=1.0, seed=seed)[0]["samples"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert far_from(other, one) > 0.02
    strip, _, _ = kit.edit(kit.dark, eta=1.0, seed=1, strengths="1 1")
    assert far_from(strip["samples"][:1], strip["samples"][1:]) < 1e-3
    assert far_from(strip["samples"][:1], one) < 1e-3


def test_a_picture_that_is_sampled_is_moved_on_its_way(kit):
    empty = {"samples": torch.zeros(2, 4, 16, 16)}
    made, report, _ = kit.edit(empty, strengths="-1 1", seed=4)
    assert "Sampled from noise of seed 4" in report
    brightness = kit.wall(made)
    assert bool((brightness[2:] > brightness[:2] + 0.1).all())
    assert torch.equal(kit.edit(empty, strengths="-1 1", seed=4)[0]["samples"], made["samples"])
    assert not torch.equal(kit.edit(empty, strengths="-1 1", seed=5)[0]["samples"], made["samples"])


def test_several_pictures_with_a_prompt_each(kit):
    both = {"samples": torch.cat([kit.latent(picture[None])["samples"] for picture in kit.unseen[:2]])}
    prompts = [encoded(kit, text)[0][0] for text in ("a red figure, grey wall", "a blue figure, pink wall")]
    together, _, _ = kit.edit(both, positive=[[torch.cat(prompts), {}]], strengths="0 1")
    for number, prompt in enumerate(prompts):
        alone, _, _ = kit.edit({"samples": both["samples"][number : number + 1]}, positive=[[prompt, {}]], strengths="0 1")
        assert far_from(together["samples"][number::2], alone["samples"]) < 1e-3


def test_a_mask_keeps_the_move_inside(kit, monkeypatch):
    crossing, starts = engine("comfy_host.edits.crossing"), []
    go_down = crossing.go_down
    monkeypatch.setattr(
        crossing, "go_down", lambda model, state, *a, **k: starts.append(state.z) or go_down(model, state, *a, **k)
    )
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    kit.edit(kit.dark, strength=0.0)
    kit.edit(kit.dark, mask=mask)
    own, moved = starts
    assert torch.equal(moved[..., 8:], own[..., 8:])
    assert float((moved - own)[..., :8].abs().mean()) > 0.05


def test_two_boundaries_in_one_chain(kit):
    """The second moves at right angles to the first, and the report says what that took."""
    generator = torch.Generator().manual_seed(0)
    first = kit.boundary.parts[0]
    mixed = first.normal + torch.randn(first.normal.shape, generator=generator) / 50
    other = stepped(kit, parts=(engine("boundaries").Part(space="z", normal=mixed / mixed.norm(), middle=0.0, gap=5.0),))
    _, _, edits = kit.edit(kit.dark, strength=1.0)
    both, report, _ = kit.edit(kit.dark, boundary=other, strength=1.0, previous=edits)
    assert "of it was an earlier one's" in report
    assert float(kit.wall(both)) > float(kit.wall(kit.dark)) + 0.05


def test_boundaries_of_different_steps_move_each_at_its_own(kit):
    later = stepped(kit, mixing_step=200)
    _, _, edits = kit.edit(kit.dark, strength=0.5)
    kit.calls.clear()
    made, _, _ = kit.edit(kit.dark, boundary=later, strength=0.5, previous=edits)
    own, _, _ = kit.edit(kit.dark, strength=0.0)
    assert far_from(made["samples"], own["samples"]) > 0.1
    assert len(kit.calls) >= 2 * STEPS  # one way up and one down, through both


def test_a_readout_target_guides_the_way_down_and_not_the_way_up(kit):
    heads = engine("heads")
    head = heads.load_head(engine("demo").DEMO_HEADS / "demo_depth.safetensors")
    target = engine("guidance").Target(head=head, image=torch.rand(1, 128, 128, 3), start_percent=0.0, end_percent=1.0)
    plain, _, _ = kit.edit(kit.dark)
    guided, report, _ = kit.edit(kit.dark, target=target, target_strength=3.0)
    assert "kept from before" in report
    assert far_from(guided["samples"], plain["samples"]) > 0.02
    model = node(
        "RG_ApplyReadoutGuidance", model=kit.model, target=target, strength=3.0, mode="fast", iterations=1, source_cfg=-1.0
    )
    through, report, _ = kit.edit(kit.dark, model=model)
    assert "kept from before" in report
    assert far_from(through["samples"], guided["samples"]) < 1e-3


def test_a_batch_and_its_labels_are_two_batches(kit):
    pictures, labels = torch.cat([kit.lacking, kit.having]), "0 " * len(kit.lacking) + "1 " * len(kit.having)
    latents = kit.latent(pictures)
    other = node("RG_FitBoundary", model=kit.model, having=latents, labels=labels, positive=kit.positive, **FIT)[0]
    cosine = float((other.parts[0].normal * kit.boundary.parts[0].normal).sum())
    assert cosine > 0.9  # other pictures are kept back
    assert other.parts[0].gap == pytest.approx(kit.boundary.parts[0].gap, rel=0.2)


def test_a_shirt_anywhere_by_its_region(kit):
    demo = engine("lab.evidence.boundary_attributes")
    attribute = next(each for each in demo.ATTRIBUTES if each.name == "red shirt, anywhere")
    pairs = demo.sample_pairs(attribute, 16, 3)
    masks = torch.stack([demo.where_they_differ(*pair.pictures()) for pair in pairs])
    pictures = torch.stack([pair.pictures()[0] for pair in pairs])
    having, lacking = slice(0, 14, 2), slice(1, 14, 2)
    fit = {**FIT, "space": "region", "held_out": 0.0}
    boundary, report, _, _ = node(
        "RG_FitBoundary", model=kit.model, having=pictures[having], lacking=pictures[lacking], vae=kit.vae,
        positive=kit.positive, mask=masks[having], mask_lacking=masks[lacking], **fit,
    )  # fmt: skip
    assert boundary.parts[0].normal.shape == (8,)
    assert "leave a fifth out" in report
    for number in (14, 15):
        made, _, _ = kit.edit(
            kit.latent(pictures[number : number + 1]), boundary=boundary, strength=-1.5 if pairs[number].value else 1.5,
            mask=masks[number : number + 1],
        )  # fmt: skip
        assert demo.is_flipped(kit.vae.decode(made["samples"])[0].clamp(0, 1), pairs[number])


def test_in_both_spaces_with_several_steps_tried(kit):
    fit = {**FIT, "space": "both", "mixing_step": 0, "steps": 5, "held_out": 0.2}
    boundary, report, _, _ = node(
        "RG_FitBoundary", model=kit.model, having=kit.having, lacking=kit.lacking, vae=kit.vae, positive=kit.positive, **fit
    )
    assert boundary.space == "z and h"
    assert boundary.mixing_step in engine("boundaries").STEPS_TRIED
    assert report.count("accuracy z") == len(engine("boundaries").STEPS_TRIED)
    assert report.count("sampled") == len(engine("boundaries").STEPS_TRIED)
    made, _, _ = kit.edit(kit.dark, boundary=boundary, cfg=2.0, negative=kit.positive, strengths="0 1")
    assert torch.isfinite(made["samples"]).all()
    own, _, _ = kit.edit(kit.dark, boundary=stepped(kit, mixing_step=boundary.mixing_step, steps=boundary.steps),
                         cfg=2.0, negative=kit.positive, strength=0.0)  # fmt: skip
    assert far_from(made["samples"][:1], own["samples"]) < 1e-3


def test_a_boundary_is_saved_and_loaded(kit, tmp_path):
    import folder_paths

    folder = engine("comfy_host.boundary_folder").FOLDER
    before = folder_paths.folder_names_and_paths[folder]
    folder_paths.folder_names_and_paths[folder] = ([str(tmp_path)], before[1])
    try:
        assert node("RG_SaveBoundary", boundary=kit.boundary, name="wall", overwrite=False) == "wall.safetensors"
        assert node("RG_SaveBoundary", boundary=kit.boundary, name="wall", overwrite=False) == "wall_2.safetensors"
        assert node("RG_SaveBoundary", boundary=kit.boundary, name="wall", overwrite=True) == "wall.safetensors"
        folder_paths.filename_list_cache.pop(folder, None)
        loaded = node("RG_LoadBoundary", boundary_name="wall.safetensors")
        one, other = (kit.edit(kit.dark, boundary=each)[0]["samples"] for each in (kit.boundary, loaded))
        assert torch.equal(one, other)
        for name in ("../wall.safetensors", str(tmp_path / "wall.safetensors"), ""):
            with pytest.raises(engine("errors").BoundaryError, match="no boundary named"):
                node("RG_LoadBoundary", boundary_name=name)
        with pytest.raises(engine("errors").BoundaryError, match="no file name"):
            node("RG_SaveBoundary", boundary=kit.boundary, name="../x", overwrite=False)
    finally:
        folder_paths.folder_names_and_paths[folder] = before
        folder_paths.filename_list_cache.pop(folder, None)


def test_a_guided_or_noisy_edit_is_inverted_anew(kit):
    """What it came from is not what a plain way down would lead back to."""
    head = engine("heads").load_head(engine("demo").DEMO_HEADS / "demo_depth.safetensors")
    target = engine("guidance").Target(head=head, image=torch.rand(1, 128, 128, 3), start_percent=0.0, end_percent=1.0)
    settings = {"strength": 2.0, "mode": "fast", "iterations": 1, "source_cfg": -1.0}
    model = node("RG_ApplyReadoutGuidance", model=kit.model, target=target, **settings)
    for how in ({"eta": 1.0}, {"target": target}, {"model": model}):
        made, _, _ = kit.edit(kit.dark, **how)
        assert "Inverted to timestep" in kit.edit(made)[1]
