"""Plans of other forms than text of one kind: action tokens, regression, plans thought over."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from callbacks.freeze import FreezeByName
from callbacks.predictions import WritePredictions
from odvla.errors import UserError
from odvla.fake_batch import fake_batch, fake_tokenizer
from odvla.freezing import FreezePlan
from odvla.language.action_bins import ActionBins
from odvla.language.decisions import all_decisions
from odvla.language.prompts import Dialect, PlanDialect
from odvla.planner import PlannerConfig
from odvla.types import Turn
from stages.plan_ablations import KIND_OF, tell_less
from stages.planning import PlanningStageConfig

BINS = ActionBins.of(np.random.default_rng(0).uniform(-9, 40, (500, 6, 2)), 16)
TOKENS = PlanningStageConfig(actions="tokens", max_new_tokens=20)
REASONING = Dialect("reasoning")


@pytest.fixture(scope="module")
def action_tokenizer():
    return fake_tokenizer(vocab_size=320, action_tokens=16)


@pytest.fixture
def make_vla(make_vla, action_tokenizer):
    """A model with action tokens and a planner."""

    def make(tokenizer=action_tokenizer, planner=None):
        config = make_vla().config
        torch.manual_seed(0)
        return replace(config, planner=planner).build(tokenizer)

    return make


@pytest.fixture
def action_data(make_data, action_tokenizer):
    """Noise with plans of tokens, and the bins that its training plans give."""
    data = make_data("plan")
    data.tokenizer = action_tokenizer
    data.fitted, data.dialect = BINS, PlanDialect("compact", values="tokens")
    batch_of = data.batch

    def worded(requests):
        batch = batch_of(requests)
        if batch.talk is None:
            return batch
        told = []
        for c, row in zip(batch.talk.conversations, batch.talk.frame_index, strict=True):
            answer = data.dialect.plan_answer(batch.plan.waypoints[row], (0, 0))
            turns = (*c.turns[:-1], Turn("assistant", answer))
            told.append(replace(c, turns=turns, meta=data.dialect.plan_form.as_meta()))
        talk = action_tokenizer.tokenise(told, batch.talk.frame_index.tolist())
        return replace(batch, talk=talk)

    data.batch = worded
    data.action_bins = lambda count: data.fitted
    data.driven = lambda split: (np.zeros((3, 6, 2)), np.ones((3, 6), bool))
    data.use_bins = lambda bins: setattr(data, "dialect", replace(data.dialect, bins=bins))
    return data


def predictions(stage, data, make_trainer, tmp_path):
    path = tmp_path / "predictions.jsonl"
    trainer = make_trainer(WritePredictions(path))
    trainer.test(stage, data, verbose=False)
    return [json.loads(line) for line in path.read_text().splitlines()], trainer.callback_metrics


def test_plans_of_tokens_are_learned_in_the_bins_of_the_data_and_written_in_those_of_the_weights(
    make_vla, action_data, make_trainer, tmp_path
):
    vla = make_vla()
    config = replace(TOKENS, freeze=FreezePlan(("language.*",)))
    make_trainer(FreezeByName(vla, config.freeze), max_steps=2).fit(
        config.build(vla, 2), action_data
    )
    assert vla.actions.bins == action_data.dialect.bins == BINS
    # At the test the data's own bins are not asked for.
    action_data.fitted, action_data.dialect = None, PlanDialect("compact", values="tokens")
    records, logged = predictions(config.build(vla), action_data, make_trainer, tmp_path)
    assert len(records) == 14
    for record in records:
        assert record["failure"] is None
        np.testing.assert_allclose(record["waypoints"], BINS.read(record["text"]), atol=1e-4)
    lost = BINS.error(np.zeros((3, 6, 2)))
    assert logged["test/quantisation_m"] == pytest.approx(lost.mean_m)
    assert logged["test/clipped_percent"] == pytest.approx(lost.clipped_percent)


def test_the_median_of_drawn_plans_of_tokens_is_a_plan_of_tokens(
    make_vla, action_data, make_trainer, tmp_path
):
    vla = make_vla()
    vla.actions.keep(BINS)
    config = replace(TOKENS, samples=5, ablations=())
    records, _ = predictions(config.build(vla), action_data, make_trainer, tmp_path)
    assert all(r["text"].count("<action_") == 12 and r["failure"] is None for r in records)


def test_bins_that_are_not_there_or_of_other_data_are_named(
    make_vla, action_data, make_trainer, tokenizer, tmp_path
):
    with pytest.raises(UserError, match="tokenizer has no action tokens"):
        TOKENS.build(make_vla(tokenizer))
    with pytest.raises(UserError, match="never learned plans of action tokens"):
        predictions(TOKENS.build(make_vla()), action_data, make_trainer, tmp_path)
    with pytest.raises(UserError, match=r"actions must be one of points, offsets, .*not 'poses'"):
        PlanningStageConfig(actions="poses")
    with pytest.raises(UserError, match="action_bins must be fit, replace or keep, not 'x'"):
        PlanningStageConfig(action_bins="x")
    vla = make_vla()
    other = ActionBins.of(np.random.default_rng(0).uniform(0, 9, (500, 6, 2)), 16)
    for how, expected in (("fit", None), ("keep", other), ("replace", BINS)):
        vla.actions.keep(other)
        config = replace(TOKENS, action_bins=how)
        trainer = make_trainer(FreezeByName(vla, config.freeze), max_steps=1)
        if expected is None:
            with pytest.raises(UserError, match=r"bins of other data \(y at 3 s from 0\.0"):
                trainer.fit(config.build(vla), action_data)
        else:
            trainer.fit(config.build(vla), action_data)
            assert vla.actions.bins == action_data.dialect.bins == expected


@pytest.mark.parametrize("actions", ["points", "offsets", "changes"])
def test_plans_in_text_are_read_in_their_form_and_range(
    actions, make_vla, make_data, make_trainer, tmp_path
):
    config = PlanningStageConfig(
        actions=actions, max_new_tokens=120, ablations=(), x_range_m=(-2.0, 2.0)
    )
    data, dialect = make_data("plan"), PlanDialect("compact", values=actions)
    batch_of = data.batch

    def worded(requests):
        batch = batch_of(requests)
        if batch.talk is None:
            return batch
        meta = dialect.plan_form.as_meta()
        told = [replace(c, meta=meta) for c in batch.talk.conversations]
        talk = replace(batch.talk, conversations=tuple(told))
        return replace(batch, talk=talk)

    data.batch = worded
    records, _ = predictions(config.build(make_vla()), data, make_trainer, tmp_path)
    for record in records:
        assert (record["failure"], record["meta"]["form"]) == (None, actions)
        numbers = np.array(eval(record["text"][len("<traj_start>") : -len("<traj_end>")]))
        assert (np.abs(numbers[:, 0]) <= 2.0).all()
        steps = np.diff(record["waypoints"], axis=0)
        if actions == "points":
            np.testing.assert_allclose(record["waypoints"], numbers, atol=1e-9)
        elif actions == "offsets":
            np.testing.assert_allclose(steps, numbers[1:], atol=1e-4)
        else:
            np.testing.assert_allclose(
                np.diff(steps, axis=0), np.diff(numbers[1:], axis=0), atol=1e-3
            )


def test_a_regressed_plan_trains_the_planner_alone_and_is_written_as_others_are(
    make_vla, make_data, make_trainer, tmp_path
):
    vla = make_vla(planner=PlannerConfig(dim=8, layers=1, heads=2, intermediate=8))
    told = tuple(name for name in KIND_OF if name != "other_vision")
    config = PlanningStageConfig(
        actions="regression", freeze=FreezePlan(("planner.*",)), ablations=told
    )
    before = {key: value.clone() for key, value in vla.state_dict().items()}
    make_trainer(FreezeByName(vla, config.freeze), max_steps=2).fit(
        config.build(vla, 2), make_data("plan")
    )
    changed = {k.split(".")[0] for k, v in vla.state_dict().items() if not v.equal(before[k])}
    assert changed == {"planner"}
    records, _ = predictions(config.build(vla), make_data("plan"), make_trainer, tmp_path)
    assert len(records) == 7 * (1 + len(told))
    by_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("plan", "plan_no_ego")}
    assert len(by_kind["plan"]) == 7
    assert by_kind["plan"][0]["waypoints"] != by_kind["plan_no_ego"][0]["waypoints"]
    text_stage = PlanningStageConfig(max_new_tokens=120, ablations=())
    other, _ = predictions(text_stage.build(vla), make_data("plan"), make_trainer, tmp_path)
    assert set(other[0]) == set(records[0])
    assert other[0]["reference"] == by_kind["plan"][0]["reference"]


def thought_over(tokenizer, answers):
    """A batch of plans that are thought over, with these answers in the data."""
    batch = fake_batch(tokenizer, rows=2, image_size=(48, 32), dialect=REASONING)
    told = []
    for row, conversation in enumerate(batch.talk.conversations):
        ego = type(batch.ego)(**{k: v[row : row + 1] for k, v in vars(batch.ego).items()})
        turns = REASONING.thinking_turns((*answers, conversation.reference), ego)
        told.append(replace(conversation, turns=turns, meta=conversation.meta | MEANT))
    return replace(batch, talk=tokenizer.tokenise(told, [0, 1]))


MEANT = {"thoughts": "odvla", "decision": "stop, go straight."}


def test_a_plan_that_is_thought_over_hears_nothing_of_the_true_answers(make_vla, action_tokenizer):
    config = PlanningStageConfig(max_new_tokens=120, max_thought_tokens=8)
    stage = config.build(make_vla().eval())
    found = []
    for answers in (("A road.", "stop, go straight."), ("Rain.", "speed up, turn left.")):
        stage.streams = {}
        stage.others, stage.decisions = None, []
        found.append(stage.predict_rows(thought_over(action_tokenizer, answers)))
    told = [
        [{k: r[k] for k in ("text", "description", "decision")} for r in rows] for rows in found
    ]
    assert told[0] == told[1]
    for record in found[0]:
        assert record["failure"] is None
        assert record["decision"] in all_decisions()
    # Both plans of the seeing model; those of the blind one do not count.
    expected = [r["decision"] == MEANT["decision"] for r in found[1] if r["kind"] == "plan"]
    assert stage.decisions == expected


def test_decisions_are_those_that_the_conversation_is_of(make_vla, action_tokenizer):
    """The same model, asked for GPT-Driver's meta-actions, names one of them."""
    config = PlanningStageConfig(max_new_tokens=120, max_thought_tokens=8, ablations=())
    stage = config.build(make_vla().eval())
    batch = thought_over(action_tokenizer, (None, "stop."))
    asked = [
        replace(c, meta=c.meta | {"thoughts": "gpt_driver", "decision": "stop."})
        for c in batch.talk.conversations
    ]
    batch = replace(batch, talk=action_tokenizer.tokenise(asked, [0, 1]))
    records = stage.predict_rows(batch)
    assert len(records) == 2
    for record in records:
        assert record["decision"] in all_decisions("gpt_driver")
        assert record["decision"] not in all_decisions()
        assert record["failure"] is None
    assert stage.decisions == [record["decision"] == "stop." for record in records]


def test_thoughts_are_learned_and_their_loss_is_due_on_all_three_answers(
    make_vla, action_tokenizer
):
    vla = make_vla()
    short = thought_over(action_tokenizer, ("A road.", "stop, go straight."))
    longer = thought_over(action_tokenizer, ("A road in rain.", "stop, go straight."))
    count = {name: int((b.talk.labels >= 0).sum()) for name, b in (("s", short), ("l", longer))}
    assert count["l"] > count["s"]
    for batch in (short, longer):
        output = vla(batch)
        assert output.labels.numel() == int((batch.talk.labels >= 0).sum())
        assert output.loss.isfinite()


def test_what_is_hidden_is_hidden_from_thoughts_too(action_tokenizer):
    batch = thought_over(action_tokenizer, ("A road.", "stop, go straight."))
    unknown = thought_over(action_tokenizer, (None, "stop, go straight."))
    for told in (batch, unknown):
        check_hidden(told, tell_less(told, "no_ego", REASONING, action_tokenizer))


def check_hidden(batch, less):
    for before, after in zip(batch.talk.conversations, less.talk.conversations, strict=True):
        assert [turn.role for turn in after.turns] == [turn.role for turn in before.turns]
        assert "v(0.00,0.00)" in after.turns[0].text
        assert after.turns[1:] == before.turns[1:]
