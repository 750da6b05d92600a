"""Tables from prediction files: hand-made predictions with known scores."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from callbacks.predictions import WritePredictions
from datamodules.nuscenes import EvaluationFrame, NuScenesDataConfig
from experiments.baselines import EgoMLPConfig
from experiments.evaluation import (
    evaluate_forecasts,
    evaluate_language,
    evaluate_perception,
    read_predictions,
)
from experiments.planning_evaluation import evaluate_planning
from experiments.report import Report, ResultTable
from experiments.submissions import read_submission
from odvla.errors import UserError
from odvla.types import EgoState, PlanTargets


class StraightRoad:
    """Stands in for a data module: cars that drive straight at a steady speed on an empty road."""

    def evaluation_frames(self, split, *, height_m=0.0):
        rng = np.random.default_rng({"train": 0, "val": 1}[split])
        for number in range(30):
            speed = rng.uniform(2, 10)
            times = torch.arange(1, 7) * 0.5
            past = -torch.tensor([2.0, 1.5, 1.0, 0.5])
            ego = EgoState(
                velocity=torch.tensor([[0.0, speed]], dtype=torch.float32),
                yaw_rate=torch.zeros(1),
                acceleration=torch.zeros(1, 2),
                can_accel=torch.zeros(1, 2),
                heading_speed=torch.full((1,), speed),
                steering=torch.zeros(1),
                history=torch.stack([torch.zeros(4), past * speed], -1)[None].float(),
                command=torch.tensor([2]),
            )
            plan = torch.stack([torch.zeros(6), times * speed], -1)[None].float()
            mask = torch.ones(1, 6, dtype=torch.bool)
            yield EvaluationFrame(
                f"{split}-{number}",
                f"scene-{number // 5}",
                number % 5,
                PlanTargets(plan, mask),
                ego,
            )

    def occupancy(self, sample_token, *, pedestrians=False):
        return torch.zeros(6, 200, 200, dtype=torch.bool)


def test_planning_table_holds_the_closed_forms():
    data = StraightRoad()
    records = []
    for frame in data.evaluation_frames("val"):
        shifted = frame.plan.waypoints[0] + torch.tensor([0.3, 0.4])
        records.append(
            {"sample_token": frame.sample_token, "kind": "plan", "waypoints": shifted.tolist()}
        )
        records.append(
            {"sample_token": frame.sample_token, "kind": "plan_blind", "waypoints": None}
        )
    result = evaluate_planning(data, records, EgoMLPConfig(hidden=16, epochs=2), ("uniad",))
    found = result.numbers["planning"]
    model = found["OpenDriveVLA"]
    for convention in ("mean_up_to_t", "value_at_t"):
        assert model[convention]["l2_m"] == pytest.approx((0.5, 0.5, 0.5), abs=1e-5)
        for planner in ("constant velocity", "constant acceleration", "constant turn rate"):
            assert found[planner][convention]["l2_average_m"] < 1e-5
    assert model["parsed_percent"] == 100.0
    assert found["OpenDriveVLA, vision zeroed"]["parsed_percent"] == 0.0
    speed = np.mean([f.ego.heading_speed.item() for f in data.evaluation_frames("val")])
    still = found["OpenDriveVLA, vision zeroed"]["value_at_t"]["l2_m"]
    assert still == pytest.approx([speed, 2 * speed, 3 * speed], rel=1e-5)
    assert len({table.title for table in result.tables}) == 4
    # Sample by sample: always half a metre more than what is exact, and never a collision.
    against = found["constant velocity"]["model_less_this"]
    difference = against["l2_avg_m"]["difference"]
    assert [difference[name] for name in ("low", "value", "high")] == pytest.approx([0.5] * 3)
    assert difference["scenes"] == 6
    assert against["l2_avg_m"]["p_value"] == pytest.approx(2 / 2**6)  # all signs, or none
    assert against["collision_avg"]["difference"]["value"] == 0
    assert against["collision_avg"]["p_value"] == 1
    assert "model_less_this" not in model
    (paired,) = (table for table in result.tables if "less the others" in table.title)
    assert len(paired.rows) == len(found) - 1
    assert ("constant velocity", ("+0.500", "+0.50,+0.50", "0.031")) in [
        (name, cells[:3]) for name, cells in paired.rows
    ]
    uniad = model["protocols"]["uniad"]
    assert uniad["l2_avg_m"] == pytest.approx(0.5, abs=1e-5)
    assert uniad["card"]["samples"] == "reference"
    # Every sample of six scenes is off by the same.
    assert uniad["intervals_95"]["l2_avg_m"]["low"] == pytest.approx(0.5, abs=1e-5)
    assert [r["failure"] for r in result.samples] == [None] * 30
    assert result.samples[0]["l2_avg_m"]["uniad"] == pytest.approx(0.5, abs=1e-5)
    collisions = [record["collision_avg"]["uniad"] for record in result.samples]
    assert np.mean(collisions) == pytest.approx(uniad["box_collision_avg"])
    with pytest.raises(UserError, match="no plan_blind for sample val-0"):
        evaluate_planning(data, records[:1] + records[2:], EgoMLPConfig(hidden=16, epochs=2))


def test_language_tables_group_by_kind():
    records = [
        {
            "kind": "qa",
            "text": said,
            "reference": "yes",
            "meta": {"template_type": "exist", "num_hop": "0"},
        }
        for said in ("yes", "no")
    ]
    records.append({"kind": "narration", "text": "the car waits", "reference": "the car waits"})
    tables, numbers = evaluate_language(records, "instruction")
    assert numbers["question_answering"]["accuracy"] == 50.0
    assert numbers["captions"]["narration"]["bleu"][0] == pytest.approx(100, rel=1e-3)
    assert "| most common answer | 100.0 |" in tables[0].markdown()


def test_forecasts_leave_out_agents_without_a_future():
    path = [[0.0, float(k)] for k in range(1, 7)]
    unknown = {
        "kind": "agent",
        "waypoints": path,
        "target": [[None, None]] * 6,
        "mask": [False] * 6,
    }
    known = {"kind": "agent", "waypoints": path, "target": path, "mask": [True] * 6}
    _, numbers = evaluate_forecasts([unknown, known])
    assert numbers["forecasts"]["OpenDriveVLA"]["all"]["agents"] == 1
    assert numbers["forecasts"]["OpenDriveVLA"]["all"]["min_ade_m"] == 0.0
    assert numbers["forecasts"]["standing still"]["all"]["min_ade_m"] == 3.5


def test_broken_prediction_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no predictions at"):
        read_predictions(tmp_path / "predictions.jsonl")
    (tmp_path / "predictions.jsonl").write_text('{"a": 1}\n{"b"\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl, line 2 is not JSON"):
        read_predictions(tmp_path / "predictions.jsonl")


def test_predictions_are_read_as_they_are_written(tmp_path):
    """A text may hold what Unicode, but not JSON, calls the end of a line."""
    written = WritePredictions(tmp_path / "predictions.jsonl")
    text = "a\u2028b\u2029c\x85d\x0be\r\nf"
    record = {"sample_token": "s", "kind": "caption", "text": text, "reference": "é"}
    written.records = [record, {**record, "id": "2"}]
    written.on_test_epoch_end(
        SimpleNamespace(state=SimpleNamespace(fn="test"), is_global_zero=True), None
    )
    assert read_predictions(written.path) == [record, {**record, "id": "2"}]
    assert read_submission(written.path).records == read_predictions(written.path)


def test_report_is_written_as_markdown_and_json(tmp_path):
    table = ResultTable("Title", ("a", "b"), (("row", (1.234, None)),), note="how to read it")
    Report("mine", (table,), {"x": 1}).write(tmp_path)
    assert "| row | 1.23 | - |" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text()) == {"x": 1}
    with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
        ResultTable("Title", ("a", "b"), (("row", (1.0,)),))


@pytest.mark.parametrize("frames", [40, 12])
def test_the_annotations_score_as_detections_on_all_or_a_part_of_the_split(
    town_root, tmp_path, frames
):
    data = NuScenesDataConfig(
        root=str(town_root),
        version="v1.0-trainval",
        image_size=(16, 9),
        targets=("agents",),
        agent_range_m=60.0,
    ).build()
    records = []
    for frame in list(data.evaluation_frames("val"))[:frames]:
        agents = data.frame(frame.sample_token).agents[-1]
        mask = agents.mask[0]
        records.append(
            {
                "sample_token": frame.sample_token,
                "kind": "detection",
                "boxes": agents.boxes[0, mask].tolist(),
                "labels": agents.labels[0, mask].tolist(),
                "scores": [1.0] * int(mask.sum()),
                "track_ids": agents.track_ids[0, mask].tolist(),
            }
        )
    records.append(
        {"sample_token": "x", "kind": "map", "intersection": [1, 0, 0, 5], "union": [4, 0, 2, 5]}
    )
    tables, numbers = evaluate_perception(data, records, tmp_path, tracking=frames == 40)
    assert tables[0].note.startswith(f"{frames} key-frames")
    found = numbers["detection"]["mean_dist_aps"]
    assert found["car"] > 0.9
    assert numbers["map_iou"]["divider"] == 0.25
    assert numbers["map_iou"]["ped_crossing"] is None
    assert numbers["map_iou"]["mean"] == pytest.approx((0.25 + 0.0 + 1.0) / 3)
    if frames == 40:  # the true tracks: nobody is mistaken for another
        assert numbers["tracking"]["ids"] == 0
        assert numbers["tracking"]["label_metrics"]["amota"]["car"] > 0.9
