"""`edgeml export --device` of the toy mixture: what is picked, what is refused, and what the refusal says, on a device of round figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgeml_export
import pytest
from edgeml_export.evidence import evaluate
from edgeml_export.fit import Sketch, Target, estimate, read_target
from edgeml_export.fit_mixture import plans
from edgeml_export.fit_tried import NothingFits, duration
from edgeml_export.model import Model
from edgeml_export.passes import Agree, Job, Verify, View
from edgeml_export.quantize import QuantizePlan
from edgeml_export.recipe import Recipe, parse_recipe

from edgeml import cli, native
from edgeml.bundle import Bundle
from edgeml.device import Figure, Profile, write_profile
from edgeml.errors import QualityRefused, UsageError
from edgeml.manifest import load_manifest
from edgeml.sizes import parse_bytes
from edgeml.store import plan_budget
from edgeml.variants import parse_seconds

pytestmark = pytest.mark.skipif(not hasattr(native, "Context"), reason="the extension is not built")

#: Fewer bits compute faster, a page takes 10 ms, and the process itself is nearly nothing: weights decide.
FIGURES = {
    "cpu.cores": 1, "memory.usable_bytes": 1 << 30, "memory.read_bytes_per_s": 1e12, "kernels.int4_macs_per_s": 4e8,
    "kernels.int8_macs_per_s": 2e8, "kernels.f32_macs_per_s": 1e8, "kernels.int4_stream_bytes_per_s": 1e12,
    "kernels.int8_stream_bytes_per_s": 1e12, "kernels.values_per_s": 1e12, "kernels.activations_per_s": 1e12,
    "graphs.matmul_macs_per_s": 1e12, "graphs.conv_macs_per_s": 1e9, "graphs.conv_int8_macs_per_s": 2e9, "graphs.values_per_s": 1e12,
    "graphs.node_s": 1e-8, "process.request_s": 1e-3, "process.bytes": 1 << 20, "process.bytes_per_tokenizer_byte": 0,
    "process.bytes_per_graph_byte": 0, "storage.4k_qd1_bytes_per_s": 4096e2, "storage.1m_qd1_bytes_per_s": (1 << 20) * 50,
}  # fmt: skip
MADE = Profile("made", "A made device", "aarch64", {key: Figure(float(value), "made for a test") for key, value in FIGURES.items()})
BITS = parse_recipe({"name": "bits", "pass": [{"kind": "quantize"}]}, "recipe")


def checked(router_agreement: float = 0.0, retention: float = 0.0) -> Recipe:
    """A recipe with a limit on routers and one on sets; its own set is of all experts."""
    steps: list[dict[str, Any]] = [{"kind": "quantize"}, {"kind": "usage", "rows": 20}]
    steps += [{"kind": "agree", "rows": 4, "min_router_agreement": router_agreement}]
    steps += [{"kind": "sets", "share": 1.0, "min_retention": retention}]
    return parse_recipe({"name": "checked", "pass": steps}, "recipe")


def export(model: Model, out: Path, recipe: Recipe = BITS, data: Path | None = None, **limits: Any) -> dict[str, Any]:
    bits = {key: limits.pop(key, None) for key in ("experts", "dense")}
    evidence = edgeml_export.export(model, out, recipe, data, **bits, target=Target(MADE, **limits))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    fit: dict[str, Any] = evidence["fit"]
    assert [one["chosen"] for one in fit["tried"]] == [False] * (len(fit["tried"]) - 1) + [True]
    return fit


def refusal(model: Model, out: Path, recipe: Recipe = BITS, data: Path | None = None, **limits: Any) -> NothingFits:
    out.write_bytes(b"earlier")
    bits = {key: limits.pop(key, None) for key in ("experts", "dense")}
    with pytest.raises(NothingFits) as refused:
        edgeml_export.export(model, out, recipe, data, **bits, target=Target(MADE, **limits))
    assert out.read_bytes() == b"earlier"
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return refused.value


@pytest.fixture(scope="module")
def table(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every plan, all in memory: what a latency that nothing keeps to makes it try."""
    document = refusal(model, tmp_path_factory.mktemp("all") / "m.edgeml", max_latency_s=1e-6).document
    assert [one["name"] for one in document["tried"]] == [f"experts {plan.experts}, dense {plan.dense}" for plan in plans(QuantizePlan())]
    return document


def figures(table: dict[str, Any]) -> list[tuple[str, float, float]]:
    return [(one["name"], one["latency_s"]["value"], one["peak_memory_bytes"]["value"]) for one in table["tried"]]


def test_plans_lose_bits_where_it_costs_least() -> None:
    order = [(plan.experts, plan.dense) for plan in plans(QuantizePlan())]
    assert order[0] == ("f32", "f32")
    assert order[-1] == ("int4", "int4")
    assert order.index(("int8", "int8")) < order.index(("int4", "f32")) < order.index(("f32", "int4"))
    assert [(plan.experts, plan.dense) for plan in plans(QuantizePlan(), "int4")] == [("int4", dense) for dense in ("f32", "int8", "int4")]
    assert plans(QuantizePlan(scales="largest"), "int8", "int8") == [QuantizePlan("int8", "int8", "int8", "int8", "largest")]


def test_without_a_need_no_bit_is_removed(model: Model, tmp_path: Path) -> None:
    fit = export(model, tmp_path / "m.edgeml", max_latency_s=1.0)
    assert len(fit["tried"]) == 1
    chosen = fit["tried"][0]
    assert (chosen["title"], chosen["memory"]) == ("experts f32, dense f32, all in memory", "100%")
    assert fit["run"] == {key: chosen[key] for key in ("name", "memory", "memory_budget_bytes", "residency")}
    with Bundle.open(tmp_path / "m.edgeml") as bundle:
        assert load_manifest(bundle).evidence["fit"] == json.loads(json.dumps(fit))


@pytest.mark.parametrize("ms", [9, 7.3, 4.5, 3.5])
def test_a_latency_picks_the_first_plan_that_keeps_to_it(ms: float, model: Model, table: dict[str, Any], tmp_path: Path) -> None:
    expected = next(name for name, latency, _ in figures(table) if latency <= ms / 1e3)
    fit = export(model, tmp_path / "m.edgeml", max_latency_s=ms / 1e3)
    assert fit["run"]["name"] == expected
    assert all(one["missed"] == ["latency"] for one in fit["tried"][:-1])


def test_a_part_held_by_the_command_line_keeps_its_bits(model: Model, tmp_path: Path) -> None:
    fit = export(model, tmp_path / "m.edgeml", experts="int4", max_latency_s=0.005)
    assert [one["name"] for one in fit["tried"]] == ["experts int4, dense f32", "experts int4, dense int8"]


def test_memory_that_does_not_hold_all_experts_pages_as_many_as_it_holds(model: Model, table: dict[str, Any], tmp_path: Path) -> None:
    whole, out = figures(table)[0][2], tmp_path / "m.edgeml"
    fit = export(model, out, max_memory_bytes=int(whole) - 1)
    chosen = fit["tried"][-1]
    assert (chosen["name"], chosen["residency"], chosen["pages_held"]) == ("experts f32, dense f32", "exact", 11)
    assert chosen["peak_memory_bytes"]["value"] <= whole - 1
    with Bundle.open(out) as bundle:
        budget = plan_budget(bundle, load_manifest(bundle), chosen["memory"], 1)
    assert (budget.pages, budget.total_bytes) == (11, chosen["memory_budget_bytes"])


def test_where_paging_is_too_slow_experts_are_masked_and_measured(model: Model, data: Path, table: dict[str, Any], tmp_path: Path) -> None:
    limits = {"experts": "f32", "dense": "f32", "max_memory_bytes": int(figures(table)[0][2]) - 100_000, "max_latency_s": 0.012}
    fit = export(model, tmp_path / "m.edgeml", checked(), data, **limits)
    paged, masked = fit["tried"][-2:]
    assert paged["missed"] == ["latency"]
    assert (masked["residency"], fit["run"]["residency"]) == ("masked", "masked")
    assert 0 < masked["pages_held"] < 12
    assert 0.3 < masked["usage_covered"] < 1
    assert masked["lost_points"] is not None
    assert masked["retention"] is not None
    assert fit["said"].endswith(f"on validation and retains {masked['retention']:.1%}")
    assert f"masked like that it loses {masked['lost_points']:.2f} points" in fit["said"]


def test_a_mask_that_loses_too_much_is_refused(
    model: Model, data: Path, table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy loses next to nothing by a mask, so its scores are taken down."""

    def worse(*given: Any, **options: Any) -> Any:
        assert (options["residency"], options["memory"][-1]) == ("masked", "%")
        return {name: {**task, "score": 0.9 * task["score"]} for name, task in evaluate(*given, **options).items()}

    monkeypatch.setattr("edgeml_export.fit_mixture.evaluate", worse)
    limits = {"experts": "f32", "dense": "f32", "max_memory_bytes": int(figures(table)[0][2]) - 100_000, "max_latency_s": 0.012}
    refused = refusal(model, tmp_path / "m.edgeml", checked(retention=0.99), data, **limits)
    last = refused.document["tried"][-1]
    assert last["retention"] < 0.99
    assert last["lost_points"] > 5
    assert last["refused"] == f"masked it retains {last['retention']:.1%}, and at least 99.0% is asked"
    assert f"experts f32, dense f32, masked to {last['pages_held']} of 12 would, but masked it retains" in str(refused)
    without_sets = Recipe("verified", (*checked().passes[:2], Verify(max_mean_drop=4.0, max_task_drop=50.0)))
    refused = refusal(model, tmp_path / "m.edgeml", without_sets, data, **limits)
    assert "would, but the mean score falls by" in str(refused)


def test_without_usage_nothing_is_masked_and_the_refusal_says_so(model: Model, table: dict[str, Any], tmp_path: Path) -> None:
    limits = {"experts": "f32", "dense": "f32", "max_memory_bytes": int(figures(table)[0][2]) - 100_000, "max_latency_s": 0.012}
    refused = refusal(model, tmp_path / "m.edgeml", **limits)
    assert {one["residency"] for one in refused.document["tried"]} == {"exact"}
    assert "experts could be masked if their usage were recorded: name the data with --data" in str(refused)


def test_a_limit_of_the_recipe_leads_to_the_next_candidate(model: Model, data: Path, table: dict[str, Any], tmp_path: Path) -> None:
    """Only 4 bits are fast enough, and routers then choose otherwise too often."""
    ms = figures(table)[-1][1] * 1.01
    refused = refusal(model, tmp_path / "m.edgeml", checked(router_agreement=1.0), data, max_latency_s=ms)
    last = refused.document["tried"][-1]
    assert last["missed"] == []
    assert "routers agree on" in last["refused"]
    assert "experts int4, dense int4, all in memory would, but routers agree on" in str(refused)
    assert "of the rest experts int8, dense int4" in str(refused)


def test_what_the_recipe_refuses_is_not_offered_under_other_limits(
    model: Model, data: Path, table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only f32 is good enough, and f32 is too large: more memory would help, and less memory for a refused plan would not."""

    def apply(_: Agree, job: Job, __: View | None) -> None:
        if (job.plan.experts, job.plan.dense) != ("f32", "f32"):
            raise QualityRefused("nothing was written: routers agree on too little")

    monkeypatch.setattr(Agree, "apply", apply)
    recipe = parse_recipe(
        {"name": "c", "pass": [{"kind": "quantize"}, {"kind": "agree", "rows": 4, "min_router_agreement": 0.0}]}, "recipe"
    )
    limit = int(figures(table)[0][2]) - 40_000
    refused = refusal(model, tmp_path / "m.edgeml", recipe, data, max_latency_s=0.011, max_memory_bytes=limit)
    would = refused.document["would_fit"]
    assert would["max_memory_bytes"] > limit
    assert "would not help" not in str(refused)
    fit = export(model, tmp_path / "m.edgeml", recipe, data, max_latency_s=0.011, max_memory_bytes=int(figures(table)[0][2]) + 1)
    assert fit["run"]["name"] == "experts f32, dense f32"


def test_the_refusal_names_what_is_missed_and_what_would_fit(model: Model, table: dict[str, Any], tmp_path: Path) -> None:
    fastest = min(latency for _, latency, _ in figures(table))
    refused = refusal(model, tmp_path / "m.edgeml", max_latency_s=fastest / 2)
    assert refused.exit_code == 1
    would = refused.document["would_fit"]
    assert fastest <= would["max_latency_s"] <= 1.1 * fastest
    assert would["max_memory_bytes"] is None
    assert f"above --max-latency {duration(fastest / 2)}" in str(refused)
    assert f"it would fit with --max-latency {duration(would['max_latency_s'])}" in str(refused)
    fit = export(model, tmp_path / "m.edgeml", max_latency_s=parse_seconds(duration(would["max_latency_s"])))
    assert fit["tried"][-1]["latency_s"]["value"] == pytest.approx(fastest)


def test_the_least_memory_that_is_named_is_enough_and_little_less_is_not(model: Model, tmp_path: Path) -> None:
    limits: dict[str, Any] = {"experts": "int8", "dense": "int8", "max_latency_s": 0.030}
    would = refusal(model, tmp_path / "m.edgeml", max_memory_bytes=1 << 20, **limits).document["would_fit"]
    assert would["max_latency_s"] is None
    fit = export(model, tmp_path / "m.edgeml", max_memory_bytes=would["max_memory_bytes"], **limits)
    assert fit["tried"][-1]["missed"] == []
    refusal(model, tmp_path / "m.edgeml", max_memory_bytes=would["max_memory_bytes"] - 2048, **limits)


def test_both_limits_are_named_where_one_alone_would_not_help(model: Model, tmp_path: Path) -> None:
    limits = {"max_latency_s": 0.001, "max_memory_bytes": 1 << 20}
    refused = refusal(model, tmp_path / "m.edgeml", dense="int4", experts="int4", **limits)
    would = refused.document["would_fit"]
    assert would["together"]
    assert f"with --max-latency {duration(would['max_latency_s'])} and --max-memory" in str(refused)
    wider = {"max_latency_s": would["max_latency_s"], "max_memory_bytes": would["max_memory_bytes"]}
    assert len(export(model, tmp_path / "m.edgeml", dense="int4", experts="int4", **wider)["tried"]) == 1


def test_confident_asks_it_of_the_whole_range(model: Model, table: dict[str, Any], tmp_path: Path) -> None:
    first = table["tried"][0]["latency_s"]
    between = (first["value"] + first["high"]) / 2
    assert len(export(model, tmp_path / "m.edgeml", max_latency_s=between)["tried"]) == 1
    fit = export(model, tmp_path / "m.edgeml", max_latency_s=between, confident=True)
    assert len(fit["tried"]) > 1
    assert fit["tried"][-1]["latency_s"]["high"] <= between


def test_confident_memory_keeps_the_high_end_below_the_limit(model: Model, table: dict[str, Any], tmp_path: Path) -> None:
    limit = int(table["tried"][0]["peak_memory_bytes"]["high"]) - 1
    fit = export(model, tmp_path / "m.edgeml", max_memory_bytes=limit, confident=True)
    assert fit["tried"][-1]["pages_held"] == 11
    assert fit["tried"][-1]["peak_memory_bytes"]["high"] <= limit


def test_the_prediction_is_that_of_device_predict(model: Model, tmp_path: Path) -> None:
    fit_bundle = pytest.importorskip("edgeml_devices.fit", reason="edgeml-devices is not installed").fit_bundle
    fit = export(model, tmp_path / "m.edgeml", max_latency_s=0.006)
    with Bundle.open(tmp_path / "m.edgeml") as bundle:
        manifest = load_manifest(bundle)
        options: dict[str, Any] = {"tokens": 16, "memory": fit["run"]["memory"]}
        found = [fit_bundle(bundle, manifest, MADE, task=task.name, **options).prediction for task in manifest.tasks]
    chosen = fit["tried"][-1]
    assert chosen["latency_s"]["value"] == pytest.approx(max(one.latency_s.value for one in found))
    assert chosen["peak_memory_bytes"]["value"] >= max(one.peak_memory_bytes.value for one in found)


def test_a_profile_is_checked_before_any_work(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeml_export.pipeline.assemble", lambda *_: pytest.fail("the work had begun"))
    for key in ("kernels.int8_macs_per_s", "graphs.node_s"):
        lacking = replace(MADE, figures={name: figure for name, figure in MADE.figures.items() if name != key})
        with pytest.raises(UsageError, match=f"does not say {key}"):
            edgeml_export.export(model, tmp_path / "m.edgeml", BITS, target=Target(lacking))
    unread = replace(MADE, figures={name: figure for name, figure in MADE.figures.items() if not name.startswith("storage")})
    with pytest.raises(UsageError, match="does not say storage"):
        edgeml_export.export(model, tmp_path / "m.edgeml", BITS, target=Target(unread))
    with pytest.raises(UsageError, match="--tokens 17: the model reads at most 16"):
        edgeml_export.export(model, tmp_path / "m.edgeml", BITS, target=Target(MADE, tokens=17))


def test_more_tokens_take_longer(model: Model, tmp_path: Path) -> None:
    edgeml_export.export(model, tmp_path / "m.edgeml", BITS)
    sketch = Sketch.read(tmp_path / "m.edgeml")
    few, many = (estimate(sketch, Target(MADE, tokens=tokens)) for tokens in (2, 16))
    assert few.latency.value < many.latency.value


@pytest.mark.parametrize(("seconds", "said"), [(0.143, "143ms"), (1.2345, "1.23s"), (0.99999, "1s"), (1e-7, "0.1us"), (2000, "2000s")])
def test_a_duration_is_written_as_it_is_read(seconds: float, said: str) -> None:
    assert duration(seconds) == said
    assert math.isclose(parse_seconds(said), seconds, rel_tol=0.01)


# ---- the command ----


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process: exit code, standard output, standard error."""
    monkeypatch.setitem(cli.COMMANDS, "export", ("edgeml_export.command", ""))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["export", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profile") / "made.toml"
    path.write_bytes(write_profile(MADE))
    return str(path)


def test_the_command_shows_what_it_tried_and_inspect_how_to_run_it(
    command: Any, source: str, made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.edgeml"
    code, said, notes = command(source, "-o", str(out), "--device", made, "--max-latency", "6ms", "--max-memory", "2MiB")
    assert (code, notes) == (0, "")
    lines = said.splitlines()
    assert lines[0] == "tried for A made device, within 6ms and in 2.0 MiB of memory:"
    assert lines[1].split() == ["candidate", "size", "latency", "ms", "memory", "MiB", "points", "lost", "verdict"]
    assert lines[2].endswith("too slow")
    chosen = next(line for line in lines if line.endswith("chosen"))
    assert chosen.startswith("experts int8, dense int8, all in memory")
    assert lines[-1].startswith("A made device: run it with --memory 100% --residency exact --threads 1, predicted 5.")
    assert cli.main(["inspect", str(out)]) == 0
    assert f"fitted to {lines[-1]}" in capsys.readouterr().out


def test_the_refusal_of_the_command_is_a_table_and_a_sentence(command: Any, source: str, made: str, tmp_path: Path) -> None:
    arguments = (source, "-o", str(tmp_path / "m.edgeml"), "--device", made, "--max-latency", "3ms", "--dense", "int4")
    code, said, error = command(*arguments)
    assert code == 1
    assert said.splitlines()[-1].endswith("too slow but for the low end")
    nearest = "experts int4, dense int4, all in memory is the nearest, with 3.29ms for task colour"
    assert error.startswith(f"edgeml: nothing was written, since nothing fits A made device: {nearest}")
    assert error.count("\n") == 1
    code, said, again = command(*arguments, "--json")
    document = json.loads(said)
    assert (code, again, document["bundle"]) == (1, error, None)
    assert document["fit"]["would_fit"]["max_latency_s"] == 0.0033
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--max-latency", "100ms"], 2, "--max-latency is about a device: name it with --device"),
        (["--max-memory", "1MiB"], 2, "--max-memory is about a device"),
        (["--confident"], 2, "--confident is about a device"),
        (["--device", "MADE", "--max-latency", "fast"], 2, "'fast' is not a duration: write 20ms"),
        (["--device", "MADE", "--max-latency", "0ms"], 2, "a limit of 0 refuses everything"),
        (["--device", "MADE", "--max-memory", "50%"], 2, "--max-memory is a size such as 512MiB, and not 50%"),
        (["--device", "none.toml"], 3, "none.toml: cannot be read"),
    ],
)
def test_a_wrong_option_is_one_sentence_before_torch(
    arguments: list[str], code: int, sentence: str, command: Any, made: str, tmp_path: Path
) -> None:
    arguments = [made if part == "MADE" else part for part in arguments]
    found, said, error = command("nowhere.py:f", "-o", str(tmp_path / "m.edgeml"), *arguments)
    assert (found, said) == (code, "")
    assert sentence in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_device_offers_the_nearest(command: Any, tmp_path: Path) -> None:
    pytest.importorskip("edgeml_devices", reason="edgeml-devices is not installed")
    code, _, error = command("nowhere.py:f", "-o", str(tmp_path / "m.edgeml"), "--device", "rasberry-pi4")
    assert code == 2
    assert "there is no device 'rasberry-pi4'; did you mean raspberry-pi-4" in error


def test_named_devices_have_what_an_export_needs() -> None:
    library = pytest.importorskip("edgeml_devices.library", reason="edgeml-devices is not installed")
    target = read_target("raspberry-pi-4", "100ms", "512MiB", None, False, True)
    assert target is not None
    assert (target.max_latency_s, target.memory_bytes) == (0.1, parse_bytes("512MiB"))
    from edgeml_export.fit import IMAGES, TEXTS

    for profile in library.profiles().values():
        Target(profile).check([*TEXTS, *IMAGES])
        Target(profile).check_reading()


def test_without_edgeml_devices_a_name_says_how_to_install_them(made: str) -> None:
    program = f"""
import sys
sys.modules["edgeml_devices"] = None
from edgeml.errors import QualityRefused, UsageError
from edgeml_export.fit import read_target
assert read_target({made!r}, None, None, None, False, True).profile.name == "made"
try:
    read_target("raspberry-pi-4", None, None, None, False, True)
except UsageError as error:
    print(error)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert "edgeml-devices, which is not installed: pip install 'edgeml-runtime[devices]' (from a checkout: ./devices)" in done.stdout
