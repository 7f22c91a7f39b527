"""Blocks as one HTML file that needs nothing beside it: styles, plots and the graph are inside."""

from __future__ import annotations

import base64
import html as markup
import re

from posttrain.pipeline.visible import visible
from posttrain.report.blocks import Block, Bullets, Code, Figure, Graph, Heading, Notice, Sample, Table, Text
from posttrain.report.graph import svg

DIGEST = "posttrain-digest"
NUMBER = re.compile(r"(–|[\d,.]+( .*)?)$")
"""A cell that is a number, with or without a unit or an interval, or no number at all."""

STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1c;--paper:#fff;--soft:#5c5c5c;--line:#dcdcdc;--tint:#f5f6f8;--accent:#0072b2;
--warn:#fdf1e3;--warn-ink:#7a3d00}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--paper:#16181b;--soft:#a5a8ad;--line:#383c42;--tint:#1f2227;
--accent:#6cb8e6;--warn:#3a2a17;--warn-ink:#ffd9a8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:84rem;margin:0 auto;padding:1.25rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:.4rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.4rem 0 .7rem;padding-top:.9rem;border-top:1px solid var(--line)}
p,li{max-width:48rem;overflow-wrap:anywhere}ul{padding-left:1.2rem}li{margin:.25rem 0}
.notice{background:var(--warn);color:var(--warn-ink);padding:.7rem .9rem;border-radius:6px;white-space:pre-wrap;
max-width:48rem;overflow-wrap:anywhere}
figure{margin:1.2rem 0}.panels{display:flex;flex-wrap:wrap;gap:.6rem}
.panels img{display:block;flex:1 1 20rem;min-width:0;max-width:min(100%,36rem);height:auto;background:#fff;
border-radius:6px}
figcaption{color:var(--soft);font-size:.88rem;margin-top:.3rem;max-width:48rem}
.scroll{overflow-x:auto;margin:1rem 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .55rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;vertical-align:bottom;color:var(--soft)}th.n,td.n{text-align:right}td.n{white-space:nowrap}
th:first-child,td:first-child{position:sticky;left:0;background:var(--paper);min-width:7.5rem}
td.word{white-space:nowrap}
pre{background:var(--tint);padding:.8rem 1rem;border-radius:6px;overflow-x:auto;font-size:.88rem}
.sample{margin:1.4rem 0}.sample>p{font-weight:600;margin:0 0 .5rem}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.7rem}
.answers div{background:var(--tint);border-radius:6px;padding:.6rem .8rem;white-space:pre-wrap;overflow-wrap:anywhere;
font-size:.92rem}
.answers b{display:block;color:var(--accent);font-size:.8rem;margin-bottom:.25rem}
svg{max-width:none}svg text{fill:var(--ink);font:600 14px system-ui,-apple-system,"Segoe UI",sans-serif}
svg .soft{fill:var(--soft);font-weight:400;font-size:12px}svg path{fill:none;stroke-width:2}svg circle{stroke-width:2.5}
svg .failed text,svg .stopped text{fill:var(--warn-ink)}
"""


def escape(text: str) -> str:
    """Keep generated text from turning into markup."""
    return markup.escape(visible(text))


def render(title: str, blocks: list[Block], digest: str) -> str:
    """The whole document. `digest` names the inputs it was made of, see `read_digest`."""
    body = "\n".join(_block(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="{DIGEST}" content="{digest}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def read_digest(head: str) -> str | None:
    """The digest in the first lines of a rendered report, None when there is none."""
    _, found, rest = head.partition(f'<meta name="{DIGEST}" content="')
    return rest.partition('"')[0] if found else None


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Notice(text):
            return f'<p class="notice">{escape(text)}</p>'
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Table(header, rows):
            return _table(header, rows)
        case Figure(panels, caption):
            images = "".join(
                f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(name)}">'
                for name, png in panels
            )
            return f'<figure><div class="panels">{images}</div><figcaption>{escape(caption)}</figcaption></figure>'
        case Code(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Sample(prompt, answers):
            cards = "".join(f"<div><b>{escape(label)}</b>{escape(text)}</div>" for label, text in answers)
            return f'<section class="sample"><p>{escape(prompt)}</p><div class="answers">{cards}</div></section>'
        case Graph(nodes):
            return f'<div class="scroll">{svg(nodes)}</div>'


def _table(header: list[str], rows: list[list[str]]) -> str:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    marks = [' class="n"' if all(NUMBER.match(cell) for cell in column) else "" for column in columns]
    head = "".join(f'<th scope="col"{mark}>{escape(cell)}</th>' for mark, cell in zip(marks, header, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, marks, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(mark: str, text: str) -> str:
    mark = mark or ("" if " " in text else ' class="word"')
    return f"<td{mark}>{escape(text)}</td>"
