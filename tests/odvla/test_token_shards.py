"""Shards give back what was put into them, from another process's view as well."""

from dataclasses import replace

import pytest
import torch

from odvla.errors import UserError
from odvla.token_shards import FeatureKey, TokenShards
from odvla.types import AgentPredictions, TokenSet

KEY = FeatureKey("weights", "model", "images", "data", "scene", 8, "32-true")


def a_row(seed, dtype=torch.float32):
    """Scene tokens and two tracks of four slots."""
    generator = torch.Generator().manual_seed(seed)
    agents = AgentPredictions(
        layer_logits=(torch.randn(1, 4, 10, generator=generator),),
        layer_boxes=(torch.randn(1, 4, 9, generator=generator),),
        track_ids=torch.tensor([[5, -1, seed, 7]]),
        carried_from=torch.tensor([[0, -1, 1, 2]]),
        mask=None if seed % 2 else torch.tensor([[True, False, True, True]]),
    )
    feats = torch.randn(1, 2, 6, generator=generator).to(dtype)
    mask = torch.tensor([[True, False]])
    return {
        "scene": TokenSet("scene", torch.randn(1, 3, 6, generator=generator), torch.ones(1, 3) > 0),
        "track": TokenSet("track", feats, mask, agents, torch.tensor([[2, 0]])),
    }


def test_tokens_come_back_bit_by_bit(tmp_path):
    shards = TokenShards(tmp_path, frames_a_shard=2)
    rows = {f"token/{n}" if n == 3 else f"t{n}": a_row(n, torch.bfloat16) for n in range(5)}
    for token, row in rows.items():
        shards[token] = row
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert len(TokenShards(tmp_path)) == 4  # the fifth is not written yet
    shards.flush()
    again = TokenShards(tmp_path)
    assert len(again) == len(shards) == 5
    assert again.size_bytes() == sum(p.stat().st_size for p in tmp_path.iterdir())
    for token, row in rows.items():
        found = again[token]
        assert found.keys() == row.keys()
        assert found["scene"].predictions is None
        assert found["scene"].query_index is None
        assert found["track"].feats.dtype == torch.bfloat16
        for stream, wanted in row.items():
            assert torch.equal(found[stream].feats, wanted.feats)
            assert torch.equal(found[stream].mask, wanted.mask)
        old, new = row["track"].predictions, found["track"].predictions
        assert torch.equal(new.scores, old.scores)
        assert torch.equal(new.boxes, old.boxes)
        assert torch.equal(new.track_ids, old.track_ids)
        assert torch.equal(new.carried_from, old.carried_from)
        assert (new.mask is None) == (old.mask is None)
        assert torch.equal(found["track"].query_index, row["track"].query_index)
    assert "somewhere else" not in again


def test_a_key_frame_is_kept_once_and_others_shards_are_taken_in(tmp_path):
    one, other = TokenShards(tmp_path), TokenShards(tmp_path)
    one["a"] = a_row(0)
    one.flush()
    assert "a" not in other
    other.refresh()
    other["a"] = a_row(1)
    other.flush()
    assert torch.equal(other["a"]["scene"].feats, a_row(0)["scene"].feats)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_shard_and_a_foreign_folder_are_named(tmp_path):
    KEY.claim(tmp_path)
    KEY.claim(tmp_path)
    with pytest.raises(UserError, match="was made with other settings"):
        replace(KEY, images="others").claim(tmp_path)
    assert replace(KEY, rows=4).folder_name != KEY.folder_name
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match=r"torn\.safetensors cannot be read"):
        TokenShards(tmp_path)
