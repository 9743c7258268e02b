"""Finding a task by its name, and saying what there is where the name is wrong."""

from __future__ import annotations

import difflib

from edgeml.errors import UsageError
from edgeml.manifest import ImageStages, Manifest, Task

__all__ = ["find_task", "takes"]

MOST_NAMED = 20


def find_task(manifest: Manifest, name: str, where: str) -> Task:
    """The task of that name. Raises `UsageError` listing those there are, the closest first."""
    names = [task.name for task in manifest.tasks]
    if name in names:
        return manifest.tasks[names.index(name)]
    if not names:
        raise UsageError(f"{where} answers no task")
    closest = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    listed = closest + [other for other in sorted(names) if other not in closest]
    more = f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    raise UsageError(f"{where} has no task {name!r:.80}; it has {', '.join(listed[:MOST_NAMED])}{more}")


def takes(task: Task) -> str:
    """What a task takes, for a sentence."""
    return "images" if isinstance(task.stages, ImageStages) else "texts, not images"
