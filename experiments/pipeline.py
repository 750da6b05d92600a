"""The pipeline: stages in order, finished ones skipped, interrupted ones continued, like make.

    <runs>/<experiment>/config.yaml    what was asked for
    <runs>/<experiment>/<stage>/       see stage_run.py and handoff.py
    <runs>/<experiment>/table.md, results.json, pictures/

With several processes (trainer.devices x trainer.nodes) every one of them runs this code; the first
writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markdown import Markdown

from experiments.evaluation import evaluate
from experiments.handoff import (
    CARD,
    TOKENIZER,
    card_sha256,
    check_dialect,
    check_handoff,
    fingerprint_of,
    git_commit,
    read_card,
)
from experiments.planning_evaluation import MODEL
from experiments.prepare import (
    build_model,
    check_kept_tokens,
    data_module,
    kept_tokenizer,
    prepare_data,
)
from experiments.processes import first_process_first, join_processes
from experiments.sample_pictures import draw_cases, draw_predictions
from experiments.schema import STAGES, ExperimentConfig
from experiments.stage_run import CONFIG, PREDICTIONS, StageRun, Workshop, is_first_process
from experiments.tracking import Tracker
from odvla.config import config_hash, flat
from odvla.errors import UserError
from odvla.language.tokenizer import ChatTokenizer
from odvla.weights import file_sha256, write_atomically

log = logging.getLogger(__name__)
EVALUATED = "evaluated.json"


@dataclass(frozen=True)
class Pipeline:
    """An experiment that is ready to go through its stages; `open_pipeline` makes one."""

    shop: Workshop
    stages: tuple[str, ...]  # to go through, in order
    parent: Path | None  # handoff that the first of them starts from
    lock: FileLock | None = None  # held while this process lives

    def fit(self) -> None:
        """Train what is not trained yet.

        Raises:
            UserError: data, config or a handoff is not usable; the sentence names it.
        """
        shop = self.shop
        check_kept_tokens(shop.config, self.stages, shop.vla)
        if is_first_process():
            shop.write_config()
        self._track()
        parent = self.parent
        for stage in self.stages:
            run = StageRun(shop, stage, parent)
            if run.is_finished():
                log.info("stage %s: finished before, skipped", stage)
            else:
                self._guarded(run)
            parent = run.folder

    def _track(self) -> None:
        """Open the experiment's MLflow run; anew where its store is not the one of before."""
        shop = self.shop
        tags = {"experiment": shop.config.name, "seed": shop.config.seed}
        tags |= {"git_commit": git_commit(), "data_fingerprint": shop.fingerprint}
        shop.tracker.start(flat(shop.config), tags)

    def _guarded(self, run: StageRun) -> None:
        try:
            run.run()
        except BaseException as error:
            self.shop.tracker.close("", error)
            raise

    def test(self, stage: str = "") -> None:
        """Predict again with every finished stage's weights, or one's.

        Args:
            stage: only this one; "": all.

        Raises:
            UserError: no stage is finished, or a handoff is damaged.
        """
        done = self.finished()
        if not done:
            raise UserError(f"no stage is finished in {self.shop.folder}; run fit first")
        if stage and stage not in done:
            named = ", ".join(done)
            raise UserError(f"stage {stage!r} is not finished in {self.shop.folder}, only {named}")
        done = [stage] if stage else done
        for stage in done:
            log.info("stage %s: predicting", stage)
            StageRun(self.shop, stage, None).test()
            (self.shop.folder / stage / EVALUATED).unlink(missing_ok=True)
        (self.shop.folder / EVALUATED).unlink(missing_ok=True)

    def finished(self) -> list[str]:
        """Stages that have a card."""
        return [stage for stage in self.stages if (self.shop.folder / stage / CARD).is_file()]

    def report(
        self,
        console: Console,
        protocols: Sequence[str] = (),
        *,
        stage: str = "",
        thorough: bool = False,
    ) -> None:
        """Evaluate the predictions, print the tables, write and track them; draw pictures.

        Does nothing new where the same predictions were evaluated on the same data before.

        Args:
            console: where tables are printed.
            protocols: further protocols for plans, beside the two that are always there.
            stage: evaluate this one alone, into its own folder; "": all.
            thorough: with scores beyond L2, and pictures of the worst and the median plans.
        """
        if not is_first_process():
            return
        shop, stages = self.shop, [stage] if stage else self.finished()
        folder = shop.folder / stage if stage else shop.folder
        made_from = {stage: card_sha256(shop.folder / stage) for stage in stages}
        made_from |= {
            f"{stage} predictions": file_sha256(path)
            for stage in stages
            if (path := shop.folder / stage / PREDICTIONS).is_file()
        }
        made_from["data"] = config_hash([shop.fingerprint, shop.config.data])
        made_from["baseline"] = config_hash(shop.config.baseline)
        if protocols or thorough:
            made_from["how"] = config_hash({"protocols": list(protocols), "thorough": thorough})
        note = folder / EVALUATED
        if note.is_file() and json.loads(note.read_text()) == made_from:
            console.print(Markdown((folder / "table.md").read_text()))
            return
        data = data_module(shop.config, stages[-1], shop.tokenizer)
        with console.status("evaluating"):
            report = evaluate(
                shop.config.name,
                data,
                shop.folder,
                stages,
                shop.config.baseline,
                protocols,
                beyond=thorough,
            )
        report.print(console)
        report.write(folder)
        with console.status("drawing"):
            pictures = draw_predictions(data, shop.folder, shop.config.pictures)
            if thorough and report.samples:
                count = max(1, shop.config.pictures)
                pictures += draw_cases(data, folder / "cases", report.samples, count)
        self._track()
        for name, numbers in report.numbers.items():
            shop.tracker.log_numbers(name, numbers)
        shop.tracker.log_numbers("", report.numbers)
        last = stages[-1]
        # Before alignment there is nothing that answers from what it sees.
        if shop.config.log_model and not stage and last not in ("language", "perception"):
            model = shop.tracker.log_model(last, shop.folder / last, made_from[last])
            plans = report.numbers.get("planning", {}).get("planning", {}).get(MODEL, {})
            shop.tracker.log_numbers("", plans, model)
        written = (folder / "table.md", folder / "results.json", shop.folder / CONFIG)
        shop.tracker.log_files("", *written, *pictures)
        shop.tracker.close("")
        write_atomically(note, json.dumps(made_from, indent=1).encode())


def open_pipeline(
    config: ExperimentConfig,
    runs: Path,
    parent: Path | None = None,
    *,
    progress: bool = True,
    any_number: bool = False,
    trained: bool = False,
) -> Pipeline:
    """Make data, tokenizer and model ready.

    Args:
        config: the experiment.
        runs: folder of all runs.
        parent: a finished stage's folder to start from; stages up to that one are left out.
        progress: show progress bars.
        any_number: of processes, whatever the experiment trains with.
        trained: nothing is to be trained any more: take the vocabulary of the finished stages. It
            is their parent's where they started from one.

    Raises:
        UserError: the data or the parent's handoff is not usable, or another process works in the
            run's folder.
    """
    stages = config.run
    if parent is not None:
        first = STAGES.index(read_card(parent).stage) + 1
        stages = tuple(stage for stage in stages if STAGES.index(stage) >= first)
        if not stages:
            raise UserError(f"no stage of run ({', '.join(config.run)}) comes after {parent}")
        card = check_handoff(parent, stages[0])
        check_dialect(parent, card, config)
        if config.init.weights:
            kept = f"fill none of {', '.join(card.parts)}" if card.parts else "are not loaded"
            log.info("init.weights %s: stage %s starts from %s", kept, stages[0], parent)
    join_processes(config.trainer, any_number=any_number)
    folder, main = runs / config.name, is_first_process()
    with first_process_first():
        config = prepare_data(config, progress=progress and main)
        fingerprint = fingerprint_of(config)
        lock = _lock(folder) if main else None
        finished = [folder / stage for stage in stages if (folder / stage / CARD).is_file()]
        if parent is not None:
            tokenizer = ChatTokenizer.load(parent / TOKENIZER)
        elif trained and finished:
            tokenizer = ChatTokenizer.load(finished[-1] / TOKENIZER)
        else:
            tokenizer = kept_tokenizer(config, folder / TOKENIZER, fingerprint, write=main)
    vla = build_model(config, tokenizer)
    tracker = Tracker(folder, runs, config.name, active=main)
    shop = Workshop(config, folder, runs, fingerprint, tokenizer, vla, tracker, progress and main)
    return Pipeline(shop, stages, parent, lock)


def _lock(folder: Path) -> FileLock:
    """Keep other processes out of a run's folder until this one ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", is_singleton=True)  # this process may come again
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another process is working in {folder}; wait for it, or give this run a name of its "
            "own (name=...)"
        ) from error
    return lock
