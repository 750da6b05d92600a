"""DrivingVLA with stand-ins for encoder and queries: what reaches the text, what is remembered."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from odvla.errors import UserError
from odvla.fake_batch import fake_batch, fake_tokenizer
from odvla.language.causal_lm import LanguageConfig
from odvla.language.draft import Drafting
from odvla.language.grammar import plan_grammar
from odvla.language.waypoints import Waypoints, parse_waypoints
from odvla.types import (
    IGNORE_INDEX,
    AgentPredictions,
    BevGrid,
    Conversation,
    SceneFeatures,
    TokenSet,
    Turn,
)
from odvla.vla import VLAConfig

DIM, TRACKS = 8, 3
GRID = BevGrid(-8.0, -8.0, 4.0, 4, 4)


@dataclass(frozen=True)
class MeanEncoderConfig:
    """Settings of MeanEncoder."""

    has_bev: bool = True

    def build(self):
        return MeanEncoder(self)


class MeanEncoder(nn.Module):
    """The mean colour of each camera, and the number of frames seen as its state."""

    dim = DIM

    def __init__(self, config):
        super().__init__()
        self.grid = GRID if config.has_bev else None
        self.linear = nn.Linear(3, DIM)

    def forward(self, frames, state):
        seen = torch.zeros(len(frames.images)) if state is None else state
        seen = torch.where(frames.scene_start, 0.0, seen) + 1
        colour = self.linear(frames.images.float().mean((-2, -1)) / 255)
        return SceneFeatures(levels=(colour[..., None, None],)), seen


@dataclass(frozen=True)
class CameraQueriesConfig:
    """Settings of CameraQueries."""

    stream: str = "scene"
    needs: str = "levels"

    def build(self, dim, grid):
        return CameraQueries(self, dim)


class CameraQueries(nn.Module):
    """Camera features as tokens; as tracks they stand at (10 k, row) for token k."""

    calls: ClassVar[list[str]] = []

    def __init__(self, config, dim):
        super().__init__()
        self.stream, self.needs, self.dim = config.stream, config.needs, dim
        self.linear = nn.Linear(dim, dim)

    def forward(self, features, frames, state):
        CameraQueries.calls.append(self.stream)
        feats = self.linear(features.levels[0][..., 0, 0])[:, :TRACKS]
        rows = len(feats)
        mask = torch.ones(rows, TRACKS, dtype=torch.bool)
        if self.stream != "track":
            return TokenSet(self.stream, feats, mask), None
        mask[0, 2] = False  # the first row has two tracks only
        boxes = torch.zeros(rows, 5, 9)
        order = torch.tensor([4, 2, 0])  # query_index: tokens are not in the order of queries
        boxes[:, order, 0] = torch.arange(TRACKS) * 10.0
        boxes[..., 1] = torch.arange(rows)[:, None].float()
        boxes.requires_grad_()
        predictions = AgentPredictions(
            layer_logits=(torch.zeros(rows, 5, 10),),
            layer_boxes=(boxes,),
            track_ids=torch.zeros(rows, 5, dtype=torch.int64),
            carried_from=torch.full((rows, 5), -1),
        )
        index = order.expand(rows, TRACKS).contiguous()
        return TokenSet("track", feats, mask, predictions, index), (state or 0) + 1


TOKENIZER = fake_tokenizer()
LANGUAGE = LanguageConfig(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64)
STREAMS = ("scene", "track", "map")


def build(streams=STREAMS, seed=0, **encoder):
    torch.manual_seed(seed)
    queries = tuple(CameraQueriesConfig(stream) for stream in streams)
    return VLAConfig(MeanEncoderConfig(**encoder), queries, language=LANGUAGE).build(TOKENIZER)


def batch_of(kinds=("plan", "qa"), rows=2, steps=1, boxes=None):
    batch = fake_batch(TOKENIZER, rows=rows, steps=steps, image_size=(16, 9), kinds=kinds)
    if boxes is not None:
        batch = replace(batch, talk=replace(batch.talk, object_boxes=torch.tensor(boxes)))
    return batch


def test_the_loss_reaches_every_part_and_falls():
    model, batch = build(), batch_of(("plan", "qa", "caption_map"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        output = model(batch)
        optimiser.zero_grad()
        output.loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None]
        assert without == []
        optimiser.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_of_a_batch_is_that_of_its_conversations_one_by_one():
    model, batch = build(), batch_of(("plan", "qa"), rows=2)
    whole = model(batch)
    sums, count = 0.0, 0
    for g, conversation in enumerate(batch.talk.conversations):
        talk = TOKENIZER.tokenise([conversation], [int(batch.talk.frame_index[g])])
        single = model(replace(batch, talk=talk))
        sums += single.loss * len(single.labels)
        count += len(single.labels)
    assert count == len(whole.labels)
    torch.testing.assert_close(whole.loss, sums / count)


def far_and_near(rows):
    """Objects of `rows` conversations: a track token's centre, or nowhere near one."""
    boxes = torch.full((len(rows), 9), float("nan"))
    boxes[:, :2] = torch.tensor(rows)
    return boxes.tolist()


def test_objects_without_a_track_are_left_out_and_counted():
    # Row 0 has tracks at (0, 0), (10, 0) and an invalid one; row 1 at (0, 1), (10, 1), (20, 1).
    model = build()
    boxes = far_and_near([[10.5, 1.0], [20.0, 0.0], [20.0, 0.0], [3.0, 1.0]])
    batch = batch_of(("agent", "caption_object"), boxes=boxes)
    output = model(batch)
    assert (output.matched, output.unmatched) == (2, 2)
    keep = [0, 2]
    talk = TOKENIZER.tokenise([batch.talk.conversations[g] for g in keep], [0, 1])
    talk = replace(talk, object_boxes=batch.talk.object_boxes[keep])
    torch.testing.assert_close(model(replace(batch, talk=talk)).loss, output.loss)
    generation = model.generate(batch, max_new_tokens=4)
    assert generation.unmatched == (False, True, False, True)
    assert generation.texts[1] == generation.texts[3] == ()
    assert all(generation.new_tokens[g] > 0 for g in keep)


def test_the_object_is_the_token_of_its_own_track():
    model = build()
    batch = batch_of(("caption_object",), rows=1, boxes=far_and_near([[10.0, 0.0]]))
    seen = []
    model.language.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output = model(batch)
    expected = model.projectors["track"](output.perception.tokens["track"].feats)[0, 1]
    distances = (seen[0].embeds[0] - expected).abs().amax(-1)
    ids = batch.talk.input_ids[0].tolist()
    assert distances.argmin() == ids.index(-204)
    assert distances.min() == 0


def test_a_batch_where_no_object_is_found_gives_zero_loss_and_zero_gradients():
    model = build()
    output = model(batch_of(("agent",), boxes=far_and_near([[99.0, 0.0], [99.0, 0.0]])))
    assert (output.loss.item(), output.matched, output.unmatched) == (0.0, 0, 2)
    output.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_blind_sees_black_images():
    model, batch = build(), batch_of()
    black = replace(
        batch, clip=(replace(batch.clip[0], images=torch.zeros_like(batch.clip[0].images)),)
    )
    assert model(batch, blind=True).loss == model(black).loss != model(batch).loss


def test_the_past_goes_in_and_out_and_only_tracks_are_carried_through_a_clip():
    model, batch = build(), batch_of(steps=3)
    CameraQueries.calls.clear()
    perception, state = model.perceive(batch.clip)
    assert CameraQueries.calls == ["track", "track", "scene", "track", "map"]
    assert len(perception.agent_steps) == 3
    assert state.encoder.tolist() == [3, 3]
    assert state.queries["track"] == 3
    later = replace(batch.clip[0], scene_start=torch.tensor([True, False]))
    _, state = model.perceive((later,), state.detach())
    assert state.encoder.tolist() == [1, 4]


def test_a_text_alone_needs_no_images_but_slots_do():
    model = build()
    talk = TOKENIZER.tokenise(
        [Conversation("t", "", "text", (Turn("user", "Hi"), Turn("assistant", "a car")), "")], [0]
    )
    text_only = replace(batch_of(), clip=(), talk=talk)
    assert model(text_only).perception is None
    assert len(model.generate(text_only, max_new_tokens=3).texts) == 1
    with pytest.raises(UserError, match="fake-0-plan has slots"):
        model(replace(batch_of(), clip=()))


def test_a_model_without_a_stream_leaves_its_slot_empty():
    model, batch = build(("scene",), has_bev=False), batch_of(("plan", "caption_object"))
    output = model(batch)
    assert output.loss.isfinite()
    assert output.unmatched == 2


def test_what_cannot_be_built_is_refused_by_name():
    bev = (CameraQueriesConfig("map", needs="bev"),)
    with pytest.raises(UserError, match=r"CameraQueriesConfig .* MeanEncoderConfig"):
        VLAConfig(MeanEncoderConfig(has_bev=False), bev, language=LANGUAGE).build(TOKENIZER)
    with pytest.raises(UserError, match="'scene'"):
        build(("scene", "scene"))


def test_the_ego_token_tells_motion_and_never_the_command():
    config = replace(build().config, ego_token=True)
    model = config.build(TOKENIZER)
    batch = batch_of(("plan",))
    seen = []
    model.language.register_forward_pre_hook(lambda _, args: seen.append(args[0].embeds))
    faster = replace(batch.ego, velocity=batch.ego.velocity + 1)
    turning = replace(batch.ego, command=(batch.ego.command + 1) % 3)
    for ego in (batch.ego, faster, turning):
        model(replace(batch, ego=ego))
    plain, fast, turned = seen
    changed = (plain != fast).any(-1)
    # The text is the same: one place of each conversation has changed, where <EGO> stands.
    assert changed.sum(1).tolist() == [1, 1]
    assert plain.equal(turned)
    # Without the token, that place is not there.
    build()(batch)
    model_without = build()
    model_without.language.register_forward_pre_hook(lambda _, args: seen.append(args[0].embeds))
    model_without(batch)
    assert seen[-1].shape[1] == plain.shape[1] - 1
    assert "ego" not in model_without.projectors


def test_the_ego_token_can_forget_the_past():
    model = replace(build().config, ego_token=True, ego_token_history=False).build(TOKENIZER)
    batch = batch_of(("plan",))
    seen = []
    model.language.register_forward_pre_hook(lambda _, args: seen.append(args[0].embeds))
    ego = batch.ego
    for other in (
        ego,
        replace(ego, history=ego.history + 1),
        replace(ego, steering=ego.steering + 1),
    ):
        model(replace(batch, ego=other))
    plain, past, steered = seen
    assert plain.equal(past)
    assert not plain.equal(steered)


@pytest.mark.parametrize("hidden", [("scene",), ("track",), ("scene", "track", "map")])
def test_hidden_streams_are_as_if_nothing_had_been_found(hidden):
    whole = build()
    config = replace(whole.config, hidden_streams=hidden)
    model = config.build(TOKENIZER)
    model.load_state_dict(whole.state_dict())
    batch = batch_of(("plan",))
    perception, _ = whole.perceive(batch.clip)
    empty = {
        stream: replace(tokens, mask=tokens.mask & (stream not in hidden))
        for stream, tokens in perception.tokens.items()
    }
    expected = whole(batch, seen=replace(perception, tokens=empty))
    found = model(batch, seen=perception)
    assert found.logits.equal(expected.logits)
    assert not found.logits.equal(whole(batch, seen=perception).logits)


def test_a_hidden_stream_must_be_one():
    with pytest.raises(UserError, match="hidden_streams must be some of scene, track, map"):
        replace(build().config, hidden_streams=("agent",))


def test_too_long_a_conversation_is_named():
    short = replace(LANGUAGE, max_positions=64)
    config = VLAConfig(MeanEncoderConfig(), (CameraQueriesConfig(),), language=short)
    with pytest.raises(UserError, match=r"fake-\d-plan takes \d+ tokens, more than .* 64"):
        config.build(TOKENIZER)(batch_of())


def test_what_is_too_long_may_be_cut_and_a_limit_may_be_set():
    config = VLAConfig(MeanEncoderConfig(), (CameraQueriesConfig(),), language=LANGUAGE)
    whole, cut, refused = (
        replace(config, max_length=length, cut_to_length=cut).build(TOKENIZER)
        for length, cut in ((0, False), (40, True), (40, False))
    )
    cut.load_state_dict(whole.state_dict())
    batch = batch_of()
    assert cut(batch).labels.numel() < whole(batch).labels.numel()
    assert len(cut.generate(batch, max_new_tokens=4).texts) == len(batch.talk.conversations)
    with pytest.raises(UserError, match=r"takes \d+ tokens, more than model\.max_length 40"):
        refused(batch)


def test_scenes_without_any_agent_have_answers_and_losses():
    model, batch = build(), batch_of(("plan", "qa"), rows=2)
    forward = model.queries["track"].forward

    def nobody(features, frames, state):
        tokens, state = forward(features, frames, state)
        empty = replace(
            tokens,
            feats=tokens.feats[:, :0],
            mask=tokens.mask[:, :0],
            query_index=tokens.query_index[:, :0],
        )
        return empty, state

    model.queries["track"].forward = nobody
    output = model(batch)
    assert output.loss.isfinite()
    output.loss.backward()
    together = model.generate(batch, max_new_tokens=8).texts
    for g, conversation in enumerate(batch.talk.conversations):
        talk = TOKENIZER.tokenise([conversation], [int(batch.talk.frame_index[g])])
        assert (
            model.generate(replace(batch, talk=talk), max_new_tokens=8).texts == together[g : g + 1]
        )


def test_an_answer_of_no_length_teaches_its_end():
    model, batch = build(), batch_of(("qa",), rows=1)
    conversation = batch.talk.conversations[0]
    silent = replace(conversation, turns=(*conversation.turns[:-1], Turn("assistant", "")))
    output = model(replace(batch, talk=TOKENIZER.tokenise([silent], [0])))
    assert output.labels.tolist() == [TOKENIZER.end_id]
    assert output.loss.isfinite()


def test_answers_do_not_depend_on_the_batch_or_on_the_true_answer():
    model, batch = build(), batch_of(("plan", "qa"), rows=3)
    together = model.generate(batch, max_new_tokens=12).texts
    for g, conversation in enumerate(batch.talk.conversations):
        asked = replace(conversation, turns=conversation.turns[:-1])
        talk = TOKENIZER.tokenise([asked], [int(batch.talk.frame_index[g])])
        alone = model.generate(replace(batch, talk=talk), max_new_tokens=12).texts
        assert alone == (together[g],)


def test_several_answers_are_drawn_for_each_conversation():
    model, batch = build(), batch_of(("plan", "qa"))
    drawn = model.generate(batch, max_new_tokens=6, samples=3)
    assert [len(texts) for texts in drawn.texts] == [3] * 4
    assert len(set(drawn.texts[0])) > 1
    assert drawn.texts == model.generate(batch, max_new_tokens=6, samples=3).texts
    alone = TOKENIZER.tokenise([batch.talk.conversations[3]], [1])
    one = model.generate(replace(batch, talk=alone), max_new_tokens=6, samples=3)
    assert one.texts[0] == drawn.texts[3]


def test_every_plan_under_the_grammar_parses_even_untrained():
    model, batch = build(), batch_of(("plan",), rows=4)
    texts = model.generate(batch, grammar=plan_grammar(TOKENIZER), max_new_tokens=110).texts
    assert all(isinstance(parse_waypoints(text), Waypoints) for (text,) in texts)


def test_guessed_plans_are_the_same_in_fewer_runs_and_tell_their_cost():
    model, batch = build(), batch_of(("plan",), rows=3)
    model.language.double()
    settings = {"grammar": plan_grammar(TOKENIZER, decimals=1), "max_new_tokens": 110}
    for samples in (1, 2):
        alone = model.generate(batch, samples=samples, **settings)
        guessed = model.generate(batch, samples=samples, drafting=Drafting(), **settings)
        assert guessed.texts == alone.texts
        assert guessed.new_tokens == alone.new_tokens
        assert 0 < guessed.runs < alone.runs < max(alone.new_tokens)
        assert min(guessed.encode_s, guessed.prefill_s, guessed.decode_s) > 0
    cold = model.generate(batch, samples=2, temperature=1e-6, **settings)
    best = model.generate(batch, **settings)
    assert cold.texts == tuple(texts * 2 for texts in best.texts)
    with pytest.raises(ValueError, match="ego state, and a grammar"):
        model.generate(batch, drafting=Drafting())


def test_bf16_and_gradient_checkpointing_change_speed_not_the_task():
    batch = batch_of()
    plain = build().train()(batch)
    config = VLAConfig(
        MeanEncoderConfig(),
        tuple(CameraQueriesConfig(stream) for stream in STREAMS),
        language=replace(LANGUAGE, gradient_checkpointing=True),
    )
    torch.manual_seed(0)
    checkpointed = config.build(TOKENIZER).train()
    loss = checkpointed(batch).loss
    loss.backward()
    torch.testing.assert_close(loss, plain.loss)
    with torch.autocast("cpu", torch.bfloat16):
        half = build()(batch)
    assert half.loss.dtype == torch.float32
    assert abs(half.loss - plain.loss) < 0.05
    assert (half.labels != IGNORE_INDEX).all()
