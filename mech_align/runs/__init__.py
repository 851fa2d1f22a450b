"""A folder per run: what was asked, what came out, tables, figures, findings, one report. Opens without torch."""

from mech_align.runs.folder import Run, load_run

__all__ = ["Run", "load_run"]
