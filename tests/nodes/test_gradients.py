"""Every way of differentiating the model gives plain autograd's gradient, and none copies or keeps weights."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import weakref

import pytest
import torch
from comfyui_host import engine
from small_models import PARITY, parity_model, sdxl_model

pytestmark = pytest.mark.usefixtures("comfyui")

MODELS = {"SD1.5": (parity_model, 32), "SDXL": (sdxl_model, 64)}  # how they are made, and the width of their prompts
GRAPHS = pytest.mark.parametrize("graph", ["full", "light"])
NETWORKS = pytest.mark.parametrize("name", list(MODELS))
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@contextlib.contextmanager
def plain_autograd():
    """Autograd and nothing of ours; what is made in here are no inference tensors."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def gradient(name, network, scope, dtype=torch.float32) -> torch.Tensor:
    """Of <output, direction> with respect to the latent, inside the scope."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 8, 8), (1, 8, MODELS[name][1]), (1, 4, 8, 8), (1, 2816))
    with scope, torch.inference_mode(False):
        leaf, context, direction, pooled = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        leaf.requires_grad_()
        more = {"y": pooled} if name == "SDXL" else {}
        out = network(leaf, torch.tensor([500.0]), context=context, **more)
        return torch.autograd.grad(out, leaf, direction)[0].float()


def made(name, change=None, dtype=torch.float32):
    """A network as it is loaded, and changed."""
    network = MODELS[name][0]().model.diffusion_model.to(dtype)
    network.dtype = dtype
    if change is not None:
        change(network)
    return network


def scope_of(network, graph):
    return engine("comfy_host.loaded.gradient_scope").GradientScope(network, graph)


def ours(name, graph, change=None, dtype=torch.float32) -> torch.Tensor:
    network = made(name, change, dtype)
    return gradient(name, network, scope_of(network, graph), dtype)


@functools.cache
def plain(name, change=None, dtype=torch.float32) -> torch.Tensor:
    """Plain autograd's, on a copy of the network that was never in inference mode."""
    with plain_autograd():
        network = made(name, change, dtype).requires_grad_(False)
    return gradient(name, network, plain_autograd(), dtype)


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


def cosine(a, b) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def layers(network) -> list:
    return [module for module in network.modules() if hasattr(module, "comfy_cast_weights")]


def cast_every_layer(network) -> None:
    """ComfyUI's own switch for weights that are cast or moved when a layer runs (offloading)."""
    for layer in layers(network):
        layer.comfy_cast_weights = True


def patch_every_layer(network) -> None:
    """LoRAs of an offloaded model are added to each weight when its layer runs; here half of it is."""
    for layer in (layer for layer in layers(network) if layer.weight is not None):
        layer.weight.data *= 0.5
        layer.weight_function = [lambda weight: weight * 2]


def assert_resident(network) -> None:
    assert all(p.is_inference() for p in network.parameters())


@GRAPHS
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("SD1.5", assert_resident), ("SD1.5", cast_every_layer), ("SD1.5", patch_every_layer),
        ("SDXL", assert_resident), ("SDXL", patch_every_layer),
    ],
)  # fmt: skip
def test_every_graph_gives_plain_autograds_gradient(name, graph, weights):
    assert relative(ours(name, graph, weights), plain(name)) <= 1e-5


def rounded(network, dtype) -> None:
    """Weights that ``dtype`` has."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def stored(network, dtype) -> None:
    """Weights in another precision than the layers', which cast them when they run."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    cast_every_layer(network)


@GRAPHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_in_half_precision_or_fp8_under_manual_cast(graph, dtype):
    found = ours("SD1.5", graph, functools.partial(stored, dtype=dtype))
    assert relative(found, plain("SD1.5", functools.partial(rounded, dtype=dtype))) <= 1e-5


FP8, SCALE = "float8_e4m3fn", 0.03125


def with_quantised_layers(network, make) -> None:
    """Linear layers of another class, which hold scaled fp8 weights."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                quantised = (layer.weight / SCALE).to(getattr(torch, FP8))
                setattr(parent, name, make(layer, quantised, torch.tensor(SCALE)))


def dequantised(network) -> None:
    def make(layer, weight, scale):
        layer.weight.data = weight.float() * scale
        return layer

    with_quantised_layers(network, make)


def scaled_fp8(network) -> None:
    """ComfyUI's layers for checkpoints with a ``scaled_fp8`` key; the newest reads those as mixed precision."""
    import comfy.ops

    if not hasattr(comfy.ops, "scaled_fp8_ops"):
        pytest.skip("this ComfyUI has no such layers")
    ops = comfy.ops.scaled_fp8_ops(override_dtype=getattr(torch, FP8))

    def make(layer, weight, scale):
        made = ops.Linear(layer.in_features, layer.out_features, layer.bias is not None).requires_grad_(False)
        made.weight.data, made.scale_weight.data = weight, scale
        if layer.bias is not None:
            made.bias.data = layer.bias.data
        return made

    with_quantised_layers(network, make)


def mixed_precision(network) -> None:
    """ComfyUI's layers for checkpoints that say of each layer how it is quantised, to the layers or in the file."""
    import comfy.ops

    if not hasattr(comfy.ops, "mixed_precision_ops"):
        pytest.skip("this ComfyUI has no such layers")
    quantised = {"format": FP8}
    ops = comfy.ops.mixed_precision_ops({"x": quantised}, torch.float32, full_precision_mm=True)

    def make(layer, weight, scale):
        made = ops.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        state = {"x.weight": weight, "x.weight_scale": scale}
        state["x.comfy_quant"] = torch.tensor(list(json.dumps(quantised).encode()), dtype=torch.uint8)
        if layer.bias is not None:
            state["x.bias"] = layer.bias.data
        made._load_from_state_dict(state, "x.", {}, False, [], [], [])
        return made.requires_grad_(False)

    with_quantised_layers(network, make)


@GRAPHS
@pytest.mark.parametrize("layers", [scaled_fp8, mixed_precision], ids=lambda f: f.__name__)
def test_quantised_layers(graph, layers):
    assert relative(ours("SD1.5", graph, layers), plain("SD1.5", dequantised)) <= 1e-5


@HALVES
@GRAPHS
@NETWORKS
def test_half_precision_adds_no_error_of_its_own(name, graph, dtype):
    """How near a half-precision network comes to fp32 is up to its own rounding: plain autograd in that precision comes no
    nearer (0.976 or 0.983, by the processor, for the small SDXL in bf16, 0.9995 and more for the others)."""
    found, wanted, possible = ours(name, graph, dtype=dtype), plain(name), plain(name, dtype=dtype)
    assert cosine(found, possible) >= 0.9999
    assert cosine(found, wanted) >= (cosine(possible, wanted) - 1e-4 if (name, dtype) == ("SDXL", torch.bfloat16) else 0.999)


def watch(module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0].tanh(), *args[1:]))
    module.register_forward_hook(lambda module, args, output: output * 1.1)


def replace(module) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.1


@pytest.mark.parametrize("how", [watch, replace], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kinds", ["GroupNorm LayerNorm", "SiLU", "Conv2d Linear", "GEGLU Sequential BasicTransformerBlock"])
def test_hooks_and_forwards_of_other_nodes_count(kinds, how):
    def change(network):
        for module in list(network.modules()):
            if type(module).__name__ in kinds.split():
                how(module)

    network = made("SD1.5", change)
    wanted = plain("SD1.5", change)
    assert relative(wanted, plain("SD1.5")) > 1e-3
    assert relative(gradient("SD1.5", network, scope_of(network, "light")), wanted) <= 1e-5
    cast_every_layer(network)
    for graph in ("full", "light"):
        assert relative(gradient("SD1.5", network, scope_of(network, graph)), wanted) <= 1e-5


@GRAPHS
@pytest.mark.parametrize("weights", [assert_resident, cast_every_layer], ids=lambda f: f.__name__)
def test_a_picture_that_tiles(weights, graph):
    """Other nodes let convolutions wrap around, by their padding's mode or by another ``_conv_forward``."""

    def wrap(network):
        padded = [layer for layer in layers(network) if isinstance(layer, torch.nn.Conv2d) and any(layer.padding)]
        for layer in padded[::2]:
            layer.padding_mode, layer._reversed_padding_repeated_twice = "circular", [layer.padding[0]] * 4
        for layer in padded[1::2]:

            def convolve(x, weight, bias, layer=layer):
                x = torch.nn.functional.pad(x, [layer.padding[0]] * 4, mode="circular")
                return torch.nn.functional.conv2d(x, weight, bias, layer.stride)

            layer._conv_forward = convolve

    def both(network):
        weights(network)
        wrap(network)

    assert relative(ours("SD1.5", graph, both), plain("SD1.5", wrap)) <= 1e-5


class Packed(torch.Tensor):
    """A weight of a class of its own, which has another shape than it shows."""

    @property
    def shape(self):
        return (7,)


@GRAPHS
@pytest.mark.parametrize("kind", [torch.Tensor, Packed])
def test_layers_that_unpack_their_weights_in_a_way_of_their_own(graph, kind):
    """As other nodes' quantised ones do (GGUF's), which look like ComfyUI's layers that cast."""

    class Linear(torch.nn.Linear):
        comfy_cast_weights = True

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight * self.weight.factor, self.bias).as_subclass(torch.Tensor)

    class GroupNorm(torch.nn.GroupNorm):
        comfy_cast_weights = True

        def forward(self, x):
            return super().forward(x).as_subclass(torch.Tensor)

    def pack(network):
        for layer in layers(network):
            for packed in (Linear, GroupNorm):
                if isinstance(layer, packed.__base__):
                    layer.__class__ = packed
                    factor = 4 if packed is Linear else 1
                    weight = (layer.weight.data / factor).as_subclass(kind)
                    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
                    layer.weight.factor = factor

    assert relative(ours("SD1.5", graph, pack), plain("SD1.5")) <= 1e-5


@GRAPHS
def test_no_weight_is_copied(graph):
    """Inside the scope each parameter is another tensor over the very same storage."""
    network = made("SD1.5")
    pointers = {name: p.data_ptr() for name, p in network.named_parameters()}
    objects = {name: id(p) for name, p in network.named_parameters()}
    with scope_of(network, graph):
        assert {name: p.data_ptr() for name, p in network.named_parameters()} == pointers
        assert not any(p.is_inference() for p in network.parameters())
    assert {name: id(p) for name, p in network.named_parameters()} == objects


@GRAPHS
@pytest.mark.parametrize("moved", ["new data", "new parameters"])
def test_a_scope_follows_weights_that_moved_between_passes(moved, graph):
    """As offloading moves them; what lies where they were is nobody's."""
    network = made("SD1.5")
    scope = scope_of(network, graph)
    before = gradient("SD1.5", network, scope)
    assert torch.equal(gradient("SD1.5", network, scope), before)
    for module in network.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                there = parameter.data.clone()
                parameter.data.zero_()
                if moved == "new data":
                    parameter.data = there
                else:
                    module._parameters[key] = torch.nn.Parameter(there, requires_grad=False)
    assert torch.equal(gradient("SD1.5", network, scope), before)


@pytest.fixture
def casts(monkeypatch) -> list[weakref.ref]:
    """Every weight that ComfyUI makes for a layer that runs."""
    import comfy.ops

    made, original = [], comfy.ops.cast_bias_weight

    def tracked(*args, **kwargs):
        out = original(*args, **kwargs)
        copies = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in out[:2])
        made.extend(weakref.ref(t) for t in copies if t is not None)
        return (*copies, *out[2:])

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", tracked)
    return made


def still_there(casts) -> int:
    gc.collect()
    return sum(ref() is not None for ref in casts)


@GRAPHS
def test_no_cast_weight_lives_between_forward_and_backward(graph, casts):
    network = made("SD1.5", cast_every_layer)
    with scope_of(network, graph):
        leaf = torch.randn(1, 4, 8, 8).requires_grad_()
        out = network(leaf, torch.tensor([500.0]), context=torch.randn(1, 8, 32))
        forward = len(casts)
        assert forward
        assert still_there(casts) == 0
        torch.autograd.grad(out.sum(), leaf)
        assert len(casts) > forward  # they were made again


def rms_network(change, dtype) -> torch.nn.Module:
    """Linear layers and RMS norms, as transformers have them; one norm has no weight. Changed, as it is loaded."""
    import comfy.ops

    ops = comfy.ops.disable_weight_init
    norms = (ops.RMSNorm(8, eps=1e-6), ops.RMSNorm(8), ops.RMSNorm(8, elementwise_affine=False))
    network = torch.nn.Sequential(*(layer for norm in norms for layer in (ops.Linear(8, 8), norm))).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    change(network.to(dtype))
    return network


def unchanged(network) -> None:
    pass


@GRAPHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("weights", "same"),
    [
        (assert_resident, unchanged), (cast_every_layer, unchanged), (patch_every_layer, unchanged),
        (functools.partial(stored, dtype=torch.float8_e4m3fn), functools.partial(rounded, dtype=torch.float8_e4m3fn)),
    ],
    ids=["resident", "cast", "patched", "fp8"],
)  # fmt: skip
def test_rms_norms_give_plain_autograds_gradient_and_keep_no_cast_weight(weights, same, dtype, graph, casts):
    with plain_autograd():
        x, direction = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        wanted = torch.autograd.grad(rms_network(same, dtype)(x.requires_grad_()), x, direction)[0]
    network = rms_network(weights, dtype)
    casts.clear()
    with scope_of(network, graph):
        out = network(x)
        forward = len(casts)
        assert still_there(casts) == 0
        torch.testing.assert_close(torch.autograd.grad(out, x, direction)[0], wanted)
    assert len(casts) == 2 * forward == (0 if weights is assert_resident else 16)  # five weights and three biases, twice


@GRAPHS
def test_every_weight_that_was_fetched_is_given_back(graph, monkeypatch):
    """Otherwise dynamic VRAM keeps it on the device for good."""
    import comfy.ops

    if not hasattr(comfy.ops, "uncast_bias_weight"):
        pytest.skip("this ComfyUI wants nothing back")
    fetch, give_back, fetched, held = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight, [], []

    def fetching(layer, *args, **kwargs):
        fetched.append(layer)
        held.append(layer)
        return fetch(layer, *args, **kwargs)

    def giving_back(layer, *args):
        held.remove(layer)
        return give_back(layer, *args)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", fetching)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", giving_back)
    ours("SD1.5", graph, cast_every_layer)
    assert len(fetched) > len(set(fetched)) > 100  # forward, and again in backward
    assert not held


SIGMA, SIZE = 2.0, (8, 8)


def tensors():
    """A latent at SIGMA, a prompt, a control."""
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, *SIZE, generator=generator), torch.randn(2, 8, 32, generator=generator)
    return x * (1 + SIGMA**2) ** 0.5, context, torch.rand(1, 16, 16, 3, generator=generator)


def objective(weight=1.0):
    guidance = engine("guidance")
    target = guidance.Target(head=engine("heads").load_head(PARITY / "head_spatial.pt"), weight=weight, image=tensors()[2])
    with torch.inference_mode(False):
        return guidance.Objective((target,), SIZE, 2, torch.device("cpu"))


def read(model, graph="full", weight=1.0):
    """A reader that has read one branch of ``model`` and compared it with a control."""
    x, context, _ = tensors()
    backbone = engine("comfy_host.loaded.model").backbone_of(model)
    scope = scope_of(model.model.diffusion_model, graph)
    reader = engine("comfy_host.guided.branches").BranchReader(backbone, objective(weight), x, active=(0,), scope=scope)
    options = reader.install({})["transformer_options"]
    model.model.apply_model(x, torch.full((2,), SIGMA), c_crossattn=context, transformer_options=options)
    return reader


def in_precision(dtype):
    model = parity_model()
    model.model.diffusion_model.to(dtype)
    model.model.manual_cast_dtype = dtype
    return model


@GRAPHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_a_readouts_gradient_is_that_of_plain_autograd_from_the_loss_to_the_latent(dtype, graph):
    features = engine("features")
    options = {"optimized_attention_override": engine("comfy_host.guided.attention").ATTENTION[graph]}
    with plain_autograd():
        model = in_precision(dtype)
        network = model.model.diffusion_model.requires_grad_(False)
        x, context, _ = tensors()
        sigma, scale = torch.full((2,), SIGMA), (1 + SIGMA**2) ** -0.5
        leaf = x.requires_grad_()
        with features.FeatureTap(network, features.detect_backbone(network)) as tap:
            model.model.apply_model(leaf, sigma, c_crossattn=context, transformer_options=options)
            maps, emb = tap.take()
        branch = engine("guidance").Branch(features=maps, emb=emb, z=(leaf * scale).detach(), noise_level=sigma * scale)
        loss, _ = objective().loss(branch, (0,), None)
        wanted = torch.autograd.grad(loss.sum(), leaf)[0] / scale
    reader = read(in_precision(dtype), graph)
    assert torch.allclose(reader.loss(), loss)
    if dtype == torch.float32:
        assert relative(reader.gradient, wanted) <= 1e-5
    else:
        assert cosine(reader.gradient, wanted) >= 0.999


@HALVES
def test_a_tiny_loss_does_not_underflow_in_half_precision(dtype):
    """The gradient at the taps is scaled before it meets half precision: a loss of 2^-40 points where one of 1 does."""
    wanted, tiny = (read(in_precision(dtype), weight=weight).gradient / weight for weight in (1.0, 2.0**-40))
    assert tiny.abs().max() > 0
    assert relative(tiny, wanted) < 1e-3


@GRAPHS
def test_two_branches_in_one_pass_give_what_they_give_one_by_one(small, graph):
    import comfy.samplers
    from comfy.patcher_extension import WrappersMP

    backbone = engine("comfy_host.loaded.model").backbone_of(small.model)
    found, rows = [], []

    def at_a_step(executor, x, timestep, options, seed):
        network = executor.class_obj.inner_model.diffusion_model
        network.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
        for which in ((0, 1), (0,), (1,)):
            scope = scope_of(network, graph)
            reader = engine("comfy_host.guided.branches").BranchReader(backbone, objective(), x, active=(0,), scope=scope)
            guider = executor.class_obj
            conds = [guider.conds["positive"], guider.conds["negative"]]
            asked = reader.install(options, guider, which, only=True)
            found.append((reader, comfy.samplers.calc_cond_batch(guider.inner_model, conds, x, timestep, asked)))
        return executor(x, timestep, options, seed)

    model = small.model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", at_a_step)
    small.plain(model=model, steps=1, latent_image={"samples": torch.zeros(2, 4, *SIZE)})
    (both, together), *alone = found
    assert rows[:3] == [4, 2, 2]
    for branch, (reader, prediction) in enumerate(alone):
        assert torch.allclose(both.loss(branch), reader.loss(branch), rtol=1e-5)
        assert torch.allclose(together[branch], prediction[branch], rtol=1e-4, atol=1e-4)
    # What is left is rounding, which turns a few of the head's ReLUs.
    assert relative(both.gradient, sum(reader.gradient for reader, _ in alone)) <= 2e-3
