"""Documentation that cannot drift: every command is in the README, and the commands it shows are run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from edgeml.cli import COMMANDS, main
from edgeml.made import TOY, make_mixture

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def shown() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    model = next(line.removeprefix("M=") for line in lines if line.startswith("M="))
    return [line.replace("$M", model) for line in lines if line.startswith("edgeml ")]


def test_every_command_is_in_the_readme() -> None:
    for name in COMMANDS:
        assert f"`edgeml {name}" in README, name


def test_the_readme_never_installs_somebody_elses_package() -> None:
    assert not re.search(r"pip install edgeml(?!-runtime)", README)


def test_the_readme_shows_commands() -> None:
    assert shown()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, with what the README says is a user's own: data for two tasks, a model's source, and its two exports."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("models", "examples"):
        (place / name).symlink_to(ROOT / name)
    for name in ("full.edgeml", "small.edgeml"):
        make_mixture(place / name)
    texts = ["a warm day", "rain and wind", "snow on the trees", "that was bad"]
    for name in ("weather", "mood"):
        task = place / "data" / "text" / "made" / name
        task.mkdir(parents=True)
        labels = list(TOY.tasks[name])
        (task / "task.json").write_text(json.dumps({"name": name, "domain": "made", "labels": labels, "metric": "accuracy"}))
        rows = [{"text": text, "label": number % len(labels)} for number, text in enumerate(texts * 3)]
        for split in ("train", "validation", "test"):
            (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(ROOT / "tests" / "export" / "toy_source.py", place / "source.py")
    for name in ("cnn.py", "vision_source.py"):
        shutil.copy(ROOT / "tests" / "export" / "vision_source.py", place / name)
    (place / "cnn.toml").write_text('[[variant]]\nmax_drop = 20\n[int8]\nwhen = "always"\nimages = 16\nmax_drop = 20\nmax_map_drop = 20\n')
    return place


def prepare_images(place: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and a photo for the lines about images, which run in order: the export writes what the others open."""
    pytest.importorskip("torch", reason="the extra `export` is not installed")
    pillow = pytest.importorskip("PIL.Image", reason="the extra `image` is not installed")
    if command == "export":
        monkeypatch.syspath_prepend(place)
        importlib.import_module("vision_source").write_data(place / "data")
    pillow.new("RGB", (40, 30), "grey").save(place / "photo.png")


@pytest.mark.parametrize("line", shown())
def test_commands_in_the_readme_run(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = shlex.split(line)[1:]
    if "cnn" in line:
        prepare_images(place, words[0], monkeypatch)
    elif words[0] == "export":
        pytest.importorskip("torch", reason="the extra `export` is not installed")
        monkeypatch.syspath_prepend(place)
        importlib.import_module("source").write_data(place / "toy")
        words[words.index("data/text")] = "toy"
        words[words.index("small.edgeml")] = "new.edgeml"  # `diff` compares two exports of one model: the made ones
    if "--compare" in words:
        words += ["--seconds", "1"]  # whatever it finds is right here
    assert main(words) == 0


def test_the_python_in_the_readme_runs(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"(?:`|^ {4})make ([a-z][a-z-]*)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_made_texts_are_of_the_model_that_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    """Enough rows for intervals in every domain, and the model answers most of them as they say."""
    assert (
        main(["eval", str(ROOT / "models" / "multitask-text.edgeml"), "--data", str(ROOT / "examples" / "texts"), "--json", "--quiet"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["skipped"] == []
    assert len(found["domains"]) == 6
    assert all(one["n"] >= 30 for one in found["domains"].values())
    assert found["mean"] > 0.8
