"""Writes the package files of docs/plugins/*.md as `tunesmith plugins new` writes them.

    python tools/write_plugin_pages.py [--check]

A page says by a comment which one it shows: `<!-- tunesmith plugins new method zora -->`. With
`--check` nothing is written, and the status is 1 if a page shows another file than would be.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tunesmith.scaffold import source_of

PAGES = Path(__file__).parents[1] / "docs" / "plugins"
SHOWN = re.compile(
    r"(<!-- tunesmith plugins new (?P<kind>\w+) (?P<name>\w+) -->\n```python\n).*?(?=^```$)",
    re.DOTALL | re.MULTILINE,
)


def written(page: str) -> str:
    """Return a page with the files that it names."""
    return SHOWN.sub(lambda found: found[1] + source_of(found["kind"], found["name"]), page)


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them."""
    status = 0
    for path in sorted(PAGES.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if written(page) == page:
            continue
        if "--check" in arguments:
            print(f"{path.name}: shows another file than `tunesmith plugins new` writes")
            status = 1
        else:
            path.write_text(written(page), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
