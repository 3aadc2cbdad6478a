"""`vllm-ms doctor`: runs all checks and prints them."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from vllm_ms_models import memory
from vllm_ms_models.cli.doctor.environment import Finding, findings

if TYPE_CHECKING:
    from vllm_ms_models.cli.doctor.model import Verdict


def doctor(model: str | None, options: list[str], as_json: bool) -> int:
    """Prints what was found; 1 if anything is refused. `options` are those of `vllm serve`."""
    if "vllm" not in sys.modules:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its news are of a server's start
    here = list(findings())
    verdict = None
    if model is not None and not any(finding.problem for finding in here):
        from vllm_ms_models.cli.doctor.model import examine

        verdict = examine(model, options)
    problems = [finding.problem for finding in here if finding.problem]
    if as_json:
        content = {
            "environment": [asdict(finding) for finding in here],
            "model": None if verdict is None else verdict.as_dict(),
            "problems": [*problems, *(verdict.problems if verdict else [])],
        }
        print(json.dumps(content, indent=2))
    else:
        print("\n".join([*_here(here), *_model(model, verdict)]))
    return int(bool(problems) or (verdict is not None and not verdict.loads))


def size(count: int) -> str:
    """Bytes for people."""
    return memory.gib(count) if count >= memory.GIB else f"{count / 2**20:.2f} MiB"


def _columns(rows: list[tuple[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in rows)
    yield from (f"  {name.ljust(width)}  {value}" for name, value in rows)


def _here(found: list[Finding]) -> Iterator[str]:
    yield "This machine and installation"
    yield from _columns([(finding.name, finding.value) for finding in found])
    yield from (f"  refused: {finding.problem}" for finding in found if finding.problem)
    yield from (f"  note: {finding.warning}" for finding in found if finding.warning)


def _model(name: str | None, verdict: "Verdict | None") -> Iterator[str]:
    if name is None:
        return
    yield ""
    yield name
    if verdict is None:
        yield "  not looked at: nothing can be served before the above is put right."
        return
    yield from _columns(list(_rows(verdict)) or [("model", "not read")])
    yield from (f"  note: {note}" for note in verdict.notes)
    yield from (f"  refused: {' '.join(problem.split())}" for problem in verdict.problems)  # some have several lines
    yield "  It would load." if verdict.loads else "  It would not load."


def _rows(verdict: "Verdict") -> Iterator[tuple[str, str]]:
    if verdict.architecture is None:
        return
    yield "architecture", f"{verdict.architecture}, by {verdict.implementation}"
    if verdict.quantization is not None:
        schemes = "; ".join(f"{count} linears {scheme}" for scheme, count in verdict.schemes.items())
        yield "quantization", verdict.quantization + (f": {schemes}" if schemes else "")
    yield "dtype", f"{verdict.dtype} (--dtype)"
    yield "longest sequence", f"{verdict.max_model_len} tokens (--max-model-len)"
    yield "ranks", str(verdict.ranks)
    if verdict.weight_bytes:
        each = ", ".join(dict.fromkeys(map(size, verdict.weight_bytes)))
        yield "weights", f"{each} a rank, {size(sum(verdict.weight_bytes))} in all"
    if verdict.kv_bytes_per_token is not None:
        assert verdict.kv_cache_bytes is not None
        yield "KV cache", f"{verdict.kv_bytes_per_token} bytes a token and rank"
        yield (
            "room for",
            (
                f"{verdict.kv_cache_tokens} tokens in {size(verdict.kv_cache_bytes)} a rank, "
                f"{verdict.max_num_seqs} sequences at once (--max-num-seqs)"
            ),
        )
