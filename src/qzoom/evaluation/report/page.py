"""The report as one HTML page that needs nothing else: own styles, inline drawings, embedded pictures, no scripts."""

from __future__ import annotations

import html
from collections.abc import Sequence

from qzoom.evaluation.report.charts import colour_of, svg_chart
from qzoom.evaluation.report.figures import COSTS, TaskFigures
from qzoom.evaluation.report.gallery import KINDS, Card
from qzoom.evaluation.report.words import COLUMNS, NOTE, cells, findings, percent, times

__all__ = ["render_page"]

_STYLE = """
:root{color-scheme:light dark;--paper:#f7f7f5;--card:#fff;--ink:#181c24;--muted:#626976;--line:#dee0e4;--accent:#de5426}
@media (prefers-color-scheme:dark){:root{--paper:#14161b;--card:#1d2027;--ink:#eceef2;--muted:#9aa2b1;--line:#343943;
--accent:#ff8a5c}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:48px 24px 80px}
h1{font-size:2.1rem;line-height:1.2;margin:0 0 .4em}h2{margin:2.4em 0 .3em;font-size:1.5rem}h3{margin:1.8em 0 .6em}
p,li{max-width:76ch}.muted{color:var(--muted);font-size:.9rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:20px}
.grid{display:grid;gap:20px;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));margin:20px 0}
.gallery{grid-template-columns:repeat(auto-fill,minmax(270px,1fr))}
.big{font-size:2rem;font-weight:650;line-height:1.1}.chart{width:100%;height:auto;display:block}
.chart text{fill:var(--muted);font-size:15px}.chart .axis{fill:var(--ink)}.rule{stroke:var(--line)}
.line{fill:none;stroke-width:2}.whisker{stroke-width:1.2;opacity:.65}.ring{fill:none;stroke-width:1.6}
.dot{stroke:var(--card);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;padding:0;margin:8px 0;list-style:none;font-size:.9rem}
.legend i{display:inline-block;width:11px;height:11px;border-radius:50%;margin-right:7px;background:currentColor}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--muted);font-weight:550}
figure{margin:0}figure img{width:100%;height:auto;border-radius:8px;background:#fff}
figcaption{margin-top:10px;font-size:.9rem;overflow-wrap:anywhere}figcaption b{font-weight:600}
.wrong{color:var(--accent)}nav a{margin-right:16px;color:var(--accent)}
"""


def render_page(title: str, tasks: Sequence[TaskFigures], ran: str, galleries: Sequence[tuple[str, list[Card]]]) -> str:
    """The whole page.

    Args:
        title: of the page.
        tasks: the figures.
        ran: what ran, in words.
        galleries: for each task the run whose failures are shown, and their cards.
    """
    methods = sorted({line.method for task in tasks for line in task.runs})
    name = html.escape(title)
    links = "".join(f'<a href="#task-{i}">{html.escape(task.name)}</a>' for i, task in enumerate(tasks, start=1))
    body = [
        f"<h1>{name}</h1><p>{_code(NOTE)}</p><p class=muted>Ran with {html.escape(ran)}.</p><nav>{links}</nav>",
    ]
    for number, (task, (run, cards)) in enumerate(zip(tasks, galleries, strict=True), start=1):
        body.append(_task(number, task, methods, run, cards))
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}{_colours(methods)}</style></head>"
    )
    return f"{head}<body><main>{''.join(body)}</main></body></html>\n"


def _task(number: int, task: TaskFigures, methods: Sequence[str], run: str, cards: Sequence[Card]) -> str:
    used = [method for method in methods if any(line.method == method for line in task.runs)]
    legend = "".join(f'<li><i class="c-{m}"></i>{html.escape(m)}</li>' for m in used)
    charts = [svg_chart(task, cost, methods) for cost in COSTS]
    drawn = "".join(f'<div class="card">{chart}</div>' for chart in charts if chart)
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(task))
    return (
        f'<section id="task-{number}"><h2>{html.escape(task.name.capitalize())}</h2>'
        f"<p class=muted>{task.questions} questions about {task.pictures} pictures</p>{_headline(task)}"
        f'<ul class="legend">{legend}<li class=muted>ring: on the front; whisker: 95 %</li></ul>'
        f'<div class="grid">{drawn}</div><ul>{said}</ul>{_table(task)}{_gallery(run, cards)}</section>'
    )


def _headline(task: TaskFigures) -> str:
    """The savings at equal accuracy and the gain over the best plain run, as large numbers."""
    found = []
    equal = task.equal_accuracy
    if equal is not None:
        found.append((times(equal["throughput"]).replace(" times", "×"), "throughput at the best plain run's accuracy"))
        found.append((f"−{percent(equal['tokens_saved'])} %", "visual tokens at the best plain run's accuracy"))
    zooming = [line for line in task.runs if line.method in ("qzoom", "always") and line.difference is not None]
    if zooming:
        best = max(zooming, key=lambda line: line.accuracy)
        found.append((f"{100 * (best.difference or 0):+.1f}", "points: best zooming run against best plain run"))
    boxes = (
        f'<div class="card"><div class="big">{big}</div><div class=muted>{small}</div></div>' for big, small in found
    )
    return f'<div class="grid">{"".join(boxes)}</div>' if found else ""


def _table(task: TaskFigures) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(line)) + "</tr>" for line in task.runs
    )
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _gallery(run: str, cards: Sequence[Card]) -> str:
    if not cards:
        return ""
    parts = [f"<h3>Failures of “{html.escape(run)}”</h3>"]
    parts.append("<p class=muted>Orange: what was read, enlarged below the page. Green: where the answer stands.</p>")
    for kind, words in KINDS.items():
        own = [card for card in cards if card.kind == kind]
        if own:
            parts.append(f'<p><b>{words}</b></p><div class="grid gallery">{"".join(map(_card, own))}</div>')
    return "".join(parts)


def _card(card: Card) -> str:
    row = card.row
    said = row.error or row.prediction or "(nothing)"
    picture = (
        f'<img alt="{html.escape(row.picture, quote=True)}" src="data:image/jpeg;base64,{card.jpeg}">'
        if card.jpeg
        else f"<p class=muted>The picture {html.escape(row.picture)} is not at hand.</p>"
    )
    return (
        f'<figure class="card">{picture}<figcaption>{html.escape(row.question)}<br>'
        f'<b class="wrong">{html.escape(said)}</b> instead of <b>{html.escape(row.answer)}</b></figcaption></figure>'
    )


def _colours(methods: Sequence[str]) -> str:
    """Stroke and fill of every method, on light and on dark paper."""
    out = []
    for shade, frame in ((0, "{}"), (1, "@media (prefers-color-scheme:dark){{{}}}")):
        rules = []
        for method in methods:
            colour = colour_of(method, methods)[shade]
            rules.append(f".m-{method}{{stroke:{colour}}}.dot.m-{method}{{fill:{colour}}}.c-{method}{{color:{colour}}}")
        out.append(frame.format("".join(rules)))
    return "".join(out)


def _code(text: str) -> str:
    """Text with `words` as code."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
