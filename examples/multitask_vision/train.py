"""Train a reference from scratch: minutes on two cores, the same weights for the same seed, resumed where it was interrupted.

python train.py multi_fashion_mnist --data ../../../shared/data
python train.py camvid --data ../../../shared/data
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from edgeml_export.vision import fit
from edgeml_export.vision.data import VisionData, scores
from edgeml_export.vision.runner import in_batches
from model import REFERENCES, RUNS
from safetensors.torch import save_file

from edgeml.errors import EdgemlError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(REFERENCES))
    parser.add_argument("--data", type=Path, required=True, help="folder with images/NAME")
    parser.add_argument("--out", type=Path, default=RUNS, help="where the checkpoint goes")
    parser.add_argument("--epochs", type=int, help="instead of the reference's own number")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        train(given.name, given.data, given.out, given.epochs, given.seed)
    except EdgemlError as error:
        print(f"train: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def train(name: str, data: Path, out: Path, epochs: int | None, seed: int) -> None:
    """Train and write `out`/NAME.safetensors, with test scores in its metadata."""
    reference = REFERENCES[name]
    how = replace(reference.training, seed=seed, epochs=epochs or reference.training.epochs)
    found = VisionData.find(data, reference.image, reference.tasks)
    module = reference.network().to(memory_format=torch.channels_last)
    labels = {task: torch.from_numpy(values.astype(np.int64)) for task, values in found.train.labels.items()}
    out.mkdir(parents=True, exist_ok=True)
    model, start = reference.model(module, {}, {}), time.monotonic()

    def progress(epoch: int, loss: float) -> None:
        reached = scores(model.tasks, found.validation, in_batches(model.predict, found.validation.images))
        said = "  ".join(f"{task} {value:.4f}" for task, value in reached.items())
        print(f"epoch {epoch + 1}/{how.epochs}  loss {loss:.4f}  validation {said}  {time.monotonic() - start:.0f} s", flush=True)

    images = torch.from_numpy(found.train.images)
    fit(module, images, labels, model.losses, how, augment=model.augment, checkpoint=out / f"{name}.ckpt", progress=progress)
    reached = scores(model.tasks, found.test, in_batches(model.predict, found.test.images))
    state = {key: value.contiguous() for key, value in module.to(memory_format=torch.contiguous_format).state_dict().items()}
    save_file(state, out / f"{name}.safetensors", {"scores": json.dumps(reached)})
    print(f"test {json.dumps(reached)}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
