"""`edgeml eval`: what variants of a model score on labelled data, what a reference says they lost, and where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from edgeml.bundle import Bundle
from edgeml.commands._eval_document import SHOWN, broken_gates, check_gates, document, routed
from edgeml.commands._eval_print import table
from edgeml.commands._eval_run import Images, Texts, routing_counts, run_variant
from edgeml.commands._eval_settings import Setting, checked, named_after, parse_also, parse_kept, specialised, unique
from edgeml.commands._options import Number, json_option, notes, progress, quiet_option, records_option, variant_options
from edgeml.data import SPLITS, Columns, TableData, TaskData, find_tasks
from edgeml.errors import DataError, QualityRefused, UsageError
from edgeml.evaluate import image_questions, match_images, match_tasks, seen_domains, tasks_of, text_question
from edgeml.image_data import ImageSet, find_image_sets
from edgeml.manifest import Manifest, load_manifest
from edgeml.measure import Timing, record
from edgeml.metrics import BOOTSTRAP_SEED
from edgeml.predictions import Predictions, Variant, variants_of
from edgeml.records import append, complete
from edgeml.session import RESIDENCIES, find_task
from edgeml.session import open as open_session
from edgeml.transfer import measure_transfer


@dataclass(frozen=True)
class _Asked:
    """What is evaluated on what: the variants, the rows, and the domains that each variant's making saw."""

    settings: Sequence[Setting]
    groups: Sequence[Texts | Images]
    skipped: Sequence[str]
    seen: dict[str, list[str] | None]


#: Options that a record repeats: which data, and which experts.
DATA = ("split", "limit", "tasks", "task", "text_column", "pair_column", "label_column")
EXPERTS = ("experts_kept", "kept_by", "kept_for", "specialise")


@click.command("eval")
@click.argument("bundle", type=click.Path(), required=False)
@click.option(
    "--data",
    type=click.Path(),
    help="DOMAIN/TASK/{train,test,...}.jsonl.gz with a task.json, or one task's folder; SET/{train,test,...}.npz with an image.json; "
    "or one .csv, .tsv or .jsonl file, with --task.",
)
@click.option("--split", default="test", show_default=True, type=click.Choice(SPLITS), help="The rows to evaluate.")
@click.option("--tasks", help="Only these, separated by commas: TASK, or DOMAIN/TASK (of images SET/TASK).")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many rows a task, the first ones.")
@click.option("--task", help="Of one file: the bundle's task that it has labelled texts of.")
@click.option("--text-column", default="text", show_default=True, help="Of one file: the column of texts.")
@click.option("--pair-column", default="text_pair", show_default=True, help="Of one file: the column of second texts.")
@click.option("--label-column", default="label", show_default=True, help="Of one file: the column of labels, names or numbers from 0.")
@click.option("--reference", type=click.Path(), help="A bundle to compare with: gives retention, and GG.")
@click.option(
    "--also",
    multiple=True,
    metavar="NAME[=BUNDLE][,KEY=VALUE]...",
    help="One more variant; may be repeated. Keys: memory, residency, experts-kept, kept-by, kept-for, variant.",
)
@variant_options
@click.option("--memory", help="Memory for weights: 64MiB, 1.5GB, 50%, auto (default, or EDGEML_MEMORY).")
@click.option(
    "--residency", default="exact", show_default=True, type=click.Choice(RESIDENCIES), help="Whether the budget may change answers."
)
@click.option("--threads", type=int, help="Threads to compute with (default: EDGEML_THREADS, or all processors).")
@click.option(
    "--experts-kept", default="all", metavar="all|none|SHARE", help="Measure with this share of each site's routed experts, say 0.5."
)
@click.option("--kept-by", default="usage", metavar="usage|random:SEED", help="How the kept experts are chosen.", show_default=True)
@click.option("--kept-for", metavar="DOMAIN[+DOMAIN]...", help="Keep the experts that these domains' tasks use most, for all tasks.")
@click.option(
    "--specialise",
    type=Number(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Also keep this share of the experts for each domain in turn: gives DSI and CDTR.",
)
@click.option(
    "--learn",
    is_flag=True,
    help="Also measure, under --memory, what each domain's resident set makes of the others' data, and keep it for stand-ins.",
)
@click.option("--domains-seen", metavar="DOMAIN,...", help="What making the variants saw, in place of what their provenance says.")
@click.option("--max-gap", type=Number(), metavar="SCORE", help="Exit with 1 if GG is surely above this, say 0.02 (2 points).")
@click.option("--min-retention", type=Number(), metavar="SHARE", help="Exit with 1 if retention is below this, say 0.97.")
@click.option("--seed", default=BOOTSTRAP_SEED, show_default=True, type=click.IntRange(0), help="Of the bootstrap behind the intervals.")
@click.option("--predictions", type=click.Path(), help="Write each answer to this file, and do not ask again for those it has.")
@click.option("--from-predictions", type=click.Path(), help="Score this file of --predictions; nothing is run.")
@records_option
@quiet_option
@json_option
def command(
    bundle: str | None, from_predictions: str | None, records_file: Path | None, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Scores of a bundle on labelled data, task by task, and of any number of variants beside a reference.

    \b
    Examples: edgeml eval model.edgeml --data data/text --tasks banking77,snips --reference full.edgeml
      edgeml eval model.edgeml --data data/text --reference full.edgeml --also quarter,residency=masked,memory=25% --max-gap 0.02
      edgeml eval model.edgeml --data data/text --specialise 0.25 --predictions answers.jsonl
      edgeml eval model.edgeml --data mine.csv --task mood --text-column review --label-column verdict
    """
    seen = None if options["domains_seen"] is None else [name.strip() for name in options["domains_seen"].split(",")]
    gates = {"max_gap": options["max_gap"], "min_retention": options["min_retention"]}
    if from_predictions is not None:
        if bundle is not None or any(options[key] for key in ("data", "predictions", "reference", "also", "specialise", "learn")):
            raise UsageError("--from-predictions scores what was answered: leave out the bundle, --data and what else is for running it")
        found = _rescored(Path(from_predictions), seen, gates, options["seed"])
        notes(["DSI_route is not told: routing is followed only where a model answers"] * (found["dsi"] is not None), quiet)
    elif bundle is None or options["data"] is None:
        raise UsageError("give a bundle and --data, or --from-predictions with the answers of an earlier run")
    else:
        found = _evaluated(bundle, seen, gates, options, quiet)
    click.echo(json.dumps(found, allow_nan=False) if as_json else "\n".join(table(found)))
    if records_file is not None:
        shown = {key: value for key, value in found.items() if key != "record"}
        rescored = {key: found["variants"][0][key] for key in SHOWN} | {"from_predictions": Path(from_predictions or "").name}
        settings = found["record"] or rescored
        append(records_file, complete("eval", settings, eval=shown))
    if refused := list(broken_gates(found, **gates)):
        raise QualityRefused("; ".join(refused))


def _rescored(path: Path, seen: Sequence[str] | None, gates: dict[str, float | None], seed: int) -> dict[str, Any]:
    with Predictions(path, writing=False) as predictions:
        variants = variants_of(predictions)
    if any(gate is not None for gate in gates.values()):
        domains = sorted({part.head["domain"] for part in variants[0].parts.values()})
        for one in variants:
            if one.role == "variant":
                check_gates(one.seen if seen is None else seen, domains, gates["max_gap"], any(v.role == "reference" for v in variants))
    found = document(variants, str(path), seed, seen)
    routed(found, None)
    return found | {"skipped": [], "record": None}


def _evaluated(
    bundle: str, seen: Sequence[str] | None, gates: dict[str, float | None], options: dict[str, Any], quiet: bool
) -> dict[str, Any]:
    asked = _asked(bundle, seen, options, quiet)
    domains = sorted({question.domain for group in asked.groups for question in group.questions})
    compared = any(setting.role == "reference" for setting in asked.settings)
    if any(gate is not None for gate in gates.values()):
        for setting in asked.settings:
            if setting.role == "variant":
                check_gates(asked.seen[setting.name], domains, gates["max_gap"], compared)
    # before the rest: what cannot be learned is told now, and what was is kept whatever comes
    learned = _learn(bundle, asked.groups, options["memory"], options["threads"], quiet) if options["learn"] else None
    variants: list[Variant] = []
    timings: list[Timing] = []
    with Predictions(None if options["predictions"] is None else Path(options["predictions"])) as predictions:
        for setting in asked.settings:
            variant, timing = run_variant(setting, asked.groups, predictions, asked.seen.get(setting.name), options["threads"], quiet)
            variants.append(variant)
            timings.append(timing)
    found = document(variants, bundle, options["seed"])
    routed(found, _counts(bundle, asked.groups, options["threads"], quiet) if options["specialise"] is not None else None)
    if learned is not None:
        found["learned"] = learned
    settings = {key: options[key] for key in (*DATA, *EXPERTS)}
    settings |= {"reference_bundle_id": None if found["reference"] is None else found["reference"]["bundle_id"]}
    return found | {"skipped": list(asked.skipped), "record": record(timings[0], dict(variants[0].settings) | settings, "eval")}


def _learn(bundle: str, groups: Sequence[Texts | Images], memory: str | None, threads: int | None, quiet: bool) -> dict[str, Any]:
    """Measure the transfer matrix under this budget and keep it where the runtime looks for it."""
    data = {group.question.name: group.rows for group in groups if isinstance(group, Texts)}
    with open_session(bundle, memory=memory, threads=threads) as session:
        rows = sum(map(len, data.values()))
        domains = len({session.task(name).domain for name in data})
        with progress(rows * (domains + 2), "learning", quiet) as tick:
            learned = measure_transfer(session, data, tick)
        place = session.residents.keep(learned)
        notes([f"what each domain's set makes of the others' data is kept in {place}"], quiet)
    return {"domains": list(learned.domains), "ratios": [list(row) for row in learned.ratios], "cdtr": learned.cdtr, "by": learned.by}


def _counts(bundle: str, groups: Sequence[Texts | Images], threads: int | None, quiet: bool) -> Any:
    """Routing counts, None where the bundle does not tell its choices."""
    try:
        return routing_counts(bundle, groups, threads, quiet)
    except UsageError as error:
        notes([f"DSI_route is not known: {error}"], quiet)
        return None


def _asked(bundle: str, seen: Sequence[str] | None, options: dict[str, Any], quiet: bool) -> _Asked:
    """Everything that can be wrong with the question is found here, before any weight is loaded."""
    kept = parse_kept(options["experts_kept"], options["kept_by"], options["kept_for"])
    wish = {key: options[key] for key in ("variant", "max_latency", "max_bytes", "min_score")}
    main = checked(Setting(named_after(bundle), bundle, options["memory"], options["residency"], kept, wish))
    settings = [main, *(parse_also(text, bundle) for text in options["also"])]
    manifest = _manifest(bundle)
    groups, skipped = _read(bundle, manifest, options)
    if Path(options["data"]).is_file():
        notes(["a file of rows has no training split, so chance is that of its own commonest label"], quiet)
    images = any(isinstance(group, Images) for group in groups)
    if images and (options["specialise"] is not None or options["learn"] or any(setting.kept is not None for setting in settings)):
        raise UsageError("--experts-kept, --specialise and --learn are for mixtures of experts; a network for images has none")
    if options["reference"] is not None:
        settings.append(Setting("reference", options["reference"], role="reference"))
    elif options["specialise"] is not None:
        settings.append(Setting("all experts", bundle, memory="100%", role="reference"))
    unique(settings)
    known = {bundle: manifest} | {setting.bundle: _manifest(setting.bundle) for setting in settings if setting.bundle != bundle}
    for path, other in known.items():
        _check_answers(path, other, manifest, groups, "the reference" if path == options["reference"] else "the variant's bundle")
    if options["specialise"] is not None:
        domains = sorted({question.domain for group in groups for question in group.questions})
        settings += specialised(bundle, options["specialise"], domains, all(site.shared for site in manifest.sites))
    domains_of = {question.name: question.domain for group in groups for question in group.questions}
    settings = [_used_by(setting, known[setting.bundle], domains_of) for setting in settings]
    reference = next((setting.bundle for setting in settings if setting.role == "reference"), None)
    return _Asked(
        settings, groups, skipped, {s.name: _seen(s, known, reference, seen, domains_of) for s in settings if s.role == "variant"}
    )


def _used_by(setting: Setting, manifest: Manifest, domains_of: dict[str, str]) -> Setting:
    """The setting with the tasks whose usage chooses the experts it keeps."""
    if setting.kept is None or not setting.kept.domains:
        return setting
    tasks = tuple(task for domain in setting.kept.domains for task in tasks_of(manifest, domain, domains_of))
    return replace(setting, kept=replace(setting.kept, used_by=tasks))


def _seen(
    setting: Setting, known: dict[str, Manifest], reference: str | None, given: Sequence[str] | None, domains_of: dict[str, str]
) -> list[str] | None:
    """The domains that making the variant from the reference saw: of kept experts of one bundle those whose usage chose them."""
    exporter = seen_domains(known[setting.bundle], given, domains_of)
    chosen = list(setting.kept.domains) if setting.kept is not None else []
    if given is not None or not chosen:
        return exporter
    return sorted(chosen) if setting.bundle == reference else sorted({*chosen, *(exporter or ())})


def _manifest(bundle: str) -> Manifest:
    with Bundle.open(bundle) as opened:
        return load_manifest(opened)


def _read(bundle: str, manifest: Manifest, options: dict[str, Any]) -> tuple[list[Texts | Images], list[str]]:
    """The rows to evaluate, and the names of tasks that the bundle does not answer."""
    data, split, limit = Path(options["data"]), options["split"], options["limit"]
    names = None if options["tasks"] is None else list(dict.fromkeys(name.strip() for name in options["tasks"].split(",")))
    if data.is_file():
        if names is not None:
            raise UsageError("--tasks goes with a data directory; with one file of rows it is --task")
        return [Texts(*text_question(_table(bundle, manifest, data, options), split, limit))], []
    if options["task"] is not None:
        raise UsageError("--task goes with one file of rows; with a data directory it is --tasks")
    if sets := find_image_sets(data):
        matched, skipped = match_images(_named(sets, names), manifest, bundle)
        groups: list[Texts | Images] = [Images(tasks, *image_questions(images, tasks, split, limit)) for images, tasks in matched]
        return groups, skipped
    tasks, skipped = match_tasks(find_tasks(data, names), manifest, bundle)
    return [Texts(*text_question(task, split, limit)) for task in tasks], skipped


def _table(bundle: str, manifest: Manifest, path: Path, options: dict[str, Any]) -> TaskData:
    if options["task"] is None:
        raise UsageError(f"{path} is one file of rows: say with --task which of the bundle's tasks they are of")
    task = find_task(manifest, options["task"], bundle)
    if task.kind != "classification" or not task.labels:
        raise UsageError(f"task '{task.name}' has no labels to compare with")
    columns = Columns(options["text_column"], options["pair_column"], options["label_column"])
    return TableData(task.name, task.domain, task.labels, task.metric or "accuracy", task.pair, None, path, columns)


def _named(sets: Sequence[ImageSet], names: Sequence[str] | None) -> list[ImageSet]:
    """The sets with the tasks that were named, TASK or SET/TASK."""
    if names is None:
        return list(sets)
    places = {name: [(s.path, t.name) for s in sets for t in s.tasks if name in (t.name, f"{s.name}/{t.name}")] for name in names}
    for name, found in places.items():
        if len(found) != 1:
            raise DataError(f"{len(found)} tasks of the image data are called '{name}', expected one")
    kept = {place for found in places.values() for place in found}
    asked = [replace(images, tasks=tuple(task for task in images.tasks if (images.path, task.name) in kept)) for images in sets]
    return [images for images in asked if images.tasks]


def _check_answers(path: str, manifest: Manifest, wanted: Manifest, groups: Sequence[Texts | Images], what: str) -> None:
    """Refuse a bundle that does not answer a task, or means something else by its labels than the one evaluated."""
    known, ours = ({task.name: task for task in one.tasks} for one in (manifest, wanted))
    for name in (question.name for group in groups for question in group.questions):
        task = known.get(name)
        if task is None:
            raise UsageError(f"{what} {path} has no task '{name}'; choose others with --tasks")
        if (task.kind, task.pair, task.labels) != (ours[name].kind, ours[name].pair, ours[name].labels):
            raise DataError(f"{what} {path} has a task '{name}' of another kind or with other labels, so scores cannot be compared")
