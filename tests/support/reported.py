"""Records made by hand: small, of every kind a report shows, with figures that are easy to find again."""

from __future__ import annotations

from typing import Any

DEVICE = {
    "cpu": "Cortex-A76",
    "board": "Raspberry Pi 5 Model B Rev 1.0",
    "architecture": "aarch64",
    "processors": 4,
    "memory_bytes": 8 << 30,
    "kernel": "6.6.31",
    "python": "3.11.7",
    "onnxruntime": "1.22.0",
}
SMALL, FULL = "5a" * 32, "f0" * 32
DOMAINS = {
    "banking": (0.91, 4000),
    "finance": (0.84, 1200),
    "health": (0.78, 900),
    "law": (0.69, 240),
    "speech": (0.88, 2600),
    "tiny": (0.7, 12),
}


def interval(value: float, half: float, n: int, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n, **more}


def settings(kind: str, residency: str = "exact", share: int = 100, threads: int = 2, **more: Any) -> dict[str, Any]:
    slots = max(1, 138 * share // 100)
    return {
        "schema": 2,
        "kind": kind,
        "tool_version": "0.1.0",
        "bundle": "small.edgeml",
        "bundle_id": SMALL,
        "variant": None,
        "backend": "neon",
        "threads": threads,
        "memory": f"{share}%",
        "memory_budget_bytes": 4005888 + 3398144 + slots * 28672,
        "pinned_bytes": 4005888,
        "scratch_bytes": 3398144,
        "slots": slots,
        "slot_bytes": 28672,
        "pageable_pages": 138,
        "residency": residency,
        "graph_bytes": 2154923,
        "device": DEVICE,
        **more,
    }


def bench(p50: float = 0.0123, rounds: int = 200, **more: Any) -> dict[str, Any]:
    def spread(middle: float, many: bool) -> dict[str, Any]:
        found = {"min": 0.8, "p50": 1.0, "p90": 1.25, "p95": 1.4, "p99": 1.9, "max": 2.6}
        known = {key: middle * value if many or key != "p99" else None for key, value in found.items()}
        median = {"value": middle, "low": 0.97 * middle, "high": 1.04 * middle if many else None, "n": rounds}
        slowest = {"value": known["p99"], "low": 1.7 * middle, "high": None, "n": rounds} if many else None
        return known | {"p50_interval": median, "p99_interval": slowest}

    record = settings("bench", **more)
    misses = 39 * rounds * (138 - record["slots"]) // 138
    return record | {
        "task": "banking77",
        "workload": {"kind": "random", "tokens": 32},
        "rounds": rounds,
        "latency_s": spread(p50, rounds >= 100),
        "tokens_per_s": 32 / p50,
        "masked_share": 0.0 if record["residency"] == "exact" else 0.6,
        "hits": 39 * rounds - misses,
        "misses": misses,
        "page_in_bytes": misses * 28672,
        "page_wait_s": misses * 0.00007,
        "cold": {
            "rounds": 5,
            "latency_s": spread(3 * p50, False),
            "hits": 0,
            "misses": 195,
            "page_in_bytes": 195 * 28672,
            "page_wait_s": 0.01,
        },
        "peak_rss_bytes": record["memory_budget_bytes"] + (84 << 20),
        "throttled": False,
    }


def loaded() -> dict[str, Any]:
    """A workload whose requests overlap."""
    counts = {"requests": 400, "answered": 391, "refused": 6, "late": 3}
    return bench(0.021) | {
        "mix": counts | {"seconds": 20.0, "answered_per_s": 19.55, "offered_per_s": 20.0, "submitted_late_s": 0.004, "by_task": {}}
    }


def variant(name: str, loss: float, residency: str = "exact", share: int = 100) -> dict[str, Any]:
    domains = {}
    for place, (domain, (reference, n)) in enumerate(DOMAINS.items()):
        kept = 1.003 - loss * (place + 0.4)
        found = interval(kept, 0.3 / n**0.5, n, **({"near_clip": True} if domain == "law" and loss > 0.03 else {}))
        score = 0.05 + kept * (reference - 0.05)
        domains[domain] = {"score": score, "reference_score": reference, "chance": 0.05, "n": n, "retention": found if n >= 30 else None}
    own = settings("eval", residency, share)
    return {
        "name": name,
        "bundle_id": SMALL,
        "residency": residency,
        "memory_budget_bytes": own["memory_budget_bytes"],
        "tasks": {
            "clinic": {"domain": "health", "metric": "macro_f1", "n": 900, "chance": 0.05, "score": 0.78 - loss, "reference_score": 0.78},
            "tellers": {
                "domain": "banking",
                "metric": "accuracy",
                "n": 4000,
                "chance": 0.02,
                "score": 0.91 - loss / 2,
                "reference_score": 0.91,
            },
        },
        "mean": 0.80 - loss,
        "reference_mean": 0.80,
        "retention": interval(1.002 - 2.4 * loss, 0.004, 8952),
        "excluded": [],
        "domains": domains,
        "gg": interval(3 * loss - 0.004, 0.007, 8952),
        "unseen": ["law", "speech"],
        "why": None,
    }


def evaluation() -> dict[str, Any]:
    document = {
        "variants": [variant("exact", 0.001), variant("masked 50%", 0.012, "masked", 50), variant("masked 0%", 0.055, "masked", 0)],
        "dsi": interval(0.083, 0.021, 8952),
        "cdtr": interval(0.87, 0.03, 8952),
        "dsi_route": 0.31,
        "routed_choices": 120000,
        "transfer": {"domains": ["banking", "law"], "ratios": [[1.0, -0.2], [0.61, None]]},
        "excluded": ["mag_field"],
        "domains_seen": ["banking", "finance", "health"],
        "seed": 0,
    }
    return settings("eval") | {"eval": document}


def everything() -> list[dict[str, Any]]:
    return [
        bench(0.0123),
        bench(0.0171, share=50),
        bench(0.0315, share=0, rounds=60),
        bench(0.0118, residency="masked", share=50),
        bench(0.0098, residency="masked", share=0),
        evaluation(),
        profile(),
        routing(),
    ]


def kept() -> dict[str, Any]:
    """An evaluation of the reference itself and of half of its experts, which is nothing that could be timed."""
    itself, half = variant("full", 0.0), variant("half", 0.02) | {"experts_kept": "0.5", "kept_by": "usage"}
    document = {"variants": [itself, half], "reference": {"bundle_id": SMALL, "variant": None}, "dsi": None, "why": "no sets"}
    return settings("eval") | {"eval": document}


def profile() -> dict[str, Any]:
    events = [
        {"start_s": 0.002 * number, "end_s": 0.002 * number + 0.0007 + 0.0001 * (number % 5), "bytes": 28672, "page": number}
        for number in range(40)
        if number % 7
    ]
    sites = [
        {
            "name": f"layers.{layer}.moe",
            "expert_calls": [int(900 / (1 + (5 * expert + 3 * layer) % 23)) if expert != 7 else 0 for expert in range(23)],
        }
        for layer in range(6)
    ]
    return settings("profile", share=50) | {"profile": {"page_ins": events, "sites": sites}}


def routing() -> dict[str, Any]:
    srp = {str(m): interval(0.86 - 0.05 * place, 0.01, 160) for place, m in enumerate((4, 16, 64))}
    document = {
        "srp": srp,
        "srp_null": {"4": 0.61, "16": 0.5, "64": 0.42},
        "hit_rate": {"belady": [[1.0, 0.97], [2.0, 0.99]], "lru": [[1.0, 0.8], [2.0, 0.95]]},
        "advice": "Page: a quarter of the experts answers 92 % of the choices.",
    }
    return settings("routing") | {"routing": document}
