"""The verbs `score` and `report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.verbs.parser import PROGRAM, Verbs, add_verb, quiet_libraries, wide_console

FRAMES = ("lidar", "ego", "swapped", "mirrored", "offsets")


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    score = add_verb(
        verbs,
        "score",
        "score anybody's predictions on a data root",
        "score plans.pkl --data data/nuscenes --protocol uniad --protocol stp3 --out scores\n"
        f"         python {PROGRAM} score plans.pkl --data data/nuscenes --truth gt/gt_traj.pkl",
        score_predictions,
    )
    score.add_argument(
        "predictions",
        type=Path,
        help="JSON lines of ours, plan_conv.json, a GPT-Driver pickle, a nuScenes detection or "
        "tracking submission, NuScenes-QA answers, captions, captions of boxes, DriveLM's output, "
        "or OmniDrive's folder of results",
    )
    score.add_argument("--data", type=Path, required=True, metavar="ROOT", help="nuScenes root")
    score.add_argument("--version", default="", help="e.g. v1.0-mini (default: the one there is)")
    score.add_argument("--split", default="val", choices=("train", "val"), help="default: val")
    score.add_argument(
        "--protocol",
        action="append",
        default=[],
        metavar="NAME",
        help="uniad, stp3, vad, opendrivevla, omnidrive, sparsedrive, odvla; may be given again "
        "(default: uniad and stp3; omnidrive for OmniDrive's own plans)",
    )
    score.add_argument(
        "--frame", default="lidar", choices=FRAMES, help="what the plans' numbers mean"
    )
    score.add_argument(
        "--missing",
        default="",
        choices=("left_out", "standing_still", "stop"),
        help="what becomes of key-frames without a plan (default: as the protocol has it)",
    )
    score.add_argument(
        "--truth",
        type=Path,
        metavar="FILE",
        help="driven paths of somebody's gt_traj.pkl instead of those computed from the data root",
    )
    score.add_argument(
        "--truth-mask",
        type=Path,
        metavar="FILE",
        help="where they are known (default: gt_traj_mask.pkl beside them)",
    )
    score.add_argument(
        "--truth-rasters",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="planing_gt_segmentation_val or vad_gt_seg.pkl instead of our own rasters; may be "
        "given again",
    )
    score.add_argument("--references", type=Path, metavar="FILE", help="answers to compare with")
    score.add_argument(
        "--broken-captions",
        type=int,
        default=0,
        metavar="N",
        help="so many records of TOD3Cap's file may not fit; each is named (default: 0)",
    )
    score.add_argument(
        "--alone",
        action="store_true",
        help="without the rows of planners that see nothing (constant velocity, acceleration, turn "
        "rate, an MLP of the ego state)",
    )
    score.add_argument("--bert", type=Path, metavar="DIR", help="local model for BERTScore")
    score.add_argument("--name", default="", help="of the planner, in tables")
    score.add_argument("--out", type=Path, metavar="DIR", help="results.json and table.md go here")

    report = add_verb(
        verbs,
        "report",
        "put results beside each other and beside published ones",
        "report runs/tiny scores/others --out report",
        report_results,
    )
    report.add_argument(
        "results", type=Path, nargs="+", help="results.json of score or test, or their folders"
    )
    report.add_argument("--out", type=Path, default=Path("report"), metavar="DIR")
    report.add_argument(
        "--pictures", type=Path, metavar="DIR", help="default: cases beside results"
    )


def report_results(options: argparse.Namespace) -> None:
    """Tables in the terminal, Markdown and a page."""
    from experiments.output_places import check_folder
    from experiments.report_page import PAGE, make_report

    check_folder(options.out)
    console = wide_console()
    for table in make_report(options.results, options.out, options.pictures):
        if not table.title.startswith("Published"):
            console.print(table.rich())
    console.print(f"page: {options.out / PAGE}", markup=False, soft_wrap=True)


def score_predictions(options: argparse.Namespace) -> None:
    """Read, score, print, write."""
    from experiments.output_places import check_folder
    from experiments.score import ScoreRequest, score
    from experiments.truth_files import TruthFiles

    quiet_libraries()
    if options.out:
        check_folder(options.out)
    request = ScoreRequest(
        predictions=options.predictions,
        data=options.data,
        version=options.version,
        split=options.split,
        protocols=tuple(options.protocol),
        frame=options.frame,
        missing=options.missing,
        name=options.name,
        references=options.references,
        bert=options.bert,
        truth=TruthFiles(options.truth, options.truth_mask, tuple(options.truth_rasters)),
        broken_captions=options.broken_captions,
        baselines=not options.alone,
    )
    console = wide_console()
    with console.status("scoring"):
        found = score(request)
    found.report.print(console)
    for sentence in found.said:
        console.print(f"! {sentence}", markup=False, highlight=False, soft_wrap=True)
    if options.out:
        found.write(options.out)
        console.print(f"results: {options.out / 'results.json'}", markup=False, soft_wrap=True)
