"""The benchmark's model writes what it was solved for, and all ways to write agree."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from odvla.fake_batch import fake_tokenizer
from odvla.language.causal_lm import LanguageConfig
from odvla.language.draft import Drafting
from odvla.language.prompts import Dialect


@pytest.fixture(scope="module")
def benchmark():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import decode

    sys.path.remove(folder)
    return decode


def test_all_ways_write_the_same_plans(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "machine", lambda device: (1e10, 1e11))
    torch.manual_seed(0)
    tokenizer = fake_tokenizer(Dialect(), vocab_size=500)
    config = LanguageConfig(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=512)
    language = config.build(len(tokenizer)).eval()
    paths = benchmark.driven_paths(None, 2)
    asked, prefix = benchmark.requests(language, tokenizer, paths)
    assert len(prefix) > 16
    benchmark.teach(language, [a.prompt for a in asked], [a.answer for a in asked])
    found = benchmark.ways(language, tokenizer, asked, prefix, Drafting())
    benchmark.measure(found, asked, batch=2, runs=1, device="cpu")
    assert [way.name for way in found] == list(benchmark.WAYS)
    assert all(way.same for way in found)
    hugging_face, draft = found[0], found[-1]
    assert hugging_face.runs[0] == max(len(a.answer) for a in asked[:2])
    assert sum(draft.runs) < 0.5 * sum(hugging_face.runs)
    out = Console(record=True, width=150)
    benchmark.report(found, asked, 2, 1.0, out)
    assert "NO" not in out.export_text()
    assert "the limit is" in benchmark.limits(language, asked, len(prefix), draft, 2, "cpu")
    with pytest.raises(ValueError, match="more than 512 features"):
        benchmark.teach(language, [a.prompt for a in asked * 9], [a.answer for a in asked * 9])
    wrong = [replace(asked[0], answer=asked[1].answer)]
    again = benchmark.ways(language, tokenizer, wrong, prefix, Drafting(), ("hf",))
    benchmark.measure(again, wrong, batch=1, runs=1, device="cpu")
    assert not again[0].same
