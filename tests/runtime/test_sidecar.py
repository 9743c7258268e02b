"""The sidecar: what is saved comes back and adds up; and one test for each way in which a file can be wrong."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.bundle import Bundle
from edgeml.errors import DeviceError, InputError, UsageError
from edgeml.manifest import Manifest, load_manifest
from edgeml.resident import Transfer
from edgeml.sidecar import SIZE_LIMIT, Learned, load, place_of, save

TEXTS = ["a warm and sunny day by the sea"] * 40


@pytest.fixture
def manifest(toy: Path) -> Manifest:
    with Bundle.open(toy) as bundle:
        return load_manifest(bundle)


ID = "ab" * 32


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "edgeml-test.usage"


def seen(manifest: Manifest, tokens: int = 10) -> Learned:
    learned = Learned()
    ids = np.tile(np.array([[[0, 1], [2, 3]]], np.int64), (tokens, 1, 1))
    learned.task(manifest, "weather").watched.add(ids)
    learned.task(manifest, "weather").segment(0.25)
    learned.reading.add(1000, 0.5)
    learned.computing.add(tokens, 2)
    return learned


def rewrite(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the JSON in place, under a fitting checksum."""
    document = json.loads(place.read_bytes().partition(b"\n")[2])
    change(document)
    body = json.dumps(document).encode()
    place.write_bytes(b"edgeml usage 1 " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


# ---- what is saved comes back ----


def test_what_is_saved_comes_back(manifest: Manifest, place: Path) -> None:
    save(place, ID, manifest, seen(manifest))
    learned, problem = load(place, ID, manifest)
    assert problem is None
    assert learned is not None
    task = learned.tasks["weather"]
    assert (task.watched.tokens, task.distances) == (10, [0.25])
    assert task.watched.choices[1].tolist() == [0, 0, 10, 10, 0, 0, 0, 0]
    assert (learned.reading.rate, learned.computing.rate) == (2000, 5)
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_saving_adds_to_what_another_process_saved(manifest: Manifest, place: Path) -> None:
    save(place, ID, manifest, seen(manifest))
    save(place, ID, manifest, seen(manifest, 5))
    learned, _ = load(place, ID, manifest)
    assert learned is not None
    assert learned.tasks["weather"].watched.tokens == 15
    assert learned.tasks["weather"].distances == [0.25, 0.25]
    assert learned.reading.amount == 2000


def test_equal_content_gives_equal_bytes(manifest: Manifest, place: Path) -> None:
    save(place, ID, manifest, seen(manifest))
    first = place.read_bytes()
    place.unlink()
    save(place, ID, manifest, seen(manifest))
    assert place.read_bytes() == first


def test_no_file_is_nothing_learned(manifest: Manifest, place: Path) -> None:
    learned, problem = load(place, ID, manifest)
    assert problem is None
    assert learned == Learned()


def test_it_lies_beside_the_bundle_or_where_the_state_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "m.edgeml"
    name = f"edgeml-{ID[:32]}.usage"
    assert place_of(bundle, ID) == tmp_path / name
    (tmp_path / "state").mkdir()
    monkeypatch.setenv("EDGEML_STATE", str(tmp_path / "state"))
    assert place_of(bundle, ID) == tmp_path / "state" / name
    assert place_of(bundle, ID, str(tmp_path)) == tmp_path / name
    monkeypatch.setenv("EDGEML_STATE", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"EDGEML_STATE: .* is no folder"):
        place_of(bundle, ID)
    with pytest.raises(UsageError, match=r"^state: .* is no folder"):
        place_of(bundle, ID, str(tmp_path / "nowhere"))


# ---- files that are not ours ----


def test_one_of_another_bundle_is_refused_and_left_alone(manifest: Manifest, place: Path) -> None:
    save(place, ID, manifest, seen(manifest))
    before = place.read_bytes()
    learned, problem = load(place, "cd" * 32, manifest)
    assert learned is None
    assert problem is not None
    assert "usage of another bundle" in problem
    assert problem.count("\n") == 0
    with pytest.raises(InputError, match="another bundle"):
        save(place, "cd" * 32, manifest, seen(manifest))
    assert place.read_bytes() == before


def test_one_of_a_newer_edgeml_is_refused_and_left_alone(manifest: Manifest, place: Path) -> None:
    place.write_bytes(b"edgeml usage 2 whatever that means\n\0\1")
    learned, problem = load(place, ID, manifest)
    assert learned is None
    assert "install a newer edgeml-runtime" in str(problem)
    assert place.exists()


def test_a_pipe_or_a_folder_in_its_place_makes_nobody_wait(manifest: Manifest, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        learned, problem = load(tmp_path / name, ID, manifest)
        assert learned is None
        assert problem is not None
        assert (tmp_path / name).exists()


# ---- damaged files ----


def damaged(place: Path, manifest: Manifest, why: str) -> None:
    """It is reported with the reason, set aside, and a fresh one can be saved."""
    content = place.read_bytes()
    learned, problem = load(place, ID, manifest)
    assert learned == Learned()
    assert problem is not None
    assert why in problem
    assert "set aside as" in problem
    assert not place.exists()
    assert place.with_name(f"{place.name}.damaged").read_bytes() == content
    save(place, ID, manifest, seen(manifest))
    assert load(place, ID, manifest)[1] is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 5000, b"edgeml usage \n", b"edgeml usage x " + b"0" * 64 + b"\n{}", b"e" * 70000])
def test_rubbish(manifest: Manifest, place: Path, content: bytes) -> None:
    place.write_bytes(content)
    damaged(place, manifest, str(place))


def test_any_flipped_bit(manifest: Manifest, place: Path) -> None:
    save(place, ID, manifest, seen(manifest))
    content = place.read_bytes()
    for number in range(0, len(content), 7):
        spoiled = bytearray(content)
        spoiled[number] ^= 1
        place.write_bytes(spoiled)
        learned, problem = load(place, ID, manifest)
        assert problem is not None
        assert learned is None or learned == Learned()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut(manifest: Manifest, place: Path, share: float) -> None:
    save(place, ID, manifest, seen(manifest))
    place.write_bytes(place.read_bytes()[: int(share * place.stat().st_size)])
    damaged(place, manifest, str(place))


def test_one_larger_than_the_limit(manifest: Manifest, place: Path) -> None:
    place.touch()
    os.truncate(place, SIZE_LIMIT + 1)
    learned, problem = load(place, ID, manifest)
    assert learned == Learned()
    assert "larger than the limit" in str(problem)


Change = Callable[[dict[str, Any]], Any]
WEATHER = "weather"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d["tasks"].update(tide=d["tasks"][WEATHER]), "no task 'tide'"),
        (lambda d: d.update(extra=1), "expected an object of"),
        (lambda d: d.pop("reading"), "expected an object of"),
        (lambda d: d.update(tasks=[]), "tasks is no object"),
        (lambda d: d.update(reading=[1]), "reading is no list of 2"),
        (lambda d: d.update(reading=[1, -1]), "reading is no list of 2"),
        (lambda d: d.update(computing=["1", 2]), "computing is no list of 2"),
        (lambda d: d.update(computing=[1e300, 2]), "computing is no list of 2"),
        (lambda d: d["tasks"].update({WEATHER: 3}), "expected an object of"),
        (lambda d: d["tasks"][WEATHER].update(tokens=-1), "tokens is no list"),
        (lambda d: d["tasks"][WEATHER].update(tokens=True), "tokens is no list"),
        (lambda d: d["tasks"][WEATHER].update(choices=[]), "choices is no list of 2 sites"),
        (lambda d: d["tasks"][WEATHER]["choices"][0].pop(), "is no list of 8"),
        (lambda d: d["tasks"][WEATHER]["choices"][0].__setitem__(0, None), "is no list of 8"),
        (lambda d: d["tasks"][WEATHER]["choices"][0].__setitem__(0, 1e6), "more choices than its tokens"),
        (lambda d: d["tasks"][WEATHER].update(distances=[0.5] * 65), "at most 64"),
        (lambda d: d["tasks"][WEATHER].update(distances=[1.5]), "distances is no list"),
        (lambda d: d["tasks"][WEATHER].update(distances=0.5), "at most 64"),
    ],
)
def test_content_that_cannot_be(manifest: Manifest, place: Path, change: Change, why: str) -> None:
    save(place, ID, manifest, seen(manifest))
    rewrite(place, change)
    damaged(place, manifest, why)


@pytest.fixture
def divided(manifest: Manifest) -> Manifest:
    """The same tasks in domains of their own."""
    return dataclasses.replace(manifest, tasks=tuple(dataclasses.replace(task, domain=task.name) for task in manifest.tasks))


def transfer_of(manifest: Manifest) -> Transfer:
    first, second = ([expert.page for expert in site.experts] for site in manifest.sites[:2])
    table = ((0.9, 0.7), (0.5, 0.8))
    return Transfer(("mood", "weather"), (tuple(first[:3]), tuple(second[2:4])), table, (1.0, 0.9), (0.4, 0.5), (30, 40), "labels")


def test_a_transfer_matrix_comes_back_and_a_newer_one_takes_its_place(divided: Manifest, place: Path) -> None:
    measured = transfer_of(divided)
    save(place, ID, divided, Learned(transfer=measured))
    save(place, ID, divided, seen(divided))
    learned, problem = load(place, ID, divided)
    assert problem is None
    assert learned is not None
    assert learned.transfer == measured
    assert learned.tasks["weather"].watched.tokens == 10
    newer = dataclasses.replace(measured, baseline=None, by="agreement")
    save(place, ID, divided, Learned(transfer=newer))
    learned, _ = load(place, ID, divided)
    assert learned is not None
    assert learned.transfer == newer


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.update(extra=1), "transfer: expected an object of"),
        (lambda t: t.pop("by"), "transfer: expected an object of"),
        (lambda t: t.update(by="guess"), "by is labels or agreement"),
        (lambda t: t.update(by=[]), "by is labels or agreement"),
        (lambda t: t.update(domains="mood"), "domains is no list of 2 to 256 different names"),
        (lambda t: t.update(domains=["mood"]), "domains is no list of 2 to 256 different names"),
        (lambda t: t.update(domains=["mood"] * 2), "domains is no list of 2 to 256 different names"),
        (lambda t: t.update(domains=[f"d{n}" for n in range(257)]), "domains is no list of 2 to 256 different names"),
        (lambda t: t.update(domains=["mood", "tide"]), "about a domain that the bundle has not"),
        (lambda t: t.update(domains=["mood", ["weather"]]), "about a domain that the bundle has not"),
        (lambda t: t["sets"].pop(), "sets or scores is no list of 2 rows"),
        (lambda t: t.update(scores={}), "sets or scores is no list of 2 rows"),
        (lambda t: t["sets"].__setitem__(0, 3), "a set is no ascending list"),
        (lambda t: t["sets"][0].append(0), "a set is no ascending list"),
        (lambda t: t["sets"][0].append(10**6), "a set is no ascending list"),
        (lambda t: t["sets"][0].append(t["sets"][0][-1]), "a set is no ascending list"),
        (lambda t: t["sets"][0].__setitem__(0, True), "a set is no ascending list"),
        (lambda t: t["sets"][0].__setitem__(0, [1]), "a set is no ascending list"),
        (lambda t: t["scores"][1].append(0.5), "scores is no list of 2 numbers from 0 to 1"),
        (lambda t: t["scores"][1].__setitem__(0, 1.01), "scores is no list of 2 numbers from 0 to 1"),
        (lambda t: t["scores"][1].__setitem__(0, None), "scores is no list of 2 numbers from 0 to 1"),
        (lambda t: t["scores"].__setitem__(1, 0.5), "scores is no list of 2 numbers from 0 to 1"),
        (lambda t: t.update(reference=None), "scores is no list of 2 numbers from 0 to 1"),
        (lambda t: t.update(baseline=[0.5]), "scores is no list of 2 numbers from 0 to 1"),
        (lambda t: t.update(examples=[30, 1.5]), "examples are whole numbers"),
        (lambda t: t.update(examples=[30]), "examples is no list of 2 numbers"),
    ],
)
def test_a_transfer_matrix_that_cannot_be(divided: Manifest, place: Path, change: Change, why: str) -> None:
    save(place, ID, divided, Learned(transfer=transfer_of(divided)))
    rewrite(place, lambda document: change(document["transfer"]))
    damaged(place, divided, why)


@pytest.mark.parametrize("given", [3, [], "none", False])
def test_a_transfer_matrix_that_is_none(divided: Manifest, place: Path, given: Any) -> None:
    save(place, ID, divided, seen(divided))
    rewrite(place, lambda document: document.update(transfer=given))
    damaged(place, divided, "transfer: expected an object of")


@pytest.mark.parametrize("body", [b"[1]", b'{"bundle":1,"bundle":1}', b'{"bundle": NaN}', b"[" * 4000, b"\xff", b'{"a": 1e999}'])
def test_json_with_loopholes(manifest: Manifest, place: Path, body: bytes) -> None:
    place.write_bytes(b"edgeml usage 1 " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    damaged(place, manifest, str(place))


def test_a_folder_that_is_gone_and_a_disk_that_is_full(manifest: Manifest, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        save(place.parent / "nowhere" / "x.usage", ID, manifest, seen(manifest))
    save(place, ID, manifest, seen(manifest))
    before = place.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("edgeml.bundle_writer.os.fsync", full)
    with pytest.raises(DeviceError):
        save(place, ID, manifest, seen(manifest))
    assert place.read_bytes() == before
    assert [path.name for path in place.parent.iterdir()] == [place.name]


# ---- sessions ----


def test_no_damage_loses_an_answer(toy: Path, tmp_path: Path) -> None:
    with edgeml.open(toy) as session:
        wanted, identity = session.run("weather", texts=TEXTS).scores, session.bundle.id
    place = place_of(toy, identity, str(tmp_path))
    place.write_bytes(b"rubbish")
    with edgeml.open(toy, memory="50%", residency="hybrid", state=str(tmp_path)) as session:
        assert any("set aside" in note for note in session.notes)
        assert np.array_equal(session.run("weather", texts=TEXTS).scores, wanted)  # type: ignore[arg-type]
    assert load(place, identity, load_manifest_of(toy))[1] is None


def test_one_of_another_bundle_disturbs_nothing(toy: Path, tmp_path: Path, manifest: Manifest) -> None:
    with Bundle.open(toy) as bundle:
        place = place_of(toy, bundle.id, str(tmp_path))
    save(place, ID, manifest, seen(manifest))
    before = place.read_bytes()
    with edgeml.open(toy, memory="50%", residency="hybrid", state=str(tmp_path)) as session:
        assert sum("another bundle" in note for note in session.notes) == 1
        assert session.run("weather", texts=TEXTS).labels
    assert place.read_bytes() == before


def load_manifest_of(path: Path) -> Manifest:
    with Bundle.open(path) as bundle:
        return load_manifest(bundle)


def test_a_folder_that_cannot_be_written_costs_only_what_would_be_learned(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    monkeypatch.setattr("edgeml.residency.os.access", lambda *_: False)
    session = edgeml.open(toy, memory="50%", residency="hybrid", state=str(state))
    assert sum("cannot be written" in note for note in session.notes) == 1
    assert session.run("weather", texts=TEXTS).labels
    state.rmdir()
    session.close()
    assert "what was learned is not kept" in session.notes[-1]
