"""Hidden features read and replaced: which module, which rows, for how many calls, gone after each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine

pytestmark = pytest.mark.usefixtures("comfyui")


class Block(torch.nn.Module):
    """A transformer's block, as some are: tokens of the picture and of the text."""

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def forward(self, x):
        return (x + 1, "text") if self.pair else x + 1


class Network(torch.nn.Module):
    def __init__(self, pair=False):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(pair) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def call(hidden, network, x, kinds):
    """One call of the model through the wrapper, as ComfyUI makes it."""

    def run(*args):
        return network(args[0])

    run.class_obj = SimpleNamespace(diffusion_model=network)
    return hidden.apply_model(run, x, None, None, None, None, {"cond_or_uncond": kinds})


def module():
    return engine("comfy_host.edits.hidden")


def test_where_h_is_follows_from_what_is_known_of_the_backbone():
    taps = ("blocks.0", "blocks.1", "blocks.2")
    backbone = engine("features").Backbone(name="a transformer", taps=taps, channels=(4,) * 3, emb_tap="", emb_width=0)
    assert module().hidden_path(Network(), backbone) == "blocks.1"
    unet = SimpleNamespace(middle_block=[1, 2, 3])
    assert module().hidden_path(unet, backbone) == "middle_block.2"


@pytest.mark.parametrize("pair", [False, True], ids=["a tensor", "a pair"])
def test_it_is_read_of_the_prompt_s_rows_and_replaced_in_the_first_call_only(pair):
    network, hidden = Network(pair), module().Hidden("blocks.1")
    x = torch.arange(4.0).view(4, 1)
    assert torch.equal(call(hidden, network, x, [1, 0]), x + 3)
    assert torch.equal(hidden.seen, x[2:] + 2)  # the second half is the prompt's
    put = torch.tensor([[100.0], [200.0]])
    hidden.put(put, torch.tensor([True, False]))
    out = call(hidden, network, x, [1, 0])
    assert out.flatten().tolist() == [101.0, 4.0, 101.0, 6.0]
    assert torch.equal(hidden.seen, x[2:] + 2)  # its own, before it was replaced
    hidden.next_step()
    assert torch.equal(call(hidden, network, x, [1, 0]), x + 3)
    assert not any(block._forward_hooks for block in network.blocks)


def test_stale_hands_on_the_call_before_s():
    network, hidden = Network(), module().Hidden("blocks.1", stale=True)
    hidden.put(torch.tensor([[100.0]]), torch.tensor([True]))
    outs = []
    for value in (1.0, 5.0, 9.0):
        outs.append(float(call(hidden, network, torch.tensor([[value]]), [0])))
        hidden.next_step()
    assert outs == [101.0, 1.0 + 2 + 1, 5.0 + 2 + 1]


def test_a_network_that_runs_without_its_module_is_told_of():
    network, hidden = Network(), module().Hidden("blocks.1")
    network.forward = lambda x: x
    with pytest.raises(engine("errors").BoundaryError, match=r"ran without its blocks\.1"):
        call(hidden, network, torch.ones(1, 1), [0])
    assert not any(block._forward_hooks for block in network.blocks)
