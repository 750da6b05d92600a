"""Checkpoints with the real lists of keys, at a reduced width."""

import json

import pytest
import torch

VISION = "model.vision_tower.vision_tower.vision_model."
# Sides of the real tensors -> sides of the reduced ones, where a side means one thing only.
SIDES = {256: 16, 512: 32, 768: 48, 1024: 64, 128: 8, 40000: 400, 200: 20, 901: 31, 300: 12}
QWEN_SIDES = {896: 32, 128: 16, 4864: 48, 151936: 600, 256: 16}


def reduced_shape(name: str, shape: list[int]) -> tuple[int, ...]:
    """The shape of one of the real keys in a model of an eighth to a sixteenth of the width."""
    bare = name.rpartition("vision_model.")[2]
    if bare == name and name.startswith(("model.", "lm_head.")):
        return tuple(QWEN_SIDES[n] for n in shape)
    if bare.startswith("img_backbone."):
        return tuple(n // 8 if n >= 64 else n for n in shape)
    if "lateral_convs" in bare and len(shape) == 4:
        return (16, shape[1] // 8, 1, 1)
    sides = dict(SIDES)
    if ".ffns." in bare:
        sides[512] = 24  # the width of the feed-forward network, not twice the model's
    reduced = [sides.get(n, n) for n in shape]
    if "sampling_offsets" in bare or "attention_weights" in bare:
        reduced[0] = shape[0]  # heads, levels and points stay
    return tuple(reduced)


def random_tensors(keys: dict, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """Random values for every key."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, entry in keys.items():
        shape = reduced_shape(name, entry["shape"])
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.randint(1, 1 << 40, shape, generator=generator)
        else:
            tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def read_keys(shared, name: str) -> dict:
    return json.loads((shared / "golden" / f"state_dict_keys_{name}.json").read_text())


@pytest.fixture(scope="session")
def uniad_keys(shared):
    return read_keys(shared, "uniad_track_map")


@pytest.fixture(scope="session")
def opendrivevla_keys(shared):
    """All keys, by kind of projector."""
    content = read_keys(shared, "opendrivevla_0.5b")
    return {
        kind: {**content["state_dict"], **own}
        for kind, own in content["mm_projector_variants"].items()
    }


@pytest.fixture(scope="session")
def uniad(uniad_keys):
    return random_tensors(uniad_keys)


@pytest.fixture(scope="session")
def opendrivevla(opendrivevla_keys):
    """With the output layer left out, as it is tied to the embedding."""
    tensors = random_tensors(opendrivevla_keys["mlp2x_gelu"], dtype=torch.bfloat16)
    del tensors["lm_head.weight"]
    return tensors


@pytest.fixture(scope="session")
def random_weights():
    """Makes random values for some keys: see random_tensors."""
    return random_tensors
