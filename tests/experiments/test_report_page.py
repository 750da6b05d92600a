"""Results side by side: what is compared, what is refused, and what the page holds."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.cli import main
from experiments.planning_scores import Scored
from experiments.published_tables import published_plans, published_tables
from experiments.report_page import make_report
from experiments.report_plots import all_plots, comparable
from experiments.result_files import compare, planning_tables, read_results
from odvla.errors import UserError
from odvla.metrics.collisions import Traffic
from odvla.metrics.planning import PlanningMetric
from odvla.metrics.protocol import PRESETS

SAMPLES = 24
# Averages that do not follow from the numbers beside them; the paper prints them so.
AS_PRINTED = {("RDA-Driver", 0.23)}


def write(folder, error_m, protocols=("uniad", "opendrivevla_stp3"), **changes):
    """A results.json as `score` writes it, of plans that are `error_m` off to the right."""
    driven = torch.zeros(SAMPLES, 6, 2)
    driven[..., 1] = 3.0 * torch.arange(1, 7)
    plans = driven + torch.tensor([error_m, 0.0])
    raster = torch.zeros(SAMPLES, 6, 200, 200, dtype=torch.bool)
    raster[:3, 5, 138, 98] = True  # (0.75, 19.25): three plans may touch it at the last step
    names = [f"sample-{number:02d}" for number in range(SAMPLES)]
    scenes = [f"scene-{number // 6}" for number in range(SAMPLES)]
    planning, l2 = {}, None
    for protocol in protocols:
        metric = PlanningMetric(replace(PRESETS[protocol], **changes))
        mask = torch.ones(SAMPLES, 6, dtype=torch.bool)
        metric.update(names, plans, driven, mask, Traffic(raster))
        scored = Scored(metric.scores(), metric.samples(), tuple(scenes))
        planning[protocol] = scored.as_dict()
        l2, hits = scored.samples.l2_m.tolist(), scored.samples.hits.tolist()
    samples = [
        {
            "sample_token": name,
            "scene": scenes[row],
            "command": ("turn left", "keep forward")[row % 2],
            "speed_mps": float(row),
            "recorded_steps": 6,
            "plan": plans[row].tolist(),
            "l2_m": {"uniad": l2[row]},
            "l2_avg_m": {protocol: error_m for protocol in protocols},
            "collision": {protocol: hits[row] for protocol in protocols},
        }
        for row, name in enumerate(names)
    ]
    folder.mkdir()
    content = {
        "predictions": f"{folder.name}.pkl",
        "planning": planning,
        "samples": samples,
        "driving": {f"{folder.name}.pkl": {"no_fault_collision": 0.875, "drivable_area": None}},
    }
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_results_stand_side_by_side_and_are_compared(tmp_path):
    good, poor = write(tmp_path / "good", 0.5), write(tmp_path / "poor", 1.5)
    results = read_results([good, poor / "results.json"])
    tables = {table.title: table for table in planning_tables(results)}
    rows = dict(tables["Planning, uniad"].rows)
    assert rows["good.pkl"][:4] == pytest.approx((0.5,) * 4)
    assert rows["poor.pkl"][2] == pytest.approx(1.5)
    assert rows["poor.pkl"][8] == "1.50 to 1.50"
    found = {c.protocol: c.test for c in compare(results)}
    assert found["uniad"].difference.value == pytest.approx(1.0)
    assert found["uniad"].p_value == 2 / 2**4  # four scenes, all on one side
    # Town data: published rows of the same protocol stand in a table of their own.
    assert "OpenDriveVLA-7B (published)" not in dict(tables["Planning, opendrivevla_stp3"].rows)
    apart = tables["Planning, opendrivevla_stp3, published on nuScenes val"]
    assert dict(apart.rows)["OpenDriveVLA-7B (published)"][3] == 0.33
    assert "other data than above" in apart.note


def test_published_rows_stand_beside_ours_on_nuscenes_val(tmp_path):
    folder = write(tmp_path / "mine", 0.5)
    content = json.loads((folder / "results.json").read_text())
    content["counts"] = {"in_split": 6019}
    (folder / "results.json").write_text(json.dumps(content))
    tables = {table.title: table for table in planning_tables(read_results([folder]))}
    assert "OpenDriveVLA-0.5B (published)" in dict(tables["Planning, opendrivevla_stp3"].rows)
    # Not beside numbers of another card, and never the quoted ones.
    changed = write(tmp_path / "changed", 0.5, missing="left_out")
    tables = {table.title: table for table in planning_tables(read_results([changed]))}
    assert "OpenDriveVLA-0.5B (published)" not in dict(tables["Planning, opendrivevla_stp3"].rows)
    assert "compare with nothing" in tables["Published: planning, quoted, mean up to t"].note


def test_a_plot_never_mixes_protocols(tmp_path):
    folders = [
        write(tmp_path / "first", 0.5, protocols=("uniad",)),
        write(tmp_path / "second", 1.0, protocols=("opendrivevla_stp3", "uniad")),
        write(tmp_path / "third", 2.0, protocols=("opendrivevla_stp3",)),
    ]
    protocol, kept = comparable(read_results(folders))
    assert (protocol, [result.name for result in kept]) == ("uniad", ["first.pkl", "second.pkl"])
    assert all("(uniad)" in title for title, _ in all_plots(read_results(folders)))
    assert comparable([]) == ("", [])


def test_different_cards_are_not_compared(tmp_path):
    one = write(tmp_path / "one", 0.5)
    other = write(tmp_path / "other", 0.5, samples="valid_steps")
    results = read_results([one, other])
    for refused in (planning_tables, compare):
        with pytest.raises(UserError, match=r"and other.pkl .*samples \(reference \| valid"):
            refused(results)


def test_the_page_holds_tables_plots_and_pictures(tmp_path, capsys):
    folders = [write(tmp_path / "good", 0.5), write(tmp_path / "poor", 1.5)]
    cases = folders[0] / "cases"
    cases.mkdir()
    (cases / "collision-1-sample-00.png").write_bytes(b"\x89PNG")
    out = tmp_path / "report"
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    assert "Planning, uniad" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "collision 1 sample-00" in page
    assert "data:image/png;base64,iVBORw" in page
    # Nothing is loaded from anywhere.
    assert not re.search(r"(src|href)=.https?:|@import|<script", page)
    text = (out / "report.md").read_text()
    assert "| good.pkl | 0.50 |" in text
    assert "| poor.pkl - good.pkl, uniad | 1.000 |" in text
    assert "Published: Table II, nuCaption" in text
    first = (out / "report.html").read_bytes()
    make_report(folders, out)
    assert (out / "report.html").read_bytes() == first


def test_files_that_are_no_results_are_refused(tmp_path):
    with pytest.raises(UserError, match="no results at"):
        read_results([tmp_path])
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="holds no results of score or test"):
        read_results([tmp_path])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_results([tmp_path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["planning"]["uniad"].pop("l2_1s_m"), "uniad: l2_1s_m is missing"),
        (lambda c: c["planning"]["uniad"].update(l2_1s_m="0.3"), "l2_1s_m is missing or no number"),
        (lambda c: c["planning"]["uniad"].pop("n_samples"), "n_samples is missing"),
        (lambda c: c["planning"]["uniad"].update(intervals_95=3), "3 is no group"),
        (lambda c: c["planning"].update(uniad=3), "uniad: 3 is no group of numbers"),
        (lambda c: c.update(planning=[]), "planning holds no group of results"),
        (lambda c: c.update(language=3), "language holds no group of results"),
        (lambda c: c["samples"][0].pop("sample_token"), "sample 0 has no sample_token"),
        (lambda c: c["samples"][1].pop("scene"), "sample sample-01 has no scene"),
        (lambda c: c.update(samples=[3]), "samples is no list of records"),
        (lambda c: c.update(predictions=3), "predictions is no text"),
    ],
)
def test_results_that_lack_something_are_refused_by_its_name(tmp_path, change, message):
    file = write(tmp_path / "mine", 0.5) / "results.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"results\.json.*{message}"):
        read_results([file])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not JSON"):
        read_results([file])


def test_numbers_that_were_not_finite_are_dashes(tmp_path):
    folder, other = write(tmp_path / "mine", 0.5), write(tmp_path / "other", 1.0)
    content = json.loads((folder / "results.json").read_text())
    numbers = content["planning"]["uniad"]
    numbers |= {name: None for name in numbers if "collision_" in name}
    numbers["collision_steps"] = [None] * 6
    numbers["intervals_95"]["l2_avg_m"] |= {"low": None, "high": None}
    content["samples"][0]["l2_m"]["uniad"] = [None] * 6
    content["samples"][0]["l2_avg_m"]["uniad"] = None
    (folder / "results.json").write_text(json.dumps(content))
    tables = {table.title: table for table in make_report([folder, other], tmp_path / "report")}
    assert dict(tables["Planning, uniad"].rows)["mine.pkl"][4:9] == (None,) * 5
    compared = dict(tables["Paired comparison, average L2 (m)"].rows)
    assert compared["other.pkl - mine.pkl, uniad"][3] == str(SAMPLES - 1)


def test_published_numbers_are_whole():
    plans = {found.protocol: found for found in published_plans()}
    assert [name for name, found in plans.items() if found.comparable] == [
        "opendrivevla_stp3",
        "opendrivevla_uniad",
    ]
    for found in plans.values():
        for name, cells in found.rows:
            for numbers in (cells[:3], cells[4:7]):
                if None not in numbers and (name, numbers[0]) not in AS_PRINTED:
                    average = cells[3] if numbers == cells[:3] else cells[7]
                    # Papers round, or average before rounding.
                    assert float(np.mean(numbers)) == pytest.approx(average, abs=0.021), name
    assert [len(table.rows) for table in published_tables()] == [5, 4, 8, 7, 9, 3]
