"""The package of this folder, installed for these tests: its code and its entry point are found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.plugin.registry import registry

SOURCE = Path(__file__).parent / "tunesmith-growth" / "src"


@pytest.fixture(autouse=True, scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put the package and its metadata on the path, as pip would, and take them off again."""
    site = tmp_path_factory.mktemp("site")
    info = site / "tunesmith_growth-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tunesmith-growth\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tunesmith]\ngrowth = tunesmith_growth.plugin\n")
    added = [str(site), str(SOURCE)]
    sys.path[:0] = added
    registry.cache_clear()
    yield
    for each in added:
        sys.path.remove(each)
    registry.cache_clear()
