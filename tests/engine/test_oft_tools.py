"""Files that PEFT and LyCORIS write here and now, of other sizes than the kit's; skipped where they are not installed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rg_engine.adapters import load_adapter


def layers(linear: tuple[int, int], convolution: tuple[int, int], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential()
    module.add_module("a", nn.Linear(*linear, bias=False))
    module.add_module("c", nn.Conv2d(*convolution, 3, bias=False))
    return module


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.get_submodule(name).weight.detach().clone() for name in ("a", "c")}


def check(path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    read = load_adapter(path).layers
    assert sorted(layer.name for layer in read) == ["a", "c"]
    for layer in read:
        rotation = layer.rotation.fitted(tuple(before[layer.name].shape), layer.key)
        assert float((before[layer.name] - after[layer.name]).abs().max()) > 1e-3
        assert float((rotation.turn(before[layer.name]) - after[layer.name]).abs().max()) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"oft_block_size": 6, "r": 0, "num_cayley_neumann_terms": 2},
        {"oft_block_size": 6, "r": 0, "num_cayley_neumann_terms": 3},
        {"oft_block_size": 6, "r": 0, "num_cayley_neumann_terms": 4},
        {"oft_block_size": 6, "r": 0, "num_cayley_neumann_terms": 7},
        {"oft_block_size": 0, "r": 3, "use_cayley_neumann": False},
        {"oft_block_size": 0, "r": 1, "use_cayley_neumann": False},
        {"oft_block_size": 12, "r": 0, "block_share": True, "use_cayley_neumann": False},
        {"oft_block_size": 4, "r": 0, "coft": True, "eps": 0.05},
    ],
)
def test_peft(tmp_path, settings):
    peft = pytest.importorskip("peft")
    module = layers((48, 80), (12, 20), seed=1)
    before = weights(module)
    tuned = peft.get_peft_model(module, peft.OFTConfig(target_modules=["a", "c"], init_weights=False, **settings))
    for name, parameter in tuned.named_parameters():
        if "oft_R" in name:
            parameter.data.normal_(0, 0.08)
    tuned.save_pretrained(str(tmp_path))
    check(tmp_path / "adapter_model.safetensors", before, weights(tuned.merge_and_unload()))


@pytest.mark.parametrize(
    "settings",
    [
        {"algo": "diag-oft", "constraint": 0.0},
        {"algo": "diag-oft", "constraint": 0.02, "rescaled": True},
        {"algo": "boft", "constraint": 0.0},
        {"algo": "boft", "constraint": 0.01, "rescaled": True},
    ],
)
def test_lycoris(tmp_path, settings):
    lycoris = pytest.importorskip("lycoris")
    module = layers((48, 96), (12, 64), seed=2)
    before = weights(module)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Sequential", "Linear", "Conv2d"], "enable_conv": True})
    network = lycoris.create_lycoris(module, 1.0, linear_dim=8, linear_alpha=1.0, conv_dim=8, conv_alpha=1.0, **settings)
    network.apply_to()
    for name, parameter in network.named_parameters():
        if "oft_blocks" in name:
            parameter.data.normal_(0, 0.1)
        if "rescale" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    state = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
    save_file(state, tmp_path / "lycoris.safetensors")
    network.restore()
    network.merge_to()
    check(tmp_path / "lycoris.safetensors", before, weights(module))
