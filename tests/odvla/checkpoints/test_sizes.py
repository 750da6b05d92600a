"""Sizes read from the released lists of keys, and every name and shape that follows."""

import pytest
import torch
from safetensors.torch import load_file

from odvla.checkpoints.sizes import Shapes, language_config, qwen_name, sizes_of
from odvla.encoders.bevformer import BEVFormerConfig
from odvla.language.causal_lm import LanguageConfig
from odvla.queries.panoptic_map import PanopticMapConfig
from odvla.queries.scene import SceneSamplerConfig
from odvla.queries.trackformer import TrackFormerConfig
from odvla.vla import VLAConfig
from odvla.weight_names import OPENDRIVEVLA, UNIAD, to_odvla


class Vocabulary:
    """Stands for a tokenizer as large as the released embedding."""

    added_ids = action_ids = ()

    def __len__(self):
        return 151_936


def under_our_names(keys, layout):
    renamed = layout.to_ours(keys)
    assert renamed.unknown == ()
    assert set(renamed.unused) == set(layout.unused)
    assert len(renamed.names) + len(renamed.unused) == len(keys)
    return {new: tuple(keys[old]["shape"]) for old, new in renamed.names.items()}


def sizes(own):
    return sizes_of(Shapes(own, "the list", lambda name: name))


def test_the_full_size_tower_is_the_default_one(uniad_keys):
    own = under_our_names(uniad_keys, UNIAD)
    found = sizes(own)
    assert found.encoder == BEVFormerConfig()
    assert found.track == TrackFormerConfig()
    assert found.map == PanopticMapConfig(compat="uniad")
    assert found.shapes == own


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "qwen2_5_rms"])
def test_opendrivevla_is_read_from_its_shapes(opendrivevla_keys, kind):
    own = under_our_names(opendrivevla_keys[kind], OPENDRIVEVLA)
    found = sizes(own)
    assert found.shapes == own
    assert {stream: config.kind for stream, config in found.projectors.items()} == {
        "scene": kind,
        "track": kind,
        "map": kind,
    }
    assert found.vocab_rows == 151_936
    assert qwen_name(found.language) == "Qwen2.5-0.5B"
    assert (found.language.heads, found.language.kv_heads) == (14, 2)
    assert not found.language.tie_embeddings  # the list holds an output layer


def test_the_whole_model_at_full_size_has_exactly_the_released_names_and_shapes(opendrivevla_keys):
    """DrivingVLA itself, on the meta device, against the list."""
    keys = dict(opendrivevla_keys["mlp2x_gelu"])
    del keys["lm_head.weight"]  # tied: stored once
    own = under_our_names(keys, OPENDRIVEVLA)
    language = LanguageConfig(
        hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, max_positions=32768
    )
    queries = (SceneSamplerConfig(), TrackFormerConfig(), PanopticMapConfig(compat="uniad"))
    config = VLAConfig(BEVFormerConfig(), queries, language=language)
    with torch.device("meta"):
        model = config.build(Vocabulary())
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del built["language.model.lm_head.weight"]
    assert built == own


def test_a_real_reduced_uniad_is_read_whole(shared):
    """The recorded model of other sizes: narrow, 3 cameras, 2 and 3 layers, ResNet-50."""
    folder = shared / "golden"
    weights = {
        **load_file(folder / "uniad_small_weights_img.safetensors"),
        **load_file(folder / "uniad_small_weights_rest.safetensors"),
    }
    weights = {name.removeprefix("weight/"): tensor for name, tensor in weights.items()}
    own = {name: tuple(tensor.shape) for name, tensor in to_odvla(weights).items()}
    found = sizes(own)
    assert found.shapes == own
    assert found.encoder.backbone.depth == 50
    assert (found.encoder.dim, found.encoder.rows, found.encoder.cameras) == (32, 20, 3)
    assert (found.encoder.layers, found.track.layers, found.track.queries) == (2, 3, 900)
    assert (found.map.encoder_layers, found.map.decoder_layers, found.map.queries) == (2, 3, 40)
    assert found.map.compat == "uniad"


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        (LanguageConfig(2048, 36, 16, 2, 11008), "Qwen2.5-3B"),
        (LanguageConfig(3584, 28, 28, 4, 18944, tie_embeddings=False), "Qwen2.5-7B"),
        (LanguageConfig(64, 2, 1, 1, 96), None),
    ],
)
def test_a_language_model_says_its_size(sizes, name):
    with torch.device("meta"):
        model = sizes.build(1000)
    own = {f"language.{n}": tuple(t.shape) for n, t in model.state_dict().items()}
    if sizes.tie_embeddings:
        del own["language.model.lm_head.weight"]
    found = language_config(Shapes(own, "the list", lambda n: n))
    assert qwen_name(found) == name
    assert (found.heads, found.kv_heads) == (sizes.heads, sizes.kv_heads) or name is None
    assert found.tie_embeddings == sizes.tie_embeddings
