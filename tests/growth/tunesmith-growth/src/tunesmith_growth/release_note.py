"""A note that goes with a model: its figures, and the checksums that an earlier export has made."""

from __future__ import annotations

import attrs

from tunesmith.plugin.exporters import Exporter


@attrs.frozen(kw_only=True)
class ReleaseNoteConfig:
    """Options of `.export("release_note")`."""

    title: str = "A model"
    """Its first line."""


class ReleaseNote(Exporter[ReleaseNoteConfig]):
    """Writes NOTE.md beside nothing else: what it names is another step's."""

    reads_run = True

    def export(self, session, directory):
        """Return the note as the artefact "note". Errors: `RunError` where there are no sums."""
        sums = session.artefact("checksums")
        lines = [f"# {self.config.title}", ""]
        for stage, metrics in session.metrics.items():
            lines += [f"- {stage}: {name} {value:.4g}" for name, value in metrics.items()]
        lines += ["", *(f"    {line}" for line in sums.read_text(encoding="utf-8").splitlines())]
        (directory / "NOTE.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"note": directory / "NOTE.md"}
