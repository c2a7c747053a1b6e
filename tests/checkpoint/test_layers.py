"""Which numbered names are the decoder's layers, in every naming that people merge."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from slrmerge.checkpoint.layers import (
    DECODER_COUNT_KEYS,
    ENCODER_COUNT_KEYS,
    LAYER_COUNT_KEYS,
    STACK_PREFIXES,
    TEXT_CONFIG_KEYS,
    LayerStack,
    find_stack,
    layer_count,
    missing_layers,
    numbered_stacks,
)


def layers(prefix: str, count: int, inner: str = "mlp.weight") -> list[str]:
    return [f"{prefix}.{k}.{inner}" for k in range(count)]


def stack_of(names: Iterable[str], count: int | None) -> LayerStack | None:
    return find_stack(numbered_stacks(names), {} if count is None else {"num_hidden_layers": count})


NAMINGS = [*STACK_PREFIXES, "encoder.layer", "layers", "h", "backbone.layers", "transformer.blocks"]


@pytest.mark.parametrize("prefix", NAMINGS)
@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("said", [True, False], ids=["config gives the count", "config is silent"])
def test_a_models_only_stack_is_found_whatever_its_name(prefix: str, count: int, said: bool) -> None:
    names = ["model.embed_tokens.weight", *layers(prefix, count), "model.norm.weight", "lm_head.weight"]
    assert stack_of(names, count if said else None) == LayerStack(prefix, count)


def test_a_codec_is_no_encoder_decoder() -> None:
    codec = [
        name for half in ("encoder", "decoder") for name in layers(f"audio_encoder.{half}.layers", 2, "conv.weight")
    ]
    stacks, config = numbered_stacks([*codec, *layers("decoder.model.decoder.layers", 6)]), {"num_hidden_layers": 6}
    assert missing_layers(stacks, config) is None
    assert find_stack(stacks, config) == LayerStack("decoder.model.decoder.layers", 6)


@pytest.mark.parametrize(
    ("stacks", "config", "expected"),
    [
        pytest.param(
            {"backbone_model.layers": 16, "depth_decoder.model.layers": 4, "codec_model.encoder.transformer.layers": 8,
             "codec_model.decoder.transformer.layers": 8},
            {"num_hidden_layers": 16}, "backbone_model.layers", id="csm",
        ),
        pytest.param(
            {"model.vision_model.encoder.layers": 24, "model.vqmodel.encoder.down": 5, "model.vqmodel.decoder.up": 5,
             "model.language_model.layers": 32},
            {"text_config": {"num_hidden_layers": 32}}, "model.language_model.layers", id="janus",
        ),
        pytest.param(
            {"semantic.layers": 12, "coarse_acoustics.layers": 12, "codec_model.encoder.layers": 2,
             "codec_model.decoder.layers": 2},
            {}, None, id="bark",
        ),
        pytest.param(
            {"model.encoder.conv.conv_layers": 2, "model.encoder.layers": 12, "model.decoder.layers": 6},
            {"encoder_layers": 12, "decoder_layers": 6}, "model.decoder.layers", id="speech_to_text",
        ),
        pytest.param(
            {"text_encoder.layers": 24, "speech_encoder.encoder.layers": 24, "text_decoder.layers": 24,
             "t2u_model.model.encoder.layers": 6, "t2u_model.model.decoder.layers": 6},
            {"encoder_layers": 24, "decoder_layers": 24}, "text_decoder.layers", id="seamless_m4t",
        ),
        pytest.param(
            {"speech_encoder.encoder.layers": 24, "text_decoder.layers": 24},
            {"encoder_layers": 24, "decoder_layers": 24}, "text_decoder.layers", id="seamless_m4t-speech",
        ),
        pytest.param(
            {"talker.model.layers": 28, "thinker.model.layers": 28},
            {"thinker_config": {"text_config": {"num_hidden_layers": 28}}}, "thinker.model.layers", id="omni",
        ),
        pytest.param(
            {"model.L_module.layers": 16, "model.H_module.layers": 16}, {"num_hidden_layers": 128}, None, id="hrm",
        ),
    ],
)  # fmt: skip
def test_of_several_stacks_the_layers_are_those_that_write_text(
    stacks: dict[str, int], config: dict[str, Any], expected: str | None
) -> None:
    found = find_stack(stacks, config)
    assert (found and found.prefix) == expected
    assert missing_layers(stacks, config) is None


def test_the_layers_of_albert_are_its_groups() -> None:
    names = layers("albert.encoder.albert_layer_groups", 2, "albert_layers.0.ffn.weight")
    stacks, config = numbered_stacks(names), {"num_hidden_layers": 12, "num_hidden_groups": 2}
    assert find_stack(stacks, config) == LayerStack("albert.encoder.albert_layer_groups", 2)
    assert missing_layers(stacks, config) is None


@pytest.mark.parametrize("prefix", NAMINGS)
@pytest.mark.parametrize("vision", ["vision_tower.encoder.layers", "visual.blocks", "model.vision.encoder.layers"])
def test_a_shorter_vision_tower_is_not_the_decoder(prefix: str, vision: str) -> None:
    for names in (layers(vision, 4) + layers(prefix, 6), layers(prefix, 6) + layers(vision, 4)):
        assert stack_of(names, 6) == LayerStack(prefix, 6)


@pytest.mark.parametrize("prefix", [*STACK_PREFIXES, "backbone.layers"])
def test_a_longer_vision_tower_is_not_the_decoder(prefix: str) -> None:
    assert stack_of(layers("vision_tower.encoder.layers", 8) + layers(prefix, 6), 6) == LayerStack(prefix, 6)


@pytest.mark.parametrize("prefix", STACK_PREFIXES)
def test_a_vision_tower_of_the_same_length_gives_way_to_a_known_prefix(prefix: str) -> None:
    assert stack_of(layers("vision_tower.encoder.layers", 6) + layers(prefix, 6), 6) == LayerStack(prefix, 6)


@pytest.mark.parametrize("prefix", ["language.model.layers", "backbone.layers", "decoder.blocks"])
def test_a_vision_tower_of_the_same_length_gives_way_to_any_other_prefix(prefix: str) -> None:
    for vision in ("vision_tower.encoder.layers", "model.visual.blocks"):
        assert stack_of(layers(vision, 6) + layers(prefix, 6), 6) == LayerStack(prefix, 6)
        assert stack_of(layers(prefix, 6) + layers(vision, 6), 6) == LayerStack(prefix, 6)


def test_a_longer_vision_tower_is_not_taken_for_a_decoder_that_lacks_layers() -> None:
    names = layers("vision_tower.encoder.layers", 8) + layers("model.language_model.layers", 5)
    assert stack_of(names, 6) is None


def test_the_decoder_of_an_omni_model_is_that_of_the_part_that_writes() -> None:
    names = [*layers("thinker.model.layers", 4), *layers("talker.model.layers", 3), *layers("token2wav.dit.blocks", 5)]
    parts = {part: {"text_config": {"num_hidden_layers": count}} for part, count in (("thinker", 4), ("talker", 3))}
    config = {f"{part}_config": section for part, section in parts.items()}
    assert find_stack(numbered_stacks(names), config) == LayerStack("thinker.model.layers", 4)


def test_extra_prediction_layers_past_the_count_are_outside() -> None:
    stack = stack_of(layers("model.layers", 62), 61)
    assert stack == LayerStack("model.layers", 61)
    assert stack.locate("model.layers.60.mlp.weight") == (60, "mlp.weight")
    assert stack.locate("model.layers.61.mlp.weight") is None


def test_experts_are_numbered_inside_their_layer() -> None:
    names = [f"model.layers.{k}.mlp.experts.{e}.up_proj.weight" for k in range(3) for e in range(3)]
    assert numbered_stacks(names) == {"model.layers": 3}
    stack = stack_of(names, 3)
    assert stack == LayerStack("model.layers", 3)
    assert stack.locate("model.layers.2.mlp.experts.1.up_proj.weight") == (2, "mlp.experts.1.up_proj.weight")


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (layers("tower_a.layers", 4) + layers("tower_b.layers", 6), None),
        (layers("model.layers", 4), 6),
        (layers("model.layers", 6)[1:], None),
        (layers("model.layers", 6), 0),
        (layers("model.layers", 6), -1),
        (["wte.weight", "model.layers.weight", "model.layers.0"], None),
        ([], 6),
        ([], None),
    ],
    ids=["two towers", "too short", "no layer 0", "none", "fewer than none", "not numbered", "empty", "empty, unsaid"],
)  # fmt: skip
def test_there_is_no_stack_where_none_or_more_than_one_fits(names: list[str], count: int | None) -> None:
    assert stack_of(names, count) is None


HALVES = [("encoder.block", "decoder.block"), ("model.encoder.layers", "model.decoder.layers"),
          ("encoder.encoder.layer", "decoder.transformer.h")]  # fmt: skip


@pytest.mark.parametrize(("encoder", "decoder"), HALVES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 6},
        {"num_hidden_layers": 2},
        {"num_layers": 6, "num_decoder_layers": 2},
        {"num_hidden_layers": 6, "encoder_layers": 6, "decoder_layers": 2},
        {"encoder": {"num_hidden_layers": 6}, "decoder": {"num_hidden_layers": 2}},
    ],
)
def test_the_stack_of_an_encoder_decoder_is_the_decoders(encoder: str, decoder: str, config: dict[str, Any]) -> None:
    for names in (layers(encoder, 6) + layers(decoder, 2), layers(decoder, 2) + layers(encoder, 6)):
        assert find_stack(numbered_stacks(names), config) == LayerStack(decoder, 2)
        assert missing_layers(numbered_stacks(names), config) is None


@pytest.mark.parametrize("key", DECODER_COUNT_KEYS)
def test_a_decoder_alone_has_as_many_layers_as_its_own_key_says(key: str) -> None:
    """transformers 4 writes the number of encoder layers as num_hidden_layers."""
    stacks, config = numbered_stacks(layers("model.decoder.layers", 2)), {"num_hidden_layers": 6, key: 2}
    assert find_stack(stacks, config) == LayerStack("model.decoder.layers", 2)
    assert missing_layers(stacks, config) is None
    assert missing_layers(stacks, config | {key: 3}) == (3, 2)


@pytest.mark.parametrize("key", ENCODER_COUNT_KEYS)
def test_an_encoder_with_fewer_layers_than_its_key_says_lacks_some(key: str) -> None:
    stacks = numbered_stacks(layers("encoder.block", 5) + layers("decoder.block", 6))
    assert missing_layers(stacks, {"num_decoder_layers": 6, key: 6}) == (6, 5)
    assert missing_layers(stacks, {"num_decoder_layers": 6, key: 5}) is None


@pytest.mark.parametrize(
    ("stacks", "count", "missing"),
    [
        ({"model.layers": 4}, 6, (6, 4)),
        ({"vision.layers": 8, "model.layers": 4}, 6, (6, 4)),
        ({"vision.layers": 8, "other.layers": 4}, 6, None),
        ({"model.layers": 6}, 6, None),
        ({"model.layers": 7}, 6, None),
        ({"model.layers": 6}, None, None),
        ({}, 6, (6, 0)),
        ({}, 0, None),
        ({}, None, None),
    ],
)
def test_missing_layers_are_those_that_no_stack_has(
    stacks: dict[str, int], count: int | None, missing: tuple[int, int] | None
) -> None:
    assert missing_layers(stacks, {} if count is None else {"num_hidden_layers": count}) == missing


def test_layers_count_only_as_far_as_they_follow_one_another() -> None:
    assert numbered_stacks([*layers("a", 3), "a.4.w", "b.1.w", "c.0.w.1.x"]) == {"a": 3, "b": 0, "c": 1}
    assert stack_of([*layers("a", 3), "a.4.w"], None) == LayerStack("a", 3)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.0.mlp.weight", (0, "mlp.weight")),
        ("model.layers.11.w", (11, "w")),
        ("model.layers.12.w", None),
        ("model.layers.1", None),
        ("model.layers.1.", None),
        ("model.layers.-1.w", None),
        ("model.layers.one.w", None),
        ("model.layers.².w", None),
        ("model.layers", None),
        ("model.layers_x.1.w", None),
        ("model.layers2.1.w", None),
        ("x.model.layers.1.w", None),
        ("lm_head.weight", None),
    ],
)
def test_a_name_is_located_in_its_layer_or_outside(name: str, place: tuple[int, str] | None) -> None:
    assert LayerStack("model.layers", 12).locate(name) == place


def test_a_number_of_thousands_of_digits_is_no_layer() -> None:
    name = f"model.layers.{'9' * 5000}.w"
    assert stack_of([*layers("model.layers", 3), name], 3) == LayerStack("model.layers", 3)
    assert LayerStack("model.layers", 3).locate(name) is None


@pytest.mark.parametrize("key", LAYER_COUNT_KEYS)
@pytest.mark.parametrize("section", [None, *TEXT_CONFIG_KEYS])
def test_every_key_for_the_count_is_read_at_the_top_and_in_the_text_section(key: str, section: str | None) -> None:
    vision = {"vision_config": {"num_hidden_layers": 99}}
    assert layer_count(vision | ({key: 7} if section is None else {section: {key: 7}})) == 7


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, None),
        ({"hidden_size": 8}, None),
        ({"vision_config": {"num_hidden_layers": 9}}, None),
        ({"num_hidden_layers": None}, None),
        ({"num_hidden_layers": "6"}, None),
        ({"num_hidden_layers": 6.0}, None),
        ({"num_hidden_layers": True}, None),
        ({"text_config": None}, None),
        ({"text_config": ["num_hidden_layers"]}, None),
        ({"num_hidden_layers": None, "n_layer": 6}, 6),
        ({"num_hidden_layers": 16, "text_config": {"num_hidden_layers": 12}}, 12),  # CLAP adds those of audio
        ({"num_hidden_layers": 6, "num_layers": 7}, 6),
    ],
)
def test_a_count_is_a_whole_number_or_not_there(config: Mapping[str, Any], count: int | None) -> None:
    assert layer_count(config) == count
