"""The verb `report`: results side by side and beside published ones, as Markdown and HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from experiments.published_tables import published_tables
from experiments.report import ResultTable
from experiments.report_plots import all_plots
from experiments.report_tables import other_tables
from experiments.result_files import (
    Result,
    compare,
    comparison_table,
    planning_tables,
    read_results,
)
from odvla.weights import write_atomically

MARKDOWN, PAGE = "report.md", "report.html"
PICTURES = ("collision", "worst", "median")
MOST_PICTURES = 3  # of a kind and a result

STYLE = """
:root { --text: #1d2733; --soft: #5c6773; --line: #dde3ea; --card: #ffffff; --ground: #f5f7f9;
        --accent: #2f6db3; --mark: #fff6e6; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0 0 10px; }
p.lead { color: var(--soft); margin: 0 0 20px; }
nav a { color: var(--accent); text-decoration: none; margin-right: 18px; }
section.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
               padding: 18px 20px; margin: 0 0 18px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
tr.published td { color: var(--soft); }
td.best { font-weight: 700; }
p.note { color: var(--soft); font-size: 13px; margin: 10px 0 0; }
div.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 18px; }
div.plots section.card { margin: 0; }
div.plots svg { width: 100%; height: auto; }
figure { margin: 0 0 14px; }
figure img { width: 100%; border-radius: 6px; border: 1px solid var(--line); display: block; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 4px; }
"""


def make_report(
    paths: Sequence[Path], out: Path, pictures: Path | None = None
) -> list[ResultTable]:
    """Write report.md and report.html.

    Args:
        paths: results.json files, or the folders they lie in.
        out: folder to write to.
        pictures: folder of pictures; None: `cases` beside each result, where there is one.

    Returns:
        The tables, those of published numbers last.

    Raises:
        UserError: a file holds no results, or numbers of different cards would be compared.
    """
    results = read_results(paths)
    ours = [table for table in planning_tables(results) if not _is_published(table)]
    comparisons = compare(results)
    if comparisons:
        ours.append(comparison_table(comparisons))
    ours += other_tables(results)
    published = [table for table in planning_tables(results) if _is_published(table)]
    published += published_tables()
    out.mkdir(parents=True, exist_ok=True)
    plots = all_plots(results)
    shown = _pictures(results, pictures)
    lines = ["# Results", "", *(f"- {result.name}: `{result.path}`" for result in results), ""]
    lines += [table.markdown() for table in (*ours, *published)]
    write_atomically(out / MARKDOWN, ("\n".join(lines) + "\n").encode())
    write_atomically(out / PAGE, _page(results, ours, published, plots, shown).encode())
    return [*ours, *published]


def _is_published(table: ResultTable) -> bool:
    return table.title.startswith("Published")


def _pictures(results: Sequence[Result], folder: Path | None) -> list[tuple[str, Path]]:
    """Caption and file of pictures, collisions first."""
    shown = []
    for result in results:
        place = folder or result.path.parent / "cases"
        for kind in PICTURES if result.samples and place.is_dir() else ():
            for path in sorted(place.glob(f"{kind}-*.png"))[:MOST_PICTURES]:
                shown.append((f"{result.name}: {path.stem.replace('-', ' ', 2)}", path))
    return shown


def _page(
    results: Sequence[Result],
    ours: Sequence[ResultTable],
    published: Sequence[ResultTable],
    plots: Sequence[tuple[str, str]],
    shown: Sequence[tuple[str, Path]],
) -> str:
    names = ", ".join(html.escape(result.name) for result in results)
    lead = f"{names}. Numbers of different protocols are never in one table."
    sections = [("results", "Results", "".join(map(html_table, ours)))]
    if plots:
        sections.append(plots_section(plots))
    if shown:
        figures = "".join(_figure(caption, path) for caption, path in shown)
        sections.append(("cases", "Cases", f'<section class="card">{figures}</section>'))
    if published:
        sections.append(("published", "Published", "".join(map(html_table, published))))
    return html_page("Results", lead, sections)


def plots_section(plots: Sequence[tuple[str, str]]) -> tuple[str, str, str]:
    """The section of plots, given as title and SVG."""
    cards = "".join(
        f'<section class="card"><h3>{html.escape(title)}</h3>{svg}</section>'
        for title, svg in plots
    )
    return "plots", "Plots", f'<div class="plots">{cards}</div>'


def html_page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A page that needs no other file.

    Args:
        title: its heading, as text.
        lead: the line below it, as HTML.
        sections: key, title and HTML of each.
    """
    title = html.escape(title)
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(f'<h2 id="{key}">{name}</h2>{text}' for key, name, text in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>odvla: {title}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{title}</h1><p class="lead">{lead}</p><nav>{links}</nav>{body}</main></body></html>\n'
    )


def html_table(table: ResultTable) -> str:
    """A table as a card of the page."""
    best = _best(table) | table.bold
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = []
    for number, (name, cells) in enumerate(table.rows):
        kind = ' class="published"' if "(published)" in name else ""
        texts = "".join(
            f'<td class="best">{html.escape(table.text(cell))}</td>'
            if (number, place) in best
            else f"<td>{html.escape(table.text(cell))}</td>"
            for place, cell in enumerate(cells)
        )
        rows.append(f"<tr{kind}><td>{html.escape(name)}</td>{texts}</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<section class="card"><h3>{html.escape(table.title)}</h3><table><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}</section>"
    )


def _best(table: ResultTable) -> set[tuple[int, int]]:
    """Cells of planning tables that are the least of their column, published ones left out."""
    if not table.title.startswith("Planning"):
        return set()
    own = [n for n, (name, _) in enumerate(table.rows) if "(published)" not in name]
    best = set()
    for place in range(len(table.columns)):
        values = {n: table.rows[n][1][place] for n in own}
        numbers = {n: v for n, v in values.items() if isinstance(v, float)}
        if len(numbers) > 1:
            least = min(numbers.values())
            best |= {(n, place) for n, value in numbers.items() if value == least}
    return best


def _figure(caption: str, path: Path) -> str:
    picture = base64.b64encode(path.read_bytes()).decode()
    source = f"data:image/png;base64,{picture}"
    text = html.escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'
