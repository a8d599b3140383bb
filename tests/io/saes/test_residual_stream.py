"""Which activations an autoencoder is of, by what its file records."""

import re

import pytest

from assay.io.saes import Recorded
from assay.io.saes.residual_stream import check_place

AFTER_7 = [
    Recorded(7),
    Recorded(7, "resid_post"),
    Recorded(7, "hook_resid_post"),
    Recorded(7, "blocks.7.hook_resid_post"),
    Recorded(7, "blocks.7"),
    Recorded(None, "blocks.7.hook_resid_post"),
    Recorded(None, "resid_post_layer_7"),
    Recorded(None, "blocks.8.hook_resid_pre"),
    Recorded(8, "blocks.8.hook_resid_pre"),
    Recorded(8, "hook_resid_pre"),
    Recorded(None, "blocks.7"),
    Recorded(None, "layers.7"),
    Recorded(None, "layers_7"),
    Recorded(None, "encoder.layers.7"),
    Recorded(None, "vision_model.encoder.layers.7"),
    Recorded(None, "visual.transformer.resblocks.7"),
    Recorded(None, "transformer.h.7"),
    Recorded(None, "h.7"),
    Recorded(None, "encoder.layer.7"),
]


@pytest.mark.parametrize("recorded", AFTER_7, ids=str)
def test_the_output_of_a_block_goes_by_many_names(recorded):
    assert check_place(recorded, 7)
    for other in (6, 8, 0):
        with pytest.raises(
            ValueError, match=rf"the residual stream after block 7, wanted layer {other}: name the"
        ):
            check_place(recorded, other)


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.7.hook_mlp_out",
        "blocks.7.hook_attn_out",
        "blocks.7.hook_resid_mid",
        "blocks.7.ln2.hook_normalized",
        "ln2.hook_normalized",
        "blocks.7.attn.hook_z",
        "layers.7.mlp",
        "layers.0.blocks.7",
        "text_model.encoder.layers.7",
        "model.decoder.layers.7",
        "hook_embed",
        "resid",
        "blocks.7.hook_resid_post.0",
        "layers.",
    ],
)
def test_other_activations_are_refused_by_name(hook):
    wanted = re.escape(f"it was trained on {hook} of layer 7, wanted the residual stream")
    for layer in (7, -2):
        with pytest.raises(ValueError, match=wanted):
            check_place(Recorded(7, hook), layer)


def test_what_is_before_the_first_block_is_no_blocks_output():
    recorded = Recorded(0, "blocks.0.hook_resid_pre")
    for layer in (0, 1):
        with pytest.raises(ValueError, match="the residual stream before the first block, wanted"):
            check_place(recorded, layer)


def test_a_hook_of_no_known_block_is_refused():
    with pytest.raises(ValueError, match="it was trained on hook_resid_post, wanted the residual"):
        check_place(Recorded(None, "hook_resid_post"), 7)


@pytest.mark.parametrize("hook", ["blocks.6.hook_resid_post", "layers.6", "resid_post_layer_6"])
def test_a_layer_and_a_hook_that_disagree_are_refused(hook):
    for layer in (6, 7):
        with pytest.raises(
            ValueError, match=rf"records layer 7 and hook point {hook}, which is of"
        ):
            check_place(Recorded(7, hook), layer)


def test_a_transcoder_is_refused_wherever_it_was_trained():
    with pytest.raises(ValueError, match=r"it predicts blocks.7.hook_mlp_out, wanted an autoenc"):
        check_place(Recorded(7, "blocks.7", predicts="blocks.7.hook_mlp_out"), 7)


def test_layers_from_the_end_cannot_be_compared_and_nothing_recorded_is_no_contradiction():
    assert not check_place(Recorded(7, "blocks.7.hook_resid_post"), -2)
    assert not check_place(Recorded(7), -2)
    for layer in (-2, 7):
        assert check_place(Recorded(), layer)
