"""Losses of finished pictures: their gradients, their crops, and the files that heads and classifiers come in."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from rg_engine.errors import OptimizationError
from rg_engine.optimization import Crops, PictureLoss
from rg_engine.optimization.files import read_tensors
from rg_engine.optimization.losses import (
    AestheticLoss,
    ClassifierLoss,
    ClipLoss,
    LikenessLoss,
    PaletteLoss,
    aesthetic_head,
    load_classifier,
    mean_feature,
    spherical_distance,
    symmetry_loss,
)  # fmt: skip
from rg_engine.optimization.pixels import averaged


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def embed(view):
    """A smooth stand-in for an encoder: (n, 3, 32, 32) to (n, 6)."""
    return torch.tanh(view.flatten(1) @ noise(3 * 32 * 32, 6, seed=4) / 20)


CROPS = Crops(count=3, size_px=32, smallest_px=16)
HEAD = aesthetic_head({"weight": noise(1, 6, seed=5), "bias": torch.tensor([5.0])}, "head")
PICTURE, MASK = noise(1, 3, 20, 24, seed=6).sigmoid(), (noise(1, 1, 20, 24, seed=7) > 0).double()
LOSSES = {
    "symmetry": symmetry_loss,
    "likeness": LikenessLoss(picture=PICTURE),
    "likeness within a mask": LikenessLoss(picture=PICTURE, mask=MASK),
    "edges": LikenessLoss(picture=PICTURE, by_edges=True),
    "palette": PaletteLoss(picture=PICTURE),
    "palette within a mask": PaletteLoss(picture=PICTURE, mask=MASK),
    "CLIP": ClipLoss(embed=embed, wanted=noise(6, seed=8), crops=Crops(size_px=32)),
    "CLIP, crops": ClipLoss(embed=embed, wanted=noise(6, seed=8), crops=CROPS),
    "CLIP, nearest crop": ClipLoss(embed=embed, wanted=noise(6, seed=8), crops=CROPS, over="min"),
    "aesthetic": AestheticLoss(embed=embed, head=HEAD, crops=CROPS),
    "aesthetic, a score": AestheticLoss(embed=embed, head=HEAD, target=7.0, crops=CROPS),
    "classifier": ClassifierLoss(network=embed, label=2, crops=CROPS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_differences(name):
    def value(images):
        return LOSSES[name](images, torch.Generator().manual_seed(3))

    images = (0.3 * noise(2, 3, 40, 48, seed=1)).requires_grad_()
    losses = value(images)
    assert losses.shape == (2,)
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    with torch.no_grad():
        for seed in range(3):
            direction = noise(*images.shape, seed=10 + seed) + gradient / gradient.abs().max()
            slope = (value(images + 1e-5 * direction) - value(images - 1e-5 * direction)).sum() / 2e-5
            assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_of_a_batch_is_as_by_itself(name):
    images = 0.3 * noise(2, 3, 40, 48, seed=1)
    both, second = (LOSSES[name](part, torch.Generator().manual_seed(3)) for part in (images, images[1:]))
    torch.testing.assert_close(both[1:], second)


@pytest.mark.parametrize("name", ["symmetry", "likeness", "edges", "palette", "CLIP, crops", "classifier"])
def test_going_down_the_gradient_comes_nearer(name):
    images, first = 0.3 * noise(1, 3, 40, 48, seed=1), None
    for _ in range(10):
        leaf = images.clone().requires_grad_()
        loss = LOSSES[name](leaf, torch.Generator().manual_seed(3)).sum()
        first = float(loss) if first is None else first
        (gradient,) = torch.autograd.grad(loss, leaf)
        images = images - 0.02 * gradient / gradient.square().mean().sqrt()
    assert float(LOSSES[name](images, torch.Generator().manual_seed(3))) < 0.8 * first


def test_half_precision_pictures_are_measured_in_fp32():
    images = 0.3 * noise(1, 3, 40, 48, seed=1)
    assert symmetry_loss(images.half()).dtype == torch.float32


def test_the_palette_does_not_care_where_colours_are():
    shuffled = PICTURE.flatten(2)[..., torch.randperm(480, generator=torch.Generator().manual_seed(1))].reshape(1, 3, 20, 24)
    loss = LOSSES["palette"]
    assert float(loss(2 * shuffled - 1)) == pytest.approx(0.0, abs=1e-12)
    assert float(loss(2 * (1 - PICTURE) - 1)) > 1e-4


def test_the_spherical_distance_is_half_the_squared_angle():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    assert float(spherical_distance(a, b)) == pytest.approx((torch.pi / 2) ** 2 / 2, rel=1e-6)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(spherical_distance(x, x.detach()), x)
    assert torch.isfinite(gradient).all()  # at the aim itself


def test_the_mean_of_pictures_counts_each_alike():
    features = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(mean_feature(features), torch.tensor([0.5, 0.5]).sqrt())


def test_crops_lie_inside_and_are_drawn_alike_from_a_seed():
    crops = Crops(count=200, power=0.3, size_px=32, smallest_px=16)
    boxes = crops.boxes(40, 60, torch.Generator().manual_seed(1))
    assert boxes == crops.boxes(40, 60, torch.Generator().manual_seed(1))
    assert all(16 <= size <= 40 and 0 <= x <= 60 - size and 0 <= y <= 40 - size for size, x, y in boxes)
    assert sum(size > 28 for size, _, _ in boxes) > 100  # most are large
    assert {size for size, _, _ in crops.boxes(12, 12, torch.Generator())} == {12}  # of a small picture all of it


@pytest.mark.parametrize("shape", [(40, 40), (33, 57), (10, 7)])
def test_crops_are_averaged_as_pytorch_pools_them(shape):
    pixels = noise(2, 3, *shape)
    torch.testing.assert_close(averaged(pixels, 16), torch.nn.functional.adaptive_avg_pool2d(pixels, 16))


def test_a_chain_is_the_weighted_sum():
    first = PictureLoss(name="one", measure=lambda images, _: images.flatten(1).mean(1), weight=2.0)
    both = PictureLoss(name="two", measure=lambda images, _: images.flatten(1).amax(1), weight=-1.0, previous=first)
    images = noise(2, 3, 4, 4)
    wanted = 2 * images.flatten(1).mean(1) - images.flatten(1).amax(1)
    torch.testing.assert_close(both(images, torch.Generator()), wanted)
    assert [loss.name for loss in both] == ["one", "two"]
    with pytest.raises(OptimizationError, match="every loss has weight 0"):
        PictureLoss(name="none", measure=symmetry_loss, weight=0.0).counted()
    with pytest.raises(OptimizationError, match="weight of the loss 'x' is nan"):
        PictureLoss(name="x", measure=symmetry_loss, weight=float("nan"))


def mlp(indices, widths=(8, 6, 5, 4, 3, 1)):
    return {
        f"layers.{i}.{key}": noise(*shape, seed=i).float()
        for i, out, wide in zip(indices, widths[1:], widths, strict=False)
        for key, shape in (("weight", (out, wide)), ("bias", (out,)))
    }


@pytest.mark.parametrize(("indices", "relu"), [((0, 2, 4, 6, 7), False), ((0, 3, 6, 9, 11), True)])
def test_an_aesthetic_mlp_is_told_by_its_keys(indices, relu):
    tensors, features = mlp(indices), noise(3, 8).float()
    head = aesthetic_head(tensors, "mlp")
    x = features / features.norm(dim=1, keepdim=True)
    for number, i in enumerate(indices):
        x = torch.relu(x) if relu and number else x
        x = x @ tensors[f"layers.{i}.weight"].T + tensors[f"layers.{i}.bias"]
    assert head.width == 8
    torch.testing.assert_close(head(features), x[:, 0])


@pytest.mark.parametrize(
    "tensors",
    [{}, {"weight": torch.zeros(1, 8)}, {"weight": torch.zeros(2, 8), "bias": torch.zeros(2)}, mlp((0, 2, 4, 6, 7), (8, 6)),
     {**mlp((0, 2, 4, 6, 7)), "other": torch.zeros(1)}, {"conv.weight": torch.zeros(3, 3)}],
)  # fmt: skip
def test_other_tensors_are_no_aesthetic_head(tensors):
    with pytest.raises(OptimizationError, match="is no aesthetic head"):
        aesthetic_head(tensors, "x")


@pytest.fixture(scope="module")
def resnet():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18(num_classes=7).eval()


def test_a_classifier_is_told_by_its_tensors(resnet):
    names = json.dumps(list("abcdefg"))
    found = load_classifier(resnet.state_dict(), {"classes": names}, "dogs")
    pictures = noise(2, 3, 64, 64).float()
    torch.testing.assert_close(found.network(pictures), resnet(pictures))
    assert not any(p.requires_grad for p in found.network.parameters())
    assert (found.number("3"), found.number("C ")) == (3, 2)
    with pytest.raises(OptimizationError, match="no class 7: 'dogs' has the classes 0 to 6"):
        found.number("7")
    with pytest.raises(OptimizationError, match=r"no class 'cat'.*one of its names"):
        found.number("cat")
    with pytest.raises(OptimizationError, match="does not name its classes"):
        load_classifier(resnet.state_dict(), {}, "dogs").number("c")


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "efficientnet_b0", "vit_b_32", "swin_t", "convnext_tiny"])
def test_other_architectures(architecture):
    import torchvision

    with torch.device("meta"):
        shapes = getattr(torchvision.models, architecture)(num_classes=5).state_dict()
    tensors = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}
    assert load_classifier(tensors, {}, "x").network(torch.zeros(1, 3, 224, 224)).shape == (1, 5)


def test_networks_that_are_not_torchvisions_are_refused(resnet):
    with pytest.raises(OptimizationError, match="no network of torchvision's"):
        load_classifier({**resnet.state_dict(), "extra.weight": torch.zeros(1)}, {}, "x")
    with pytest.raises(OptimizationError, match="no classifier: it has no last layer"):
        load_classifier({"conv.weight": torch.zeros(1)}, {}, "x")


class Payload:
    def __reduce__(self):
        return (open, ("executed.txt", "w"))


def test_files_are_read_without_running_anything_in_them(tmp_path, resnet, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    tensors = {"weight": torch.ones(1, 8), "bias": torch.zeros(1)}
    save_file(tensors, tmp_path / "a.safetensors", {"classes": "[]"})
    assert read_tensors(tmp_path / "a.safetensors")[1] == {"classes": "[]"}
    for wrapped in (tensors, {"state_dict": tensors}, {"model": {f"module.{key}": value for key, value in tensors.items()}}):
        torch.save(wrapped, tmp_path / "a.pth")
        assert set(read_tensors(tmp_path / "a.pth")[0]) == {"weight", "bias"}
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    torch.save({"x": Payload()}, tmp_path / "code.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:200])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:30])
    (tmp_path / "net.onnx").write_bytes(b"onnx")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    for name, words in {
        "script.pt": "is a program", "code.pth": "may run code", "cut.pth": "truncated", "cut.safetensors": "damaged",
        "net.onnx": "not an exported program", "empty.pth": "holds no tensors", "none.pth": "there is no file",
    }.items():  # fmt: skip
        with pytest.raises(OptimizationError, match=words):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "executed.txt").exists()
