"""What is hidden from the model is hidden, and nothing else is."""

from dataclasses import replace

import pytest
import torch

from callbacks.predictions import WritePredictions
from odvla.errors import UserError
from odvla.fake_batch import fake_batch
from odvla.language.prompts import Dialect
from odvla.types import COMMANDS
from stages.plan_ablations import EGO_FIELDS, KIND_OF, OtherVision, hide_ego, tell_less
from stages.planning import PlanningStageConfig

SIZE = (48, 32)


def prompts(batch):
    return [conversation.turns[0].text for conversation in batch.talk.conversations]


def test_a_hidden_part_of_the_ego_state_is_gone_and_the_rest_is_kept(tokenizer):
    batch = fake_batch(tokenizer, rows=3, image_size=SIZE)
    for name in ("no_ego", "no_history", "no_command"):
        less = tell_less(batch, name, Dialect("compact"), tokenizer)
        gone = {"no_ego": EGO_FIELDS, "no_history": ("history",), "no_command": ("command",)}[name]
        for field, value in vars(batch.ego).items():
            kept = getattr(less.ego, field)
            if field not in gone:
                assert torch.equal(kept, value)
            elif field == "command":
                assert set(kept.tolist()) == {COMMANDS.index("keep forward")}
            else:
                assert not kept.any()
        assert less.talk.frame_index.tolist() == batch.talk.frame_index.tolist()
        assert [c.reference for c in less.talk.conversations] == [
            c.reference for c in batch.talk.conversations
        ]
    assert prompts(tell_less(batch, "no_ego", Dialect("compact"), tokenizer)) != prompts(batch)
    text = prompts(tell_less(batch, "no_ego", Dialect("compact"), tokenizer))[0]
    assert "v(0.00,0.00)" in text
    forward = prompts(tell_less(batch, "no_command", Dialect("compact"), tokenizer))
    assert all("goal keep forward" in text for text in forward)


def test_a_plan_of_changes_is_read_without_the_history_that_was_hidden(tokenizer):
    batch = fake_batch(tokenizer, rows=1, image_size=SIZE)
    assert batch.ego.last_step.any()
    assert not hide_ego(batch.ego, "no_history").last_step.any()


def test_every_row_sees_another_scene(tokenizer):
    batch = fake_batch(tokenizer, rows=3, image_size=SIZE)
    swapped = OtherVision().swap(batch)
    mine, theirs = batch.clip[-1], swapped.clip[-1]
    for row, donor in enumerate((2, 0, 1)):
        assert torch.equal(theirs.images[row], mine.images[donor])
        assert theirs.sample_tokens[row] == mine.sample_tokens[donor]
    assert swapped.talk is batch.talk
    # A row that only fills the batch gives nothing away.
    filled = replace(batch, valid=torch.tensor([True, False, True]))
    theirs = OtherVision().swap(filled).clip[-1]
    assert torch.equal(theirs.images[0], mine.images[2])
    assert torch.equal(theirs.images[2], mine.images[0])


def test_the_last_scene_sees_one_that_was_streamed_before(tokenizer):
    other = OtherVision()
    both = fake_batch(tokenizer, rows=2, image_size=SIZE, seed=0)
    other.swap(both)
    alone = fake_batch(tokenizer, rows=1, image_size=SIZE, seed=9)
    assert torch.equal(other.swap(alone).clip[-1].images[0], both.clip[-1].images[0])
    with pytest.raises(UserError, match="at least two side by side"):
        OtherVision().swap(alone)


def test_the_stage_writes_a_plan_for_everything_that_is_hidden(
    make_vla, make_data, make_trainer, tmp_path
):
    config = PlanningStageConfig(ablations=tuple(KIND_OF), max_new_tokens=40)
    data = make_data("plan")
    data.dialect = Dialect("compact")
    path = tmp_path / "predictions.jsonl"
    stage = config.build(make_vla())
    # One scene at a time: another one's vision is that of the scene before; none at the first.
    with pytest.raises(UserError, match="at least two side by side"):
        make_trainer(WritePredictions(path)).test(stage, data, verbose=False)
    told = tuple(name for name in KIND_OF if name != "other_vision")
    stage = replace(config, ablations=told).build(make_vla())
    make_trainer(WritePredictions(path)).test(stage, data, verbose=False)
    records = path.read_text().splitlines()
    assert len(records) == 7 * (1 + len(told))
    assert all('"kind": "plan' in record for record in records)


def test_an_unknown_ablation_is_refused():
    with pytest.raises(UserError, match="ablations must be some of no_vision"):
        PlanningStageConfig(ablations=("no_wheels",))
