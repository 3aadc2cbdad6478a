"""`--profiler-config`: a trace in which each kernel has its name."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.features.service import Service

PROMPT = [(7 * i * i + 3) % 1000 for i in range(150)]  # read in chunks of 64
DENSE = {"embedding", "linear", "linear_split", "linear_gated", "rms_norm", "add_rms_norm", "rotary", "paged_attention"}
LATENT = {"embedding", "linear", "rms_norm", "experts", "choose_experts", "mla_attention", "write_latent"}


def traced(folder: Path) -> list[dict[str, Any]]:
    """The events of the worker's newest trace."""
    files = [file for file in folder.glob("*.pt.trace.json.gz") if "rank" in file.name]
    newest = max(files, key=lambda file: file.stat().st_mtime)
    events: list[dict[str, Any]] = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    return events


@pytest.mark.representative
@pytest.mark.feature("profiling")
@pytest.mark.feature("chunked prefill")
def test_a_trace_names_the_kernels(service: Service) -> None:
    before = service.tokens(PROMPT, max_tokens=6)
    assert service.post("/reset_prefix_cache", {}).status_code == 200
    assert service.post("/start_profile", {}).status_code == 200
    assert service.tokens(PROMPT, max_tokens=6) == before
    assert service.post("/stop_profile", {}).status_code == 200
    assert service.tokens(PROMPT, max_tokens=6) == before
    events = traced(service.traces)
    kernels = [event for event in events if str(event.get("name", "")).startswith("ms::")]
    counts = Counter(event["name"].removeprefix("ms::") for event in kernels)
    wanted = LATENT if service.family.name == "deepseek_v3" else DENSE
    if service.family.name in ("qwen3_moe", "mixtral"):
        wanted = (wanted - {"linear_gated"}) | {"experts", "choose_experts"}
    assert wanted <= set(counts), counts
    layers = service.family.model.config.num_hidden_layers
    attention = "mla_attention" if service.family.name == "deepseek_v3" else "paged_attention"
    steps = [
        event for event in events if re.match(r"execute_context_\d", str(event.get("name"))) and event["ph"] == "X"
    ]
    read = [
        re.match(r"execute_context_1\((\d+)\)", step["name"]) for step in sorted(steps, key=lambda step: step["ts"])
    ]
    assert [int(found[1]) for found in read if found] == [64, 64, 22]
    assert counts[attention] == (3 + 5) * layers
    assert all(event["dur"] >= 0 for event in kernels)
    tables = [file.read_text() for file in service.traces.glob("*rank0.profiler_out.txt")]
    assert any("ms::" in table for table in tables)
