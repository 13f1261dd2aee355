"""docs/reference.md is what the recipes' Structs say."""

import re
from pathlib import Path

from protocol.config.fields import leaf_fields
from protocol.config.reference import reference
from protocol.config.settings import PROGRAMS

PAGE = Path(__file__).parents[3] / "docs/reference.md"


def test_the_page_is_the_generated_one():
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "run: uv run python -m protocol.config.reference > docs/reference.md"
    )


def test_the_page_has_every_key_with_its_meaning_and_every_link_a_heading():
    text = reference()
    for cls in PROGRAMS:
        for path, field in leaf_fields(cls).items():
            assert any(
                line.startswith(f"| `{path}` | ") and field.description in line
                for line in text.splitlines()
            ), path
    headings = re.findall(r"(?m)^## (.+)$", text)
    anchors = {
        "".join(c for c in h if c.isalnum() or c in "- ").replace(" ", "-") for h in headings
    }
    assert len(anchors) == len(headings)
    assert set(re.findall(r"\(#([^)]+)\)", text)) == anchors - {"Programs"}
    assert "| `1e-06`; `2e-05` in launch/sft.py | Peak learning rate." in text
    assert "| `queue.max_staleness` | int, at least 0 | `1` | " in text
