"""Readout heads: what the network computes, and what is read from files, good and bad."""

from __future__ import annotations

import contextlib
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from rg_engine.convert import convert_head
from rg_engine.errors import HeadFileError, TargetError
from rg_engine.heads import (
    AggregationNetwork,
    HeadSpec,
    PixelNetwork,
    ReadoutHead,
    aggregation,
    load_head,
    save_head,
    to_authors_layout,
)
from rg_engine.heads.files import METADATA_KEY
from rg_engine.heads.pixel import FREQUENCIES, encode_noise_level

SIZE = (6, 5)


def save_authors(head, path, *, sequential=False, change=None, **config):
    """Write ``head`` as the authors do; ``change(tensors)`` spoils it, ``config`` is added to its configuration."""
    layout = to_authors_layout(head)
    layout["config"]["dataset_args"] = {"control_range": list(head.spec.control_range)}
    tensors = layout["aggregation_network"]
    if sequential:
        layout["aggregation_network"] = tensors = {_sequential(key): value for key, value in tensors.items()}
    if change is not None:
        change(tensors)
    layout["config"].update(config)
    torch.save(layout, path)
    return path


def _sequential(key):
    parts = key.split(".")
    return ".".join([*parts[:2], "0", *parts[2:]]) if parts[0] == "bottleneck_layers" else key


def same_tensors(a, b):
    ours, theirs = a.network.state_dict(), b.network.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# The network


@pytest.mark.parametrize(("kind", "channels"), [("spatial", 3), ("appearance", 32)])
def test_a_readout_has_the_latent_s_size(make_head, make_features, kind, channels):
    assert make_head(kind).read(*make_features(2), SIZE).shape == (2, channels, *SIZE)


def test_resizing_after_the_first_convolution_equals_resizing_the_features_first(make_head, make_features):
    network, (features, emb) = make_head("appearance").network.double(), make_features(2)
    resized = [F.interpolate(f.double(), SIZE, mode="bilinear") for f in features]
    torch.testing.assert_close(network(features, emb, SIZE), network(resized, emb, SIZE))


def token_head(in_channels=24, patch=2, **spec):
    """A small head that reads one map of tokens."""
    network = AggregationNetwork(
        (in_channels,), projection_channels=32, hidden=32, emb_width=0, output_channels=2, patches=[patch]
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ReadoutHead(
        network=network, spec=HeadSpec(kind="spatial", feature_channels=(in_channels,), **spec), name="tokens"
    )


@pytest.mark.parametrize("in_channels", [24, 32], ids=["other width", "as wide as the mixed map"])
def test_each_cell_of_a_token_has_weights_of_its_own(in_channels):
    layer, tokens = token_head(in_channels).network.bottleneck_layers[0], torch.randn(1, in_channels, 3, 4)
    conv1, shortcut = layer.conv1, layer.shortcut
    by_cell = conv1.weight[:, :, 0, 0].unflatten(0, (-1, 2, 2)), shortcut.weight[:, :, 0, 0].unflatten(0, (-1, 2, 2))
    cells = [torch.empty(1, 32, 6, 8) for _ in by_cell]
    for row in range(6):
        for column in range(8):
            for map_, weight in zip(cells, by_cell, strict=True):
                map_[0, :, row, column] = weight[:, row % 2, column % 2] @ tokens[0, :, row // 2, column // 2]
    middle = layer.conv2(F.relu(conv1.norm(cells[0])))
    wanted = F.relu(layer.conv3(F.relu(middle)) + shortcut.norm(cells[1]))
    torch.testing.assert_close(layer(tokens, None, (6, 8)), wanted)


def test_tokens_that_reach_beyond_the_latent_are_cut():
    """At odd sizes the tap repeats tokens into cells; they are read as the tokens that they were."""
    layer, tokens = token_head().network.bottleneck_layers[0], torch.randn(1, 24, 3, 4)
    repeated = tokens.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :5, :7]
    assert layer(tokens, None, (5, 7)).shape == (1, 32, 5, 7)
    torch.testing.assert_close(layer(repeated, None, (5, 7)), layer(tokens, None, (5, 7)))


def test_a_head_of_tokens_keeps_its_patches_in_its_file(tmp_path):
    head = token_head()
    save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert again.network.patches == (2,)
    tokens = [torch.randn(1, 24, 3, 4)]
    assert torch.equal(again.read(tokens, None, (6, 8)), head.read(tokens, None, (6, 8)))
    with pytest.raises(HeadFileError, match="the head of a transformer, which the authors' layout has no place for"):
        to_authors_layout(head)


def test_a_light_readout_and_its_gradient_are_the_same(make_head, make_features):
    network, (features, emb) = make_head("spatial").network, make_features(2)
    features = [f.requires_grad_() for f in features]
    found = []
    for light in (False, True):
        readout = network(features, emb, SIZE, light=light)
        found.append((readout, *torch.autograd.grad(readout.square().sum(), features)))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("emb_width", [0, 16])
def test_bottlenecks_side_by_side_give_what_each_gives(emb_width, monkeypatch):
    """With maps of several sizes, one of them the readout's, and two that are as wide as what is mixed."""
    channels, sizes = (48, 32, 24, 32, 48), ((3, 3), (3, 3), (6, 5), (6, 5), (12, 10))
    torch.manual_seed(0)
    network = AggregationNetwork(
        channels, projection_channels=32, hidden=32, emb_width=emb_width, output_channels=1
    ).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    features = [
        torch.randn(2, c, *size, dtype=torch.float64, requires_grad=True) for c, size in zip(channels, sizes, strict=True)
    ]
    emb, found = torch.randn(2, emb_width, dtype=torch.float64) if emb_width else None, []
    for few in (0, 2**18):
        monkeypatch.setattr(aggregation, "FEW", few)
        readout = network(features, emb, SIZE)
        found.append((readout, *torch.autograd.grad(readout.square().sum(), [*features, *network.parameters()])))
    for alone, together in zip(*found, strict=True):
        torch.testing.assert_close(together, alone)


def test_a_large_mixing_weight_leaves_one_layer(make_head, make_features):
    network, (features, emb) = make_head("appearance").network, make_features()
    network.mixing_weights.copy_(torch.tensor([0.0, 100.0, 0.0]))
    torch.testing.assert_close(network(features, emb, SIZE), network.bottleneck_layers[1](features[1], emb, SIZE))


def test_emb_changes_the_readout_and_none_leaves_it_out(make_head, make_features):
    features, emb = make_features()
    with_emb, without = make_head("appearance"), make_head("appearance", emb_width=0)
    missing, unexpected = without.network.load_state_dict(with_emb.network.state_dict(), strict=False)
    assert not missing
    assert all("emb_layers" in key for key in unexpected)
    plain = without.read(features, None, SIZE)
    assert torch.equal(with_emb.read(features, None, SIZE), plain)
    assert torch.equal(without.read(features, emb, SIZE), plain)
    assert not torch.allclose(with_emb.read(features, emb, SIZE), plain)


def test_a_readout_is_bounded_by_tanh_unless_its_head_has_no_activation(make_head, make_features):
    bounded, free = (make_head(activation=name).read(*make_features(), SIZE) for name in ("tanh", "none"))
    torch.testing.assert_close(bounded, free.tanh())


def test_a_picture_s_readout_does_not_depend_on_the_others(make_head, make_features):
    head, (features, emb) = make_head(), make_features(3)
    head.network.double()  # in fp32, rounding alone differs by 1e-5 where convolutions of one and of three are not the same
    alone = [head.read([f[i : i + 1] for f in features], emb[i : i + 1], SIZE) for i in range(3)]
    torch.testing.assert_close(head.read(features, emb, SIZE), torch.cat(alone))


# Files that are as they should be


def test_saving_and_loading_keeps_tensors_and_spec(make_head, tmp_path):
    head = make_head(
        control_range=(0.0, 2.0), backbone="SD1.5", use_emb=False, timestep_convention="reversed", activation="none",
        training={"steps": 7, "control": "pose"},
    )  # fmt: skip
    save_head(head, tmp_path / "h.safetensors")
    loaded = load_head(tmp_path / "h.safetensors")
    assert same_tensors(loaded, head)
    assert loaded.spec == head.spec
    assert loaded.network.activation == "none"
    assert not any(p.requires_grad for p in loaded.network.parameters())


def test_a_head_stored_in_fp16_is_half_as_large_and_is_run_in_fp32(make_head, make_features, tmp_path):
    head, full, half = make_head(), tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    save_head(head, full)
    save_head(head, half, dtype=torch.float16)
    assert half.stat().st_size < 0.6 * full.stat().st_size
    loaded = load_head(half)
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    features, emb = make_features()
    torch.testing.assert_close(loaded.read(features, emb, SIZE), head.read(features, emb, SIZE), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("sequential", [False, True])
def test_both_key_layouts_of_an_authors_file_are_read(make_head, make_features, tmp_path, sequential):
    head, (features, emb) = make_head(control_range=(0.0, 1.0)), make_features()
    loaded = load_head(save_authors(head, tmp_path / "h.pt", sequential=sequential))
    assert same_tensors(loaded, head)
    assert loaded.spec.control_range == (0.0, 1.0)
    assert loaded.spec.timestep_convention == "reversed"
    used = None if sequential else emb  # the authors' sequential layout never passes emb on
    torch.testing.assert_close(loaded.read(features, emb, SIZE), head.network(features, used, SIZE))
    assert loaded.emb_width == (None if sequential else 10)


@pytest.mark.parametrize("told", [None, "correspondence"])
def test_an_authors_correspondence_head_is_run_without_emb(make_head, make_features, tmp_path, told):
    head, (features, emb) = make_head("correspondence"), make_features()
    name = "readout_correspondence.pt" if told is None else "some.pt"
    loaded = load_head(save_authors(head, tmp_path / name), told)
    assert torch.equal(loaded.read(features, emb, SIZE), head.network(features, None, SIZE))


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("kind", ["spatial", "appearance"])
def test_converting_there_and_back_keeps_what_a_head_reads(make_head, make_features, tmp_path, kind, sequential):
    pt, ours, back = (tmp_path / name for name in ("appearance.pt", "ours.safetensors", "back_appearance.pt"))
    save_authors(make_head(kind), pt, sequential=sequential)
    convert_head(pt, ours)
    convert_head(ours, back)
    features, emb = make_features()
    first, last = load_head(pt), load_head(back)
    assert same_tensors(first, last)
    assert torch.equal(first.read(features, emb, SIZE), last.read(features, emb, SIZE))


def test_a_converted_head_still_says_its_kind(make_head, tmp_path):
    save_head(make_head("appearance"), tmp_path / "ours.safetensors")
    convert_head(tmp_path / "ours.safetensors", tmp_path / "back.pt")
    assert load_head(tmp_path / "back.pt").spec.kind == "appearance"


def test_converting_to_another_ending_is_refused(make_head, tmp_path):
    save_head(make_head(), tmp_path / "h.safetensors")
    with pytest.raises(HeadFileError, match=r"neither \.safetensors nor \.pt"):
        convert_head(tmp_path / "h.safetensors", tmp_path / "h.ckpt")


# The kind


@pytest.mark.parametrize(
    ("made", "channels", "name", "config", "kind"),
    [
        ("spatial", 3, "h.pt", {}, "spatial"),
        ("spatial", 18, "h.pt", {}, "keypoint"),
        ("spatial", 3, "not_appearance.pt", {}, "spatial"),
        ("appearance", 0, "readout_Appearance.pt", {}, "appearance"),
        ("appearance", 0, "readout_correspondence.pt", {}, "correspondence"),
        ("appearance", 0, "h.pt", {"dataset_args": {"dataset": "triplets"}}, "appearance"),
        ("appearance", 0, "h.pt", {"dataset_args": {"dataset": "point_tracks"}}, "correspondence"),
    ],
)
def test_auto_finds_the_kind_of_an_authors_file(make_head, tmp_path, made, channels, name, config, kind):
    head = make_head(made, output_channels=channels)
    assert load_head(save_authors(head, tmp_path / name, **config)).spec.kind == kind


@pytest.mark.parametrize(
    ("channels", "name", "kind"),
    [
        (3, "h.safetensors", "spatial"),
        (18, "h.safetensors", "keypoint"),
        (0, "an_appearance_head.safetensors", "appearance"),
        (0, "correspondence.safetensors", "correspondence"),
    ],
)
def test_auto_finds_the_kind_of_a_safetensors_file_without_metadata(make_head, tmp_path, channels, name, kind):
    save_file(make_head("spatial", output_channels=channels).network.state_dict(), tmp_path / name)
    assert load_head(tmp_path / name).spec.kind == kind


def test_where_auto_cannot_tell_the_error_asks_for_kind(make_head, tmp_path):
    pt, ours = save_authors(make_head("appearance"), tmp_path / "h.pt"), tmp_path / "h.safetensors"
    save_file(make_head("appearance").network.state_dict(), ours)
    for path in (pt, ours):
        with pytest.raises(HeadFileError, match="choose appearance or correspondence as kind"):
            load_head(path)
        assert load_head(path, "appearance").spec.kind == "appearance"


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ("appearance", "spatial"), ("appearance", "keypoint"), ("spatial", "appearance"), ("spatial", "correspondence"),
        ("spatial", "lgp"), ("spatial", "no such kind"),
    ],
)  # fmt: skip
def test_a_kind_that_the_tensors_contradict_is_refused(make_head, tmp_path, made, told):
    save_head(make_head(made), tmp_path / "h.safetensors")
    with pytest.raises(HeadFileError, match=told):
        load_head(tmp_path / "h.safetensors", told)


# Files that are not as they should be


@pytest.mark.parametrize(
    "key",
    [
        "bottleneck_layers.0.conv1.weight",
        "bottleneck_layers.0.conv3.weight",
        "bottleneck_layers.0.emb_layers.weight",
        "bottleneck_layers.1.conv2.norm.bias",
        "output_head.0.weight",
        "output_head.4.weight",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "larger", "a number"])
def test_a_damaged_tensor_is_named(make_head, tmp_path, key, damage):
    def change(tensors):
        value = tensors.pop(key)
        if damage != "missing":
            tensors[key] = torch.cat([value, value[:1]]) if damage == "larger" else torch.tensor(1.0)

    path = save_authors(make_head(), tmp_path / "h.pt", change=change)
    with pytest.raises(HeadFileError, match=key.rpartition(".")[0]):
        load_head(path)


@pytest.mark.parametrize("key", ["extra.weight", "bottleneck_layers.1.conv4.weight"])
def test_an_unexpected_tensor_is_named(make_head, tmp_path, key):
    path = save_authors(make_head(), tmp_path / "h.pt", change=lambda tensors: tensors.update({key: torch.ones(2)}))
    with pytest.raises(HeadFileError, match=f"unexpected {key}"):
        load_head(path)


def test_a_head_over_several_timesteps_is_refused(make_head, tmp_path):
    path = save_authors(make_head(), tmp_path / "h.pt", change=lambda t: t.update(mixing_weights=torch.ones(6)))
    with pytest.raises(HeadFileError, match="several timesteps"):
        load_head(path)


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".legacy.pt"])
def test_a_file_cut_off_anywhere_is_refused(make_head, tmp_path, ending):
    whole, cut = tmp_path / f"whole{ending}", tmp_path / f"cut{ending}"
    if ending == ".safetensors":
        save_head(make_head(), whole)
    else:
        torch.save(to_authors_layout(make_head()), whole, _use_new_zipfile_serialization=ending == ".pt")
    content = whole.read_bytes()
    for length in (*range(60), *range(60, len(content), len(content) // 40)):
        cut.write_bytes(content[:length])
        with pytest.raises(HeadFileError, match="cut"):
            load_head(cut)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        b"PK\x03\x04garbage",
        b"\x80\x02.",
        b"\x80\x02}.",
        b"\x80\x02K\x01a.",
        bytes(range(256)),
        pickle.dumps([1, "x"], protocol=2),
    ],
    ids=lambda content: repr(content)[:20],
)
def test_a_file_of_something_else_is_refused(tmp_path, ending, content):
    path = tmp_path / f"h{ending}"
    path.write_bytes(content)
    with pytest.raises(HeadFileError, match="'h"):
        load_head(path)


@pytest.mark.parametrize(
    "saved",
    [
        {},
        [1],
        {"config": {}},
        {"aggregation_network": {}},
        {"aggregation_network": {"mixing_weights": 1}},
        {"aggregation_network": {"mixing_weights": torch.ones(1)}},
    ],
)
def test_a_pytorch_file_of_something_else_is_refused(tmp_path, saved):
    torch.save(saved, tmp_path / "h.pt")
    with pytest.raises(HeadFileError, match="not a readout head"):
        load_head(tmp_path / "h.pt")


@pytest.mark.parametrize(
    "config",
    [
        {"dataset_args": {"control_range": "wide"}},
        {"dataset_args": {"control_range": 1}},
        {"dataset_args": [1]},
        {"aggregation_kwargs": [1]},
    ],
)
def test_an_authors_file_with_a_damaged_configuration_is_refused(make_head, tmp_path, config):
    with pytest.raises(HeadFileError, match=r"h\.pt"):
        load_head(save_authors(make_head(), tmp_path / "h.pt", **config))


def test_a_missing_file_is_named_with_the_folder_to_put_it_in(tmp_path):
    with pytest.raises(HeadFileError, match=r"'h.pt'.*models/readout_heads"):
        load_head(tmp_path / "h.pt")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("container", ["pickle", "legacy", "zip"])
def test_code_in_a_file_is_not_run(tmp_path, container):
    path, marker = tmp_path / "h.pt", tmp_path / "code was run"
    content = {"aggregation_network": {"mixing_weights": torch.ones(1)}, "config": Trap(marker)}
    if container == "pickle":
        path.write_bytes(pickle.dumps({"config": Trap(marker)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(HeadFileError, match="may run code"):
        load_head(path)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert marker.exists(), "the trap works"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": "2"}, "head format 2"),
        ({"colour": "blue"}, "colour"),
        ({"kind": "smell"}, "kind 'smell' is unknown"),
        ({"activation": "relu"}, "activation 'relu' is unknown"),
        ({"timestep_convention": "x"}, "timestep_convention 'x' is unknown"),
        ({"control_range": [1.0, 0.0]}, "control_range"),
        ({"control_range": [0.0, 1.0, 2.0]}, "range"),
        ({"control_range": None}, "damaged metadata"),
    ],
)
def test_metadata_that_is_not_understood_is_refused(make_head, tmp_path, change, words):
    path = tmp_path / "h.safetensors"
    head = make_head()
    save_head(head, path)
    described = {"format_version": "1", "feature_channels": [], "kind": "spatial", "control_range": [0.0, 1.0], **change}
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(described)})
    with pytest.raises(HeadFileError, match=words):
        load_head(path)


@pytest.mark.parametrize("text", ["{", "[]", "1", '"x"', "{}", '{"format_version": "1"}'])
def test_damaged_metadata_is_refused(make_head, tmp_path, text):
    path = tmp_path / "h.safetensors"
    save_file(make_head().network.state_dict(), path, metadata={METADATA_KEY: text})
    with pytest.raises(HeadFileError, match="damaged metadata"):
        load_head(path)


# The per-pixel network

PIXEL_CHANNELS, LEVELS = (8, 12, 32), torch.tensor([0.2, 0.7])  # the maps of make_features


@pytest.fixture
def pixel_head():
    """A small per-pixel head with random weights."""
    network = PixelNetwork(PIXEL_CHANNELS, output_channels=4, widths=(24, 16, 8)).eval().requires_grad_(False)
    spec = HeadSpec(kind="lgp", feature_channels=PIXEL_CHANNELS, activation="none", backbone="SD1.5", training={"steps": 7})
    return ReadoutHead(network=network, spec=spec, name="a pixel head")


def test_a_per_pixel_readout_is_the_latent_s_own_size_and_channels(pixel_head, make_features):
    assert pixel_head.read(*make_features(2), SIZE, LEVELS).shape == (2, 4, *SIZE)
    assert (pixel_head.output_channels, pixel_head.emb_width) == (4, None)


def test_a_per_pixel_network_has_the_paper_s_widths():
    network = PixelNetwork((3, 5), output_channels=4)
    assert [tuple(layer.weight.shape) for layer in network.layers] == [(256, 512), (128, 256), (64, 128), (4, 64)]
    assert [layer.weight.shape[1] for layer in network.map_layers] == [3, 5]


def test_a_per_pixel_readout_depends_on_its_own_place_only(pixel_head):
    maps = [torch.randn(1, channels, *SIZE) for channels in PIXEL_CHANNELS]  # of the latent's size: no resize
    before = pixel_head.read(maps, None, SIZE, LEVELS[:1])
    for map_ in maps:
        map_[..., 3, 2] += 1
    changed = (pixel_head.read(maps, None, SIZE, LEVELS[:1]) - before).abs().amax(1)[0] > 1e-4
    assert changed.nonzero().tolist() == [[3, 2]]


def test_a_per_pixel_network_on_resized_maps_is_the_same_mlp_at_every_place(pixel_head, make_features):
    features, _ = make_features(2)
    network = pixel_head.network.double()
    resized = [F.interpolate(f.double(), SIZE, mode="bilinear") for f in features]
    x = torch.cat(resized, 1).permute(0, 2, 3, 1)  # (B, H, W, C), as the paper concatenates them
    first = torch.cat([layer.weight[:, :, 0, 0] for layer in network.map_layers], 1)
    x = x @ first.T + network.noise_layer(encode_noise_level(LEVELS).double())[:, None, None]
    for norm, layer in zip(network.norms, network.layers, strict=True):
        x = layer(norm(x.relu()))
    torch.testing.assert_close(network(features, LEVELS, SIZE), x.permute(0, 3, 1, 2))


def test_the_noise_level_matters_picture_by_picture_and_must_be_given(pixel_head, make_features):
    features, emb = make_features(2)
    plain, other = (pixel_head.read(features, emb, SIZE, torch.tensor([0.2, level])) for level in (0.7, 0.71))
    assert torch.equal(plain[0], other[0])
    assert not torch.allclose(plain[1], other[1])
    assert torch.equal(pixel_head.read(features, None, SIZE, torch.tensor([0.2, 0.7])), plain), "it reads no emb"
    with pytest.raises(TargetError, match="'a pixel head' reads the noise level: pass noise_level"):
        pixel_head.read(features, emb, SIZE)


def test_the_encoding_tells_noise_levels_apart():
    levels = torch.linspace(0, 1, 101)
    encoded = encode_noise_level(levels)
    assert encoded.shape == (101, 2 * FREQUENCIES)
    assert encoded.abs().max() <= 1
    distances = torch.cdist(encoded, encoded) + 10 * torch.eye(101)
    assert distances.min() > 0.5
    torch.testing.assert_close(encode_noise_level(torch.tensor([0.5]))[0, [0, FREQUENCIES]], torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_per_pixel_head_is_saved_and_loaded(pixel_head, make_features, tmp_path, dtype):
    save_head(pixel_head, tmp_path / "h.safetensors", dtype)
    loaded = load_head(tmp_path / "h.safetensors")
    assert loaded.spec == pixel_head.spec
    assert not any(p.requires_grad for p in loaded.network.parameters())
    features, emb = make_features(2)
    readout, expected = (head.read(features, emb, SIZE, LEVELS) for head in (loaded, pixel_head))
    if dtype is None:
        assert torch.equal(readout, expected)
    torch.testing.assert_close(readout, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("told", [None, "lgp"])
def test_a_per_pixel_head_is_known_by_its_tensors(pixel_head, tmp_path, told):
    save_file(pixel_head.network.state_dict(), tmp_path / "appearance.safetensors")
    loaded = load_head(tmp_path / "appearance.safetensors", told)
    assert loaded.spec.kind == "lgp"
    assert loaded.spec.feature_channels == PIXEL_CHANNELS
    assert same_tensors(loaded, pixel_head)


@pytest.mark.parametrize("told", ["spatial", "keypoint", "appearance", "correspondence"])
def test_a_per_pixel_head_is_of_no_other_kind(pixel_head, tmp_path, told):
    save_head(pixel_head, tmp_path / "h.safetensors")
    with pytest.raises(HeadFileError, match=f"can't be read as {told}: it is a per-pixel network. Choose lgp or auto"):
        load_head(tmp_path / "h.safetensors", told)


@pytest.mark.parametrize("damage", ["missing", "larger", "a number"])
@pytest.mark.parametrize(
    "key",
    ["map_layers.1.weight", "noise_layer.bias", "norms.0.weight", "layers.0.weight", "layers.2.weight", "layers.2.bias"],
)
def test_a_damaged_tensor_of_a_per_pixel_head_is_named(pixel_head, tmp_path, key, damage):
    tensors = pixel_head.network.state_dict()
    value = tensors.pop(key)
    if damage != "missing":
        tensors[key] = torch.cat([value, value[:1]]) if damage == "larger" else torch.tensor(1.0)
    save_file(tensors, tmp_path / "h.safetensors")
    with pytest.raises(HeadFileError, match=rf"'h\.safetensors' is not a complete readout head.*{key.split('.')[0]}"):
        load_head(tmp_path / "h.safetensors")


@pytest.mark.parametrize("part", ["map_layers.", "layers."])
def test_a_per_pixel_head_without_layers_is_refused(pixel_head, tmp_path, part):
    tensors = {key: value for key, value in pixel_head.network.state_dict().items() if not key.startswith(part)}
    save_file(tensors, tmp_path / "h.safetensors")
    with pytest.raises(HeadFileError, match=r"not a complete readout head: .*layers"):
        load_head(tmp_path / "h.safetensors")


def test_the_authors_layout_has_no_place_for_a_per_pixel_head(pixel_head, tmp_path):
    save_head(pixel_head, tmp_path / "h.safetensors")
    with pytest.raises(HeadFileError, match="per-pixel head, which the authors' layout has no place for"):
        convert_head(tmp_path / "h.safetensors", tmp_path / "h.pt")
    assert not (tmp_path / "h.pt").exists()
