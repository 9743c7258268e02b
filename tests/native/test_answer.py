"""The example in C answers as the runtime in Python does: here under sanitizers, and as the SDK's program on an emulated processor.

This also runs every function of onnxruntime's C interface that examples/c/ort.h declares by its place: a wrong place is a crash.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import struct
import subprocess
from pathlib import Path

import pytest
import qemu

import edgeml
from edgeml.made import make_mixture
from edgeml.native import crc32c

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "models" / "multitask-text.edgeml"
#: `make test-c` compiles it, under the address and undefined-behaviour sanitizers.
HERE = ROOT / "build" / "test-address" / "answer"
THERE = ROOT / "dist" / "native-sdk" / "aarch64-linux" / "bin" / "answer"
#: What a manifest is damaged with.
PIECES = [b"", b'"', b"{", b"]", b"\\", b"9" * 12, b"\0", b"-1", b"[[", b'"tasks":']
TASK, TEXT = "banking77", "I lost my card yesterday, what can I do?"


def onnxruntime_in(site: Path) -> Path:
    found = next(iter(sorted((site / "onnxruntime" / "capi").glob("libonnxruntime.so.*"))), None)
    if found is None:
        pytest.skip("this onnxruntime package holds no libonnxruntime.so")
    return found


def arguments(site: Path, *rest: str | Path) -> list[str]:
    return [str(onnxruntime_in(site)), *map(str, rest)]


@pytest.fixture(scope="module")
def site() -> Path:
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


@pytest.fixture(scope="module")
def expected() -> tuple[list[str], str, float, int]:
    """Token ids, label, score and misses of the runtime in Python."""
    if not BUNDLE.exists():
        pytest.skip(f"{BUNDLE.name} is not here")
    with edgeml.open(BUNDLE, threads=1, memory="100%") as session:
        batch = session.preprocessor(session.task(TASK)).encode([TEXT], None)
        result = session.run(TASK, text=TEXT)
        return [str(token) for token in batch.ids[0]], str(result.labels[0]), float(result.scores.max()), result.counters.misses


def here(*command: str) -> subprocess.CompletedProcess[str]:
    if not qemu.is_newer(HERE, *qemu.C_SOURCES):
        pytest.skip("the C example of this source is not compiled (make test-c)")
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # onnxruntime keeps some things until the process ends
    return subprocess.run([str(HERE), *command], capture_output=True, text=True, check=False, env=environment)


def check(done: subprocess.CompletedProcess[str], label: str, score: float, kernels: str | None = None) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    answer = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert answer["label"] == label
    assert float(answer["score"]) == pytest.approx(score, abs=0.01)
    assert kernels in (None, answer["kernels"])
    return answer


@pytest.mark.parametrize("slots", ["0", "3"])
def test_it_answers_as_python_does_whatever_the_memory(slots: str, site: Path, expected: tuple[list[str], str, float, int]) -> None:
    ids, label, score, misses = expected
    answer = check(here(*arguments(site, BUNDLE, TASK, slots, *ids)), label, score)
    assert float(answer["score"]) == pytest.approx(score, abs=2e-6)
    assert int(answer["misses"]) >= misses
    assert int(answer["page_in_bytes"]) > 0


def test_wrong_use_and_damaged_files_are_one_sentence(site: Path, tmp_path: Path, expected: tuple[list[str], str, float, int]) -> None:
    ids = expected[0]
    broken = tmp_path / "broken.edgeml"
    broken.write_bytes(BUNDLE.read_bytes()[:-1])
    cases = [
        (2, "token id", [BUNDLE, TASK, "0", "12x"]),
        (3, "there is no task: nonsense", [BUNDLE, "nonsense", "0", *ids]),
        (3, "truncated", [broken, TASK, "0", *ids]),
        (3, "no such file", [tmp_path / "absent", TASK, "0", *ids]),
        (3, "outside its range", [BUNDLE, TASK, "0", "99999999"]),
    ]
    for code, sentence, rest in cases:
        done = here(*arguments(site, *rest))
        assert done.returncode == code, done.stderr
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
    done = here("/nowhere/libonnxruntime.so", str(BUNDLE), TASK, "0", *ids)
    assert done.returncode == 2
    assert "onnxruntime cannot be loaded" in done.stderr


@pytest.mark.parametrize(("cpu", "kernels"), [("cortex-a53", "neon"), ("cortex-a76", "neon-dotprod")])
def test_the_sdk_answers_on_an_emulated_processor(cpu: str, kernels: str, expected: tuple[list[str], str, float, int]) -> None:
    reason = qemu.missing()
    if reason is None and not qemu.is_newer(THERE, *qemu.C_SOURCES):
        reason = "dist/ has no native SDK of this source (make native-sdk)"
    if reason is not None:
        pytest.skip(reason)
    ids, label, score, _ = expected
    check(qemu.run(cpu, THERE, *arguments(qemu.SITE, BUNDLE, TASK, "0", *ids)), label, score, kernels)


def test_any_damaged_manifest_ends_in_a_sentence(tmp_path: Path, site: Path) -> None:
    """The example's JSON reader meets what no writer wrote: every run ends with an exit code, none with a sanitizer's report."""
    make_mixture(tmp_path / "m.edgeml")
    whole = (tmp_path / "m.edgeml").read_bytes()
    start, length = struct.unpack_from("<QQ", whole, 72)
    rng = random.Random(3)
    codes = set()
    for number in range(40):
        document = bytearray(whole[start : start + length])
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(length)
            document[place : place + rng.randint(0, 4)] = rng.choice(PIECES)
        if number == 0:
            document = document[: length // 2]
        header = bytearray(whole[:4096])
        struct.pack_into("<Q", header, 16, start + len(document))
        struct.pack_into("<Q32s", header, 80, len(document), hashlib.sha256(document).digest())
        struct.pack_into("<I", header, 120, crc32c(header[:120]))
        path = tmp_path / f"m{number}"
        path.write_bytes(header + whole[4096:start] + document)
        done = here(*arguments(site, path, "weather", "1", "5", "6", "7"))
        assert done.returncode in (0, 2, 3), done.stderr
        assert done.returncode == 0 or done.stderr.count("\n") == 1
        codes.add(done.returncode)
    assert 3 in codes
