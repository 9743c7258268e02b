"""Records as something people read: one HTML page, Markdown for a pull request, or CSV.

    records -> `runs`: the configurations they speak of, and which record belongs to which
            -> `sections`: a document of sentences, tables and plots (`content`)
            -> `page` | `markdown`

A document knows no markup and a writer knows no record, so that every figure is the same in both. Text in a document is plain; the
writers escape it. What is not in any record is never guessed: a figure reads "not measured", a section says which command fills it.
"""

from __future__ import annotations

from edgeml_report.markdown import to_csv, to_markdown
from edgeml_report.page import to_html
from edgeml_report.sections import document

__all__ = ["document", "to_csv", "to_html", "to_markdown"]
