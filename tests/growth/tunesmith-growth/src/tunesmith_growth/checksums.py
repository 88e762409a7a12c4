"""The checksums of a model's files: what a later export is built on."""

from __future__ import annotations

import hashlib

from tunesmith.plugin.exporters import Exporter
from tunesmith.plugin.options import NoOptions

FILE = "SHA256SUMS"


class Checksums(Exporter[NoOptions]):
    """Writes the SHA-256 of each file of the base that the run stands on."""

    def export(self, session, directory):
        """Return the file of sums as the artefact "checksums"."""
        lines = [
            f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
            for file in sorted(session.base.iterdir())
            if file.is_file()
        ]
        (directory / FILE).write_text("".join(lines), encoding="utf-8")
        return {"checksums": directory / FILE}
