"""What the report and the comparison share: style, the page around a body, points, tables."""

from collections.abc import Sequence
from html import escape
from typing import Any, cast

import msgspec

from launch.pages.charts import Points
from launch.run_folder.tail import number

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1000px;padding:0 1rem;
color:#111;background:#fff}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1rem}
figure{margin:0}figcaption{font-weight:600}figcaption span{font-weight:400;margin-left:.6em}
svg{width:100%;height:auto}svg text{font-size:11px;fill:#555}.grid{stroke:#e5e7eb}
polyline{stroke-width:1.6}
table{border-collapse:collapse;width:100%;table-layout:fixed}
td,th{border:1px solid #ddd;padding:.4em;vertical-align:top;text-align:left;
white-space:pre-wrap;overflow-wrap:anywhere}
"""


def page(title: str, body: str) -> str:
    """Return a page that references nothing outside itself; `body` is HTML, `title` text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def points(metrics: list[dict[str, Any]], key: str) -> Points:
    """Return the (step, value) points of a metric."""
    pairs = [(number(line, "step"), number(line, key)) for line in metrics]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], over: Sequence[str] = ()) -> str:
    """Return a table; non-empty headings in `over` span three columns each, empty ones one."""
    spans = "".join(f"<th{' colspan=3' if text else ''}>{escape(text)}</th>" for text in over)
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows
    )
    above = f"<tr>{spans}</tr>" if over else ""
    return f"<table>{above}<tr>{top}</tr>{body}</table>"


def prompt_text(prompt: object) -> str:
    """Return a prompt, a string or a list of messages, as text."""
    if isinstance(prompt, list):
        items = cast("list[object]", prompt)
        turns = [cast("dict[str, Any]", turn) for turn in items if isinstance(turn, dict)]
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
    return prompt if isinstance(prompt, str) else msgspec.json.encode(prompt).decode()


def only_content(answer: object) -> object:
    """Return the content of an answer that is a list of one message; any other as it is."""
    if not isinstance(answer, list):
        return answer
    messages = cast("list[Any]", answer)
    return messages[0].get("content") if len(messages) == 1 else messages
