"""The comparison of a sweep, on folders that are made up with known numbers."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from safetensors.numpy import save_file

from experiments.cli import main
from experiments.sweeps.comparison import compare_sweep
from experiments.sweeps.comparison_page import plots_of, tables_of, write_comparison
from experiments.tracking import Tracker
from odvla.errors import UserError
from odvla.metrics.intervals import bootstrap
from odvla.metrics.protocol import PRESETS

METRIC = "planning.planning.OpenDriveVLA.mean_up_to_t.l2_average_m"
SCENES = 4
PER_SCENE = 3


def sample_values(offset_m):
    """Twelve samples in four scenes; scene g adds g / 10."""
    return [offset_m + (row // PER_SCENE) / 10 for row in range(SCENES * PER_SCENE)]


def results(values, card=PRESETS["odvla_stp3"], protocol="odvla_stp3"):
    """A point's results.json: what each sample is off, and their mean."""
    samples = [
        {
            "sample_token": f"token-{row}",
            "scene": f"scene-{row // PER_SCENE}",
            "l2_avg_m": {protocol: value},
        }
        for row, value in enumerate(values)
    ]
    own = {"l2_average_m": float(np.mean(values)), "card": card.as_dict()}
    return {"planning": {"planning": {"OpenDriveVLA": {"mean_up_to_t": own}}}, "samples": samples}


class MadeUp:
    """A sweep's folder; points are added one by one."""

    def __init__(self, folder, axes, metric=METRIC, higher=False, seeds=(0, 1)):
        self.folder = folder
        self.manifest = {
            "format": 1,
            "name": "made-up",
            "metric": metric,
            "higher_is_better": higher,
            "axes": axes,
            "seeds": list(seeds),
            "points": [],
            "tasks": [],
        }

    def point(self, labels, seed, content=None, seconds=(10.0, 20.0), width=5):
        number = len(self.manifest["points"])
        task = f"planning-{number}"
        stages = {"perception": "perception-shared", "planning": task}
        self.manifest["points"].append(
            {
                "id": f"p{number}",
                "labels": dict(zip(self.manifest["axes"], labels, strict=True)),
                "seed": seed,
                "stages": stages,
            }
        )
        place = self.folder / "points" / f"p{number}"
        place.mkdir(parents=True)
        for (kind, name), lasted in zip(stages.items(), seconds, strict=True):
            stage = self.folder / "stages" / name / kind
            stage.mkdir(parents=True, exist_ok=True)
            if content is not None:
                (stage / "card.json").write_text(json.dumps({"seconds": lasted}))
                weights = {"a": np.zeros((width, 2), "f4"), "b": np.zeros(3, "f4")}
                save_file(weights, stage / "vla.safetensors")
        if content is not None:
            (place / "results.json").write_text(json.dumps(content))
        (self.folder / "sweep.json").write_text(json.dumps(self.manifest))
        return self.folder / "stages" / task

    def fail(self, task, error):
        task.mkdir(parents=True, exist_ok=True)
        (task / "failed.json").write_text(json.dumps({"error": error}))


@pytest.fixture
def sweep(tmp_path):
    """The base, one that is 0.5 m worse in every sample, one that failed in half its seeds."""
    made = MadeUp(tmp_path / "runs" / "made-up", {"size": ["small", "large|wide", "broken"]})
    for seed in (0, 1):
        made.point(["small"], seed, results(sample_values(1.0 + seed)), (10.0, 20.0), 5)
    for seed in (0, 1):
        made.point(["large|wide"], seed, results(sample_values(1.5 + seed)), (10.0, 50.0), 9)
    made.point(["broken"], 0, results(sample_values(0.9)))
    made.fail(made.point(["broken"], 1), "RuntimeError: out of <memory>")
    return made


def test_collisions_have_intervals_and_tests_too(tmp_path):
    metric = "planning.planning.OpenDriveVLA.mean_up_to_t.collision_average_percent"
    made = MadeUp(tmp_path / "runs" / "bumps", {"size": ["small", "large"]}, metric, seeds=(0,))
    parts = {"small": sample_values(0.0), "large": [value + 0.25 for value in sample_values(0.0)]}
    for label, values in parts.items():
        content = results([1.0] * len(values))
        own = content["planning"]["planning"]["OpenDriveVLA"]["mean_up_to_t"]
        own["collision_average_percent"] = 100 * float(np.mean(values))
        for record, value in zip(content["samples"], values, strict=True):
            record["collision_avg"] = {"odvla_stp3": value}
        made.point([label], 0, content)
    small, large = compare_sweep(made.folder).rows
    scenes = [row // PER_SCENE for row in range(SCENES * PER_SCENE)]
    counted = np.ones(len(scenes), bool)
    expected = bootstrap(100 * np.array(parts["small"]), counted, scenes)
    assert small.mean == pytest.approx(15.0)
    assert (small.interval.low, small.interval.high) == pytest.approx((expected.low, expected.high))
    assert large.test.difference.value == pytest.approx(25.0)


def test_means_intervals_and_paired_tests(sweep):
    found = compare_sweep(sweep.folder)
    small, large, broken = found.rows
    assert (len(small.used), len(small.points)) == (2, 2)
    assert small.mean == pytest.approx(1.5 + 0.15)  # seeds 1.0 and 2.0, scenes 0 to 0.3
    assert small.spread == pytest.approx(np.sqrt(0.5))
    assert small.test is None
    expected = bootstrap(
        np.array(sample_values(1.5)),
        np.ones(SCENES * PER_SCENE, bool),
        [f"scene-{row // PER_SCENE}" for row in range(SCENES * PER_SCENE)],
    )
    assert small.interval.low == pytest.approx(expected.low)
    assert small.interval.high == pytest.approx(expected.high)
    # Every sample is 0.5 m worse: no spread; of the 16 sign patterns two are as extreme.
    assert large.test.difference.value == pytest.approx(0.5)
    assert large.test.difference.low == pytest.approx(0.5)
    assert large.test.p_value == 2 / 2**SCENES
    # Only seed 0 of the third is there: it is compared with seed 0 of the base, not with both.
    assert broken.test.difference.value == pytest.approx(-0.1)
    assert found.best(found.rows) == 2
    assert (small.seconds, large.seconds) == (30.0, 60.0)
    assert (small.parameters, large.parameters) == (13, 21)


def test_failed_and_unfinished_points_are_shown(sweep):
    sweep.point(["broken"], 2)
    begun = sweep.point(["broken"], 3)
    (begun / "status.json").write_text(json.dumps({"step": 7, "steps": 50}))
    main_table, missing = tables_of(compare_sweep(sweep.folder))
    assert dict(main_table.rows)["broken"][-1] == "1 failed, 2 begun"
    rows = dict(missing.rows)
    assert rows["broken, seed 1"] == ("failed", "planning: RuntimeError: out of <memory>")
    assert rows["broken, seed 2"] == ("begun", "perception is done, what comes after it is not")
    assert rows["broken, seed 3"] == (
        "begun",
        "planning is running or was interrupted, step 7 of 50",
    )


def test_each_axis_alone_uses_the_same_partners(tmp_path):
    made = MadeUp(tmp_path / "s", {"a": ["a0", "a1"], "b": ["b0", "b1"]}, seeds=(0,))
    made.point(["a0", "b0"], 0, results(sample_values(1.0)))
    made.point(["a0", "b1"], 0, results(sample_values(5.0)))
    made.point(["a1", "b0"], 0, results(sample_values(1.25)))
    made.fail(made.point(["a1", "b1"], 0), "ValueError: x")
    found = compare_sweep(made.folder)
    # a1 has no partner at b1, so that a0's result there is not counted against a1.
    a0, a1 = found.by_axis["a"]
    assert [len(a0.used), len(a1.used)] == [1, 1]
    assert a0.mean == pytest.approx(1.15)
    assert a1.test.difference.value == pytest.approx(0.25)
    assert found.by_axis["b"][1].test.difference.value == pytest.approx(4.0)


def test_without_a_base_or_samples_nothing_is_tested(tmp_path):
    made = MadeUp(tmp_path / "s", {"a": ["x", "y", "z"]}, "language.accuracy", higher=True)
    made.point(["x"], 0)
    made.point(["y"], 0, {"language": {"accuracy": 0.25}})
    made.point(["z"], 0, {"language": {"accuracy": 0.5}})
    found = compare_sweep(made.folder)
    assert [row.mean for row in found.rows] == [None, 0.25, 0.5]
    assert all(row.test is None and row.interval is None for row in found.rows)
    assert found.best(found.rows) == 2
    (table, _) = tables_of(found)
    assert "The base has no result" in table.note
    assert "No interval" in table.note


def test_points_of_different_cards_are_refused(sweep):
    sweep.point(["broken"], 2, results(sample_values(1.0), PRESETS["vad"]))
    with pytest.raises(UserError) as refused:
        compare_sweep(sweep.folder)
    sentence = str(refused.value)
    assert "small, seed 0 and broken, seed 2" in sentence
    assert "samples (valid_steps | complete_only)" in sentence


def test_mistakes_are_one_sentence(tmp_path, sweep, capsys):
    with pytest.raises(UserError, match="holds no sweep"):
        compare_sweep(tmp_path)
    sweep.point(["broken"], 2, {"planning": {"other": 1}})
    with pytest.raises(UserError, match="at 'planning' there is only other"):
        compare_sweep(sweep.folder)
    empty = MadeUp(tmp_path / "empty", {"a": ["x"]})
    empty.fail(empty.point(["x"], 0), "RuntimeError: why")
    with pytest.raises(UserError, match=r"no point of the sweep .* x, seed 0: planning: Runtime"):
        compare_sweep(empty.folder)
    assert main(["compare", "no_such_sweep"]) == 2
    assert "there is no sweep 'no_such_sweep'" in capsys.readouterr().err


def test_another_metric_is_compared_in_a_folder_of_its_own(sweep, capsys):
    for number, place in enumerate(sorted((sweep.folder / "points").iterdir())):
        path = place / "results.json"
        if path.is_file():
            content = json.loads(path.read_text())
            path.write_text(json.dumps(content | {"language": {"accuracy": number / 10}}))
    asked = ["compare", str(sweep.folder), "--metric", "language.accuracy", "--higher-is-better"]
    assert main(asked) == 0
    assert "language.accuracy, higher is better" in capsys.readouterr().out
    written = json.loads((sweep.folder / "language.accuracy" / "compare.json").read_text())
    assert written["best"] == ["broken"]
    assert [row["mean"] for row in written["rows"]] == pytest.approx([0.05, 0.25, 0.4])
    assert not (sweep.folder / "compare.json").exists()
    assert main(["compare", str(sweep.folder), "--higher-is-better"]) == 2
    assert "--metric, which is not there" in capsys.readouterr().err


class Balance(HTMLParser):
    """Fails where an element is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        assert not any(name == "src" and value.startswith("http") for name, value in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_files_say_what_the_tables_say(sweep, tmp_path):
    found = compare_sweep(sweep.folder)
    markdown, numbers, page = write_comparison(found, tmp_path / "out")
    assert "| **1.050** |" in markdown.read_text()
    assert r"large\|wide" in markdown.read_text()
    content = json.loads(numbers.read_text())
    assert content["best"] == ["broken"]
    assert content["rows"][1]["against_base"]["p_value"] == 0.125
    assert content["points"][-1]["error"] == "planning: RuntimeError: out of <memory>"
    text = page.read_text()
    reader = Balance()
    reader.feed(text)
    assert reader.open == []
    assert "out of &lt;memory&gt;" in text
    assert '<td class="best">1.050</td>' in text
    bars, seconds, sizes = (svg for _, svg in plots_of(found))
    assert all(name in bars for name in ("small", "large|wide", "broken"))
    assert "seconds of all stages" in seconds
    assert "million parameters" in sizes
    assert bars in text


def test_the_verb_logs_to_the_sweeps_run(sweep, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = sweep.folder.parent
    tracker = Tracker(sweep.folder, store, "made-up", active=True)
    tracker.start({}, {"kind": "sweep"})
    assert main(["compare", "made-up", "--runs", str(store)]) == 0
    out = capsys.readouterr().out
    assert "out of <memory>" in out
    assert tracker.run_id in out
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    logged = {file.path for file in client.list_artifacts(tracker.run_id, "compare")}
    assert logged == {f"compare/compare.{kind}" for kind in ("md", "json", "html")}


def test_an_absent_server_does_not_stop_the_verb(sweep):
    note = {"uri": "http://127.0.0.1:9", "experiment": "0", "runs": {"": "abc"}}
    (sweep.folder / "mlflow.json").write_text(json.dumps(note))
    assert main(["compare", str(sweep.folder)]) == 0
    assert (sweep.folder / "compare.html").is_file()
