r"""Plans per second: Hugging Face's generate, as the reference calls it, against ours.

    python benchmarks/decode.py     # Qwen2.5-0.5B's size; half an hour on two cores
    python benchmarks/decode.py --hidden 64 --layers 2 --heads 4 --kv-heads 2 --intermediate 1024 \
        --batch 1 4 --runs 3                           # small: under a minute

Same weights, same prompts, same greedy plans: all ways are checked to write the same tokens. The
weights are random but for one matrix, which is solved for so that the model writes paths that were
driven (benchmarks/plan_writer.py), from prompts that tell what was driven before. Of what one run
of the program prints, only ratios should be compared: all ways take turns.

Ways:
    hf            generate(inputs_embeds, greedy, max_new_tokens=512), the whole prompt every time
    hf + grammar  the same with our grammar as a logits processor
    grammar       our loop: allowed rows of the head alone, no pass for forced tokens, fixed cache
    + prefix      and the system prompt is read once
    + draft       and a guess of the car's motion is verified many tokens at a time
    + graphs      and runs on a GPU are recorded as CUDA graphs
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan_writer import teach
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from odvla.errors import UserError
from odvla.language.causal_lm import CausalLM, LanguageConfig
from odvla.language.draft import Drafting, MotionDraft
from odvla.language.generation import decode
from odvla.language.grammar import Grammar, plan_grammar
from odvla.language.prompts import Dialect
from odvla.language.splice import Spliced, splice
from odvla.language.tokenizer import ChatTokenizer
from odvla.language.waypoints import format_waypoints
from odvla.types import HISTORY, SLOT_IDS, WAYPOINTS, Conversation, EgoState

SHARED = Path(__file__).parents[2] / "shared"
STREAMS = {"scene": 90, "track": 20, "map": 101}  # tokens: UniAD's scene and map, 20 agents
WAYS = ("hf", "hf + grammar", "grammar", "+ prefix", "+ draft", "+ graphs")
ROOM = 0.8  # of the features that the plans may use up


@dataclass(frozen=True)
class Asked:
    """A request for a plan, and what is to be written."""

    prompt: Spliced
    answer: list[int]  # with the end token
    history: Tensor  # [4, 2]


@dataclass
class Way:
    """One way to write plans, and what it took."""

    name: str
    write: Callable[[Sequence[int]], tuple[list[list[int]], int]]  # rows -> ids, runs
    seconds: list[float] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    same: bool = True


class Allowed(LogitsProcessor):
    """A grammar for Hugging Face's generate."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.columns = {token: k for k, token in enumerate(grammar.token_ids.tolist())}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Forbid what is not allowed; input_ids are the new tokens alone."""
        masked = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids.tolist()):
            state = self.grammar.start
            for token in ids:
                state = self.grammar.steps[state].get(token, self.grammar.end_state)
            tokens = list(self.grammar.steps[state])
            masked[row, tokens] = scores[row, tokens]
        return masked


def driven_paths(path: Path | None, count: int) -> list[tuple[Tensor, Tensor]]:
    """Histories [4, 2] and futures [6, 2] in metres: recorded, or made up where path is None."""
    if path is not None:
        if not path.is_file():
            raise UserError(f"there are no plans in {path}; --plans none makes some up")
        records = [
            (torch.tensor(r["history"]), torch.tensor(r["future"]))
            for r in json.loads(path.read_text())
            if len(r["history"]) == HISTORY and len(r["future"]) == WAYPOINTS
        ]
        step = max(1, len(records) // count)
        return records[::step][:count]
    generator = torch.Generator().manual_seed(0)
    times = torch.arange(-HISTORY, WAYPOINTS + 1) * 0.5
    found = []
    for _ in range(count):
        speed, change, turn = (torch.rand(3, generator=generator) - torch.tensor([0, 0.5, 0.5])) * (
            torch.tensor([12.0, 3.0, 0.3])
        )
        way = speed * times + change * times * times / 2
        noise = torch.randn(len(times), 2, generator=generator) * 0.03
        xy = torch.stack([turn * way * way / 20, way], dim=1) + noise * (times != 0)[:, None]
        found.append((xy[:HISTORY], xy[HISTORY + 1 :]))
    return found


def requests(
    language: CausalLM,
    tokenizer: ChatTokenizer,
    paths: Sequence[tuple[Tensor, Tensor]],
) -> tuple[list[Asked], list[int]]:
    """Requests of the default dialect, and the ids that all begin with."""
    dialect = Dialect()
    generator = torch.Generator().manual_seed(1)
    device = language.head.weight.device
    asked, texts = [], []
    for number, (history, future) in enumerate(paths):
        turns = dialect.turns("plan", None, ego_state(history))
        conversation = Conversation(f"{number}", f"{number}", "plan", turns, "")
        talk = tokenizer.tokenise([conversation], [0]).to(device)
        ids = talk.input_ids[0].tolist()
        texts.append(ids[: next(k for k, i in enumerate(ids) if i in SLOT_IDS.values())])
        streams = {
            name: (
                0.02 * torch.randn(1, count, language.hidden, generator=generator).to(device),
                torch.ones(1, count, dtype=torch.bool, device=device),
            )
            for name, count in STREAMS.items()
        }
        with torch.no_grad():
            text = language.embed(talk.input_ids.clamp(min=0))
            prompt = splice(text, talk, streams, pad_left=True)
        form = dialect.plan_form
        answer = tokenizer.text_ids(format_waypoints(future, form, -history[-1]))
        asked.append(Asked(prompt, [*answer, tokenizer.end_id], history))
    return asked, texts[0]


def ego_state(history: Tensor) -> EgoState:
    """What a prompt tells of a car that was at these places."""
    steps = torch.diff(torch.cat([history, torch.zeros(1, 2)]), dim=0)
    return EgoState(
        velocity=2 * steps[-1:],
        yaw_rate=torch.zeros(1),
        acceleration=steps[-1:] - steps[-2:-1],
        can_accel=torch.zeros(1, 2),
        heading_speed=2 * steps[-1:].norm(dim=1),
        steering=torch.zeros(1),
        history=history[None],
        command=torch.full((1,), 2),
    )


def batch_of(asked: Sequence[Asked]) -> Spliced:
    """Prompts of several requests, padded at the left."""
    longest = max(a.prompt.embeds.shape[1] for a in asked)

    def stacked(name: str, filler: float) -> Tensor:
        rows = []
        for a in asked:
            row = getattr(a.prompt, name)
            shape = (1, longest - row.shape[1], *row.shape[2:])
            rows.append(torch.cat([row.new_full(shape, filler), row], dim=1))
        return torch.cat(rows)

    return Spliced(
        stacked("embeds", 0), stacked("attention_mask", 0), stacked("position_ids", 0),
        stacked("labels", -100),
    )  # fmt: skip


def ways(
    language: CausalLM,
    tokenizer: ChatTokenizer,
    asked: Sequence[Asked],
    prefix: list[int],
    drafting: Drafting,
    names: Sequence[str] = WAYS,
) -> list[Way]:
    """Ways to write the plans of some of the requests."""
    form = Dialect().plan_form
    grammar = plan_grammar(tokenizer, decimals=form.decimals, signed_zero=form.signed_zero)
    end = tokenizer.end_id

    def hugging_face(rows: Sequence[int], *processors: LogitsProcessor) -> tuple[Any, int]:
        prompts, passes = batch_of([asked[row] for row in rows]), 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        # Taken away again: runs of a model with hooks are not recorded.
        counting = language.model.base_model.register_forward_pre_hook(count)
        written = language.model.generate(
            inputs_embeds=prompts.embeds,
            attention_mask=prompts.attention_mask.long(),
            max_new_tokens=512,
            do_sample=False,
            num_beams=1,
            eos_token_id=end,
            pad_token_id=end,
            logits_processor=LogitsProcessorList(processors),
        ).tolist()
        counting.remove()
        ids = [row[: row.index(end)] if end in row else row for row in written]
        return ids, passes

    def ours(
        rows: Sequence[int], *, cached: bool = True, draft: bool = True, graphs: bool = False
    ) -> tuple[Any, int]:
        chosen = [asked[row] for row in rows]
        drafts = [MotionDraft(tokenizer, grammar, form, a.history) for a in chosen if draft]
        found = decode(
            language,
            batch_of(chosen),
            end,
            max_new_tokens=512,
            grammar=grammar,
            drafts=drafts,
            drafting=drafting,
            prefix=prefix if cached else (),
            record=graphs,
        )
        return found.ids, found.runs

    known = [
        Way("hf", hugging_face),
        Way("hf + grammar", lambda rows: hugging_face(rows, Allowed(grammar))),
        Way("grammar", lambda rows: ours(rows, cached=False, draft=False)),
        Way("+ prefix", lambda rows: ours(rows, draft=False)),
        Way("+ draft", ours),
        Way("+ graphs", lambda rows: ours(rows, graphs=True)),
    ]
    return [way for way in known if way.name in names]


def measure(
    found: list[Way],
    asked: Sequence[Asked],
    batch: int,
    runs: int,
    device: str,
    say: Callable[[str], Any] = lambda line: None,
) -> None:
    """Let all ways take turns on the same prompts; `say` is told what is on."""
    # Runs that warm up do not count; one's size is recorded when it is met a second time.
    warm_up = 3 if any(way.name == "+ graphs" for way in found) else 1
    for run in range(-warm_up, runs):
        rows = [(max(run, 0) * batch + k) % len(asked) for k in range(batch)]
        for way in found:
            say(f"batch {batch}, run {run + 1} of {runs}: {way.name}")
            _wait(device)
            start = time.perf_counter()
            ids, passes = way.write(rows)
            _wait(device)
            seconds = time.perf_counter() - start
            way.same &= ids == [asked[row].answer[:-1] for row in rows]
            if run >= 0:
                way.seconds.append(seconds)
                way.runs.append(passes)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def report(found: list[Way], asked: Sequence[Asked], batch: int, base: float, out: Console) -> None:
    """A table of one batch size; `base` is plans per second of Hugging Face one by one."""
    tokens = np.mean([len(a.answer) for a in asked])
    title = f"batch {batch}: {tokens:.1f} tokens a plan, {len(found[0].seconds)} runs"
    table = Table(title=title, box=None, padding=(0, 2))
    for column in ("way", "same plans", "passes", "p50 s", "p99 s", "time / hf", "passes / hf",
                   "plans/s", "plans/s / hf batch 1"):  # fmt: skip
        table.add_column(column, justify="left" if column == "way" else "right")
    first = found[0]
    for way in found:
        p50, p99 = np.percentile(way.seconds, [50, 99])
        table.add_row(
            way.name,
            "yes" if way.same else "[red]NO[/]",
            f"{np.mean(way.runs):.1f}",
            f"{p50:.3f}",
            f"{p99:.3f}",
            f"{p50 / np.percentile(first.seconds, 50):.2f}",
            f"{np.mean(way.runs) / np.mean(first.runs):.2f}",
            f"{batch / p50:.3f}",
            f"{batch / p50 / base:.2f}",
        )
    out.print(table)


def machine(device: str) -> tuple[float, float]:
    """Bytes a second from memory, and multiply-adds times two a second, of large fp32 matrices."""
    big = torch.randn(96 * 2**20 if device == "cpu" else 2**28, device=device)
    left, right = (torch.randn(n, 896, device=device) for n in (1024, 4864))

    def best(call: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(5):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return big.numel() * 4 / best(big.sum), 2 * left.numel() * len(right) / best(
        lambda: left @ right.T
    )


def limits(
    language: CausalLM, asked: Sequence[Asked], prefix: int, way: Way, batch: int, device: str
) -> str:
    """What the fastest way spends its time on at least."""
    bandwidth, flops = machine(device)
    head = language.head.weight
    body = sum(p.numel() for p in language.parameters()) - head.numel()
    places = float(np.mean([a.prompt.embeds.shape[1] for a in asked])) - prefix
    prefill = 2 * body * places * batch
    passes = float(np.mean(way.runs)) - 1
    read = passes * body * head.element_size()
    total = float(np.percentile(way.seconds, 50))
    parts = {
        f"prefill: {prefill / 1e9:.0f} GFLOP at {flops / 1e9:.0f} GFLOP/s": prefill / flops,
        f"decode: {passes:.0f} x {body * head.element_size() / 1e6:.0f} MB of weights at "
        f"{bandwidth / 1e9:.0f} GB/s": read / bandwidth,
    }
    if device == "cuda":
        launches = _launches(language)
        parts[f"launches: {passes + 1:.0f} x {launches} at 5 us each"] = (
            (passes + 1) * launches * 5e-6
        )
    lines = [f"  {name} = {s:.3f} s, {100 * s / total:.0f} % of {total:.3f} s" for name, s in
             parts.items()]  # fmt: skip
    most = max(parts, key=lambda name: parts[name])
    limit = f"the limit is {most.partition(':')[0]}"
    if sum(parts.values()) < total / 2:
        limit = "the limit is none of these: calls of many small operations, or a busy machine"
    return "\n".join([*lines, f"  {limit}"])


def _launches(language: CausalLM) -> int:
    """Kernels of one pass."""
    from torch.profiler import ProfilerActivity, profile

    x = torch.zeros(1, 1, language.hidden, device="cuda", dtype=language.head.weight.dtype)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as profiled:
        language.model.base_model(inputs_embeds=x, use_cache=False)
        torch.cuda.synchronize()
    return sum(event.count for event in profiled.key_averages())


def parse() -> argparse.Namespace:
    """The options; sizes are Qwen2.5-0.5B's unless said otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"hidden": 896, "layers": 24, "heads": 14, "kv-heads": 2, "intermediate": 4864,
             "vocab": 151_936}  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizer" / "qwen2.5")
    parser.add_argument(
        "--plans",
        type=lambda text: None if text == "none" else Path(text),
        default=SHARED / "data" / "nuscenes-mini-trajectories.json",
        help="driven paths (history and future); none: made-up ones",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--runs", type=int, nargs="+", default=[8, 2], help="for each batch size")
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], help="beside hf, which always runs")
    parser.add_argument("--tokens-per-run", type=int, default=Drafting().tokens_per_run)
    parser.add_argument("--no-branches", action="store_true", help="drafts that are chains")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.ways is None:
        options.ways = WAYS[1:] if options.device == "cuda" else WAYS[1:-1]
    return options


def main() -> None:
    """Build, teach, measure, print."""
    options, out = parse(), Console(width=130, highlight=False)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    started = time.perf_counter()
    tokenizer = ChatTokenizer.load(options.tokenizer)
    form = Dialect().plan_form
    start = time.perf_counter()
    plan_grammar(tokenizer, decimals=form.decimals, signed_zero=form.signed_zero)
    out.print(f"grammar of {len(tokenizer)} tokens: {time.perf_counter() - start:.2f} s")
    config = LanguageConfig(
        hidden=options.hidden,
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.kv_heads,
        intermediate=options.intermediate,
        max_positions=32_768,
        rope_theta=1e6,
    )
    language = config.build(max(options.vocab, len(tokenizer))).eval().to(options.device)
    count = min(max(options.batch) * 2, int(ROOM * options.intermediate / 75))
    asked, prefix = requests(language, tokenizer, driven_paths(options.plans, max(1, count)))
    teach(language, [a.prompt for a in asked], [a.answer for a in asked])
    places = [a.prompt.embeds.shape[1] for a in asked]
    parameters = sum(p.numel() for p in language.parameters())
    out.print(
        f"{parameters / 1e6:.0f} M parameters on {options.device}, {options.threads} threads; "
        f"{len(asked)} prompts of {min(places)} to {max(places)} places, {len(prefix)} of them "
        f"the same text; ready after {time.perf_counter() - started:.0f} s"
    )
    drafting = Drafting(tokens_per_run=options.tokens_per_run, branches=not options.no_branches)
    base = 0.0
    for number, batch in enumerate(options.batch):
        found = ways(language, tokenizer, asked, prefix, drafting, ("hf", *options.ways))
        runs = options.runs[min(number, len(options.runs) - 1)]
        with out.status("") as status:
            measure(found, asked, batch, runs, options.device, status.update)
        base = base or batch / float(np.percentile(found[0].seconds, 50))
        report(found, asked, batch, base, out)
        known = len(prefix) if found[-1].name.startswith("+") else 0
        out.print(limits(language, asked, known, found[-1], batch, options.device))


if __name__ == "__main__":
    main()
