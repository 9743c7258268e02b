"""`edgeml report`: records as a page to read, as Markdown for a pull request, or as a table."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import click

from edgeml.bundle_writer import write_file
from edgeml.commands._options import json_option, notes, quiet_option
from edgeml.errors import InputError, UsageError
from edgeml.records import read
from edgeml_report import document, plots, to_csv, to_html, to_markdown
from edgeml_report.text import plural

WRITERS = {"html": to_html, "md": to_markdown, "csv": to_csv}


@click.command("report")
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="RECORDS...")
@click.option("-o", "--output", type=click.Path(), help="The file to write; without it, standard output.")
@click.option("--format", "kind", type=click.Choice(list(WRITERS)), help="How (default: as the file's name says, else html).")
@quiet_option
@json_option
def command(files: tuple[str, ...], output: str | None, kind: str | None, quiet: bool, as_json: bool) -> None:
    """How fast, how large, how much worse, where, and how sure: records of other commands on one page.

    RECORDS are files that `--records FILE` of bench, eval, profile, routing, diff or device wrote. The page needs no network and no
    other file. Its plots need matplotlib; without it the tables show the same figures.

    Example: edgeml report records.jsonl -o report.html
    """
    if as_json and output is None:
        raise UsageError("--json says what was written: name the file with -o")
    if output is not None and any(Path(file).resolve() == Path(output).resolve() for file in files):
        raise UsageError(f"{output} holds the records themselves: give the report another name")
    ending = Path(output or "").suffix.lower().lstrip(".")
    chosen = kind or {"markdown": "md"}.get(ending, ending if ending in WRITERS else "html")
    records = list(chain.from_iterable(read(Path(file)) for file in files))
    if not records:
        raise InputError(f"{files[0]} holds no records; `--records {files[0]}` of edgeml bench, eval or profile writes them")
    made = document(records)
    written = WRITERS[chosen](made).encode("utf-8")
    if output is None:
        click.echo(written, nl=False)
        return
    write_file(Path(output), [written])
    drawn = chosen == "html" and plots.available()
    missing = [section.title for section in made.sections if not section.filled]
    if as_json:
        found = {"output": output, "format": chosen, "bytes": len(written), "records": len(records), "plots": drawn, "missing": missing}
        click.echo(json.dumps(found))
        return
    if chosen == "html" and not drawn:
        notes(["plots are left out, the tables have their figures; pip install matplotlib for them"], quiet)
    if not quiet:
        click.echo(f"{output}: {plural(len(records), 'record')}" + (f"; not measured yet: {', '.join(missing)}" if missing else ""))
