"""The authors' own run of DOODL, reproduced by the engine: coupled latents, losses, gradients, updates."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine
from doodl_kit import Kit, comfyui_model, crops_at, relative

pytestmark = pytest.mark.usefixtures("comfyui")
STEP, GRADIENT, LOSS, WAY = 1e-3, 5e-3, 1e-3, 0.01  # the kit's tolerances


@pytest.fixture
def ordinary():
    """Outside of ComfyUI's mode: the engine alone, on ordinary tensors."""
    with torch.inference_mode(False):
        yield


@pytest.fixture
def kit(ordinary):
    kit = Kit()
    kit.model = comfyui_model()
    kit.alphas_cumprod = 1 / (1 + kit.model.model_sampling.sigmas.double() ** 2)
    return kit


def levels_of(kit, steps):
    return engine("optimization.edict").authors_levels(kit.alphas_cumprod, steps)


def predictor(kit, times, kept=None):
    """eps at a step's time, with cfg; both prompts in one call."""
    network, context = kit.model.diffusion_model, torch.cat([kit("ctx.uncond"), kit("ctx.cond")])

    def predict(z, i):
        rows = torch.cat([z, z])
        time = torch.full((len(rows),), float(times[i]))
        without, with_prompt = network(rows, time, context=context.repeat_interleave(len(z), 0)).chunk(2)
        eps = without + kit.cfg * (with_prompt - without)
        if kept is not None:
            kept.append(eps.detach())
        return eps

    return predict


def test_the_network_is_the_kits(kit):
    x, t = kit("unet.x"), kit("unet.t").float()
    for name in ("cond", "uncond"):
        assert relative(kit.model.diffusion_model(x, t, context=kit(f"ctx.{name}")), kit(f"unet.eps_{name}")) < STEP


@pytest.mark.parametrize(("run", "steps"), [("edict", "steps"), ("edict_odd", "short_steps")])
def test_the_pair_goes_down_and_exactly_back(kit, run, steps):
    edict = engine("optimization.edict")
    times, levels = levels_of(kit, kit.settings[steps])
    assert times == kit(f"{run}.timesteps").long().tolist()
    torch.testing.assert_close(torch.tensor(levels.sigma), kit(f"{run}.sigmas"), rtol=1e-4, atol=1e-5)
    kept: list[torch.Tensor] = []
    predict, x, y = predictor(kit, times, kept), kit("x_T"), kit("x_T")
    with torch.no_grad():
        for i in range(levels.steps):
            x, y = edict.step(x, y, predict, levels, i)
            assert relative(torch.cat([x, y]), kit(f"{run}.step")[i]) < STEP
            assert relative(torch.cat(kept[-2:]), kit(f"{run}.noise_pred")[i]) < STEP
            x, y = edict.mix(x, y, kit.p)
            assert relative(torch.cat([x, y]), kit(f"{run}.mix")[i]) < STEP
        x, y = (row[None] for row in kit(f"{run}.mix")[-1])
        for k, i in enumerate(reversed(range(levels.steps))):
            x, y = edict.unstep(*edict.unmix(x, y, kit.p), predict, levels, i)
            assert relative(torch.cat([x, y]), kit(f"{run}.inv")[k]) < STEP
    assert relative(torch.cat([x, y]), torch.cat([kit("x_T")] * 2)) < STEP


def test_a_photo_is_inverted_and_comes_back(kit):
    edict = engine("optimization.edict")
    times, levels = levels_of(kit, kit.settings["steps"])
    predict, z0 = predictor(kit, times), kit("photo.z0")
    with torch.no_grad():
        pair = edict.invert_pair(z0, z0, predict, levels, kit.p)
        assert relative(torch.cat(pair), kit("photo.inv")[-1]) < STEP
        back = edict.sample_pair(*pair, predict, levels, kit.p)
    assert relative(torch.cat(back), kit("photo.back")) < STEP


@pytest.mark.parametrize("loss", ["latent", "pixels"])
def test_the_gradient_of_the_pair(kit, loss):
    edict = engine("optimization.edict")
    times, levels = levels_of(kit, kit.settings["steps"])

    def pixels(z):
        return (kit.images(z) / 2 + 0.5).clamp(0, 1)

    seen = pixels if loss == "pixels" else lambda z: z
    wanted = seen(kit("target.latent"))
    pair = edict.pair_of(kit("x_T")).requires_grad_()
    ends = edict.sample_pair(*pair, predictor(kit, times), levels, kit.p)
    losses = torch.stack([(seen(end) - wanted).square().mean() for end in ends])
    assert relative(losses.detach(), kit(f"grad.{loss}.loss")) < LOSS
    (first,) = torch.autograd.grad(losses[0], pair, retain_graph=True)
    (both,) = torch.autograd.grad(losses.sum(), pair)
    assert relative(both[:, 0], kit(f"grad.{loss}.dpair")) < GRADIENT
    if loss == "pixels":
        assert relative(first[:, 0], kit("grad.pixels.first_dpair")) < GRADIENT


@pytest.mark.parametrize("kind", ["clip_text", "clip_image", "fgvc", "aesthetic", "aesthetic_target"])
@pytest.mark.parametrize("which", ["whole", "cuts"])
def test_a_loss_by_itself(kit, kind, which):
    boxes = kit(f"loss.{kind}.cut_boxes") if which == "cuts" else None
    size = 512 if kind == "fgvc" else 224
    z = kit("loss.z").clone().requires_grad_()
    loss = kit.measure(kind, crops_at(boxes, size))(kit.images(z), torch.Generator()).sum()
    assert relative(loss.detach(), kit(f"loss.{kind}.{which}")) < LOSS
    (gradient,) = torch.autograd.grad(loss, z)
    assert relative(gradient, kit(f"loss.{kind}.{which}_dz")) < GRADIENT


def test_the_spherical_distance(kit):
    distance = engine("optimization.losses").spherical_distance
    x, y = kit("loss.spherical.x"), kit("loss.spherical.y")
    torch.testing.assert_close(distance(x[0], y), kit("loss.spherical.one"), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(distance(x, y).min(), kit("loss.spherical.many"), rtol=1e-5, atol=1e-7)


def settings_of(run):
    return engine("optimization").UpdateSettings(
        mode="reference", clip=run.clip_grad_val or 0.0, loss_scale=run.grad_scale, noise=run.perturb_grad_scale,
        nesterov=run.use_nesterov, tied=run.tied_latents, keep="norm" if run.renormalize_latents else "none",
    )  # fmt: skip


def kind_of(run):
    if run.model_guidance_type == "CLIP":
        return "clip_image" if "clip_viz_paths" in run.model_guidance_dict else "clip_text"
    return "aesthetic_run" if run.model_guidance_type == "aesthetic" else run.model_guidance_type


def losses_of(kit, name, run, m, images):
    """Each picture's loss without loss_scale; its crops are where the authors' were."""
    kind, cuts = kind_of(run), kit(f"{name}.cuts")[m] if run.use_cutouts else [None, None]
    found = []
    for row, boxes in zip(images, cuts, strict=False):
        crops = crops_at(boxes, 512 if kind == "fgvc" else 224)
        if kind == "aesthetic_run":  # |weighted score - 10|; scores end at 10, so that the parts' distances add up
            parts = [
                engine("optimization.losses").AestheticLoss(
                    embed=kit.embed(model), head=kit.aesthetic(model), target=10.0, crops=crops, clamped=True
                )(row, torch.Generator())
                for model in ("vit_l_14", "vit_b_32")
            ]
            weights = run.model_guidance_dict["weights"]
            found.append(sum(w * part for w, part in zip(weights, parts, strict=True)) / len(weights))
        else:
            found.append(kit.measure(kind, crops)(row, torch.Generator()))
    return torch.cat(found)


# The quiet runs are made through the nodes (tests/nodes/test_optimize_noise.py).
@pytest.mark.parametrize("name", [name for name in Kit().runs if "quiet" not in name])
def test_five_updates(kit, name):
    run = kit.run(name)
    edict, kit_pair = engine("optimization.edict"), kit(f"{name}.pair")
    times, levels = levels_of(kit, kit.settings["steps"])
    if run.opt_t:
        times = times[-run.opt_t :]
        levels = edict.Levels(sigma=levels.sigma[-run.opt_t - 1 :], scale=levels.scale[-run.opt_t - 1 :])
    predict = predictor(kit, times)
    pair = kit_pair[0][:, None]
    like = kit(f"{name}.x_T")[None] if run.opt_t else None
    updater = engine("optimization").Updater(pair, settings_of(run), like)
    if run.renormalize_latents:
        start = pair if like is None else like
        assert relative(start[0].norm(), kit(f"{name}.norm")) < STEP
    for m in range(len(kit_pair) - 1):
        leaf = pair.detach().clone().requires_grad_()
        if run.single_variable:
            z = leaf[0]
            for i in range(levels.steps):
                z = edict.ddim(z, predict(z, i), levels, i)
            ends = (z, z)
        else:
            ends = edict.sample_pair(*leaf, predict, levels, kit.p)
        counted = ends[:1] if run.optimize_first_edict_image_only or run.single_variable else ends
        losses = losses_of(kit, name, run, m, [kit.images(end) for end in counted])
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        if m == 0:  # later ones are of other latents, a little off
            found = run.grad_scale * losses.detach()
            assert relative(found, kit(f"{name}.losses")[m][: len(found)]) < LOSS
            assert relative(torch.stack([end.detach()[0] for end in ends]), kit(f"{name}.end")[m]) < (
                STEP if run.tied_latents else GRADIENT
            )
        noise = kit(f"{name}.noise")[m][None] / run.perturb_grad_scale if run.perturb_grad_scale else None
        if run.single_variable:
            gradient = gradient[:1].expand_as(gradient)
        pair = updater(pair, gradient, noise)
    way = kit_pair[-1] - kit_pair[0]
    off = (pair[:, 0] - kit_pair[-1]).norm() / way.norm()
    assert off < (0.1 if not run.tied_latents else WAY)


def test_the_presets_by_name():
    presets = {each.name: each for each in engine("optimization").PRESETS}
    usual = {"mode": "reference", "strength": 1.0, "clip": 1e-3, "loss_scale": 1.0, "momentum": 0.9, "noise": 1e-4}
    for name, differs in {
        "CLIP text": {},
        "symmetry": {},
        "classifier": {"loss_scale": 0.05, "clip": 1e-2, "noise": 1e-3},
        "personalisation": {"loss_scale": 3.0, "clip": 3e-3, "noise": 0.0},
        "aesthetic editing": {"noise": 0.0, "tied": False, "keep": "none"},
    }.items():
        for key, value in {**usual, "tied": True, "keep": "norm", "nesterov": False, **differs}.items():
            assert getattr(presets[name].update, key) == value, (name, key)
    assert [presets[n].updates for n in ("CLIP text", "personalisation", "aesthetic editing")] == [50, 500, 25]
    assert (presets["personalisation"].crops, presets["personalisation"].crop_power) == (16, 0.06)
