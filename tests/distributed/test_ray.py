"""Ranks on two Ray nodes (ray_program.py), against torch models; bounds as in test_tensor_parallel.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.leftovers import none_left
from tests.distributed.rank_models import check, made
from tests.quantization.comparison import without_ties

PROGRAM = Path(__file__).with_name("ray_program.py")
LAYOUTS: dict[str, dict[str, Any]] = {"tp2": {"tensor_parallel_size": 2}, "pp2": {"pipeline_parallel_size": 2}}

pytest.importorskip("ray")


@pytest.mark.feature("Ray", families=["qwen2"])
@pytest.mark.parametrize("layout", ["tp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_ranks_on_two_nodes(layout: str, tmp_path: Path) -> None:
    model = made("qwen2", "float32", 2)
    prompts, answers = without_ties(model.model, model.margin)
    result = tmp_path / "result.npz"
    arguments = [str(model.folder), json.dumps(LAYOUTS[layout]), json.dumps(prompts), str(result)]
    output = tmp_path / "output"
    # An engine in this process may have set a limit for its own ones.
    inherited = {name: value for name, value in os.environ.items() if "OMP_NUM_THREADS" not in name}
    with none_left() as sessions, output.open("wb") as log:
        program = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=inherited | {"GLOO_SOCKET_IFNAME": "lo"},
            start_new_session=True,
        )
        sessions.append(program.pid)
        assert program.wait(150) == 0, output.read_text()[-6000:]
    with np.load(result) as arrays:
        ends = np.cumsum([len(prompt) - 1 for prompt in prompts])
        tokens, logprobs = arrays["tokens"].tolist(), np.split(arrays["logprobs"], ends[:-1])
    check(tokens, logprobs, answers, model.tolerance)
