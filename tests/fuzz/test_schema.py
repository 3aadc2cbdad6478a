"""Every operation of the server's own description (`/openapi.json`), with what it allows and with what it does not."""

import re
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.fuzz import http_bodies

EXAMPLES = 100  # of each operation and of each kind
ENDING = ("/shutdown", "/pause", "/sleep")  # operations that do what their name says


@pytest.mark.slow
@pytest.mark.serving
@pytest.mark.timeout(3000)
def test_no_operation_fails() -> None:
    faults: list[str] = []
    asked = operations = 0

    def check(case: Any) -> None:
        nonlocal asked
        asked += 1
        response = case.call(base_url=server.url, timeout=http_bodies.SECONDS)
        if response.status_code >= 500 and response.status_code != 501:  # 501: not offered for this model
            sent = response.request.body or b""
            body = sent.decode(errors="replace") if isinstance(sent, bytes) else str(sent)
            known = any(
                re.search(answer, response.text) and re.search(cause, body) for answer, cause in http_bodies.KNOWN
            )
            if not known:
                faults.append(
                    f"{response.status_code} {response.text[:300]} for {case.method} {case.path} {body[:500]}"
                )

    with http_bodies.server() as server:
        before = http_bodies.answer(server)
        description = httpx.get(f"{server.url}/openapi.json", timeout=http_bodies.SECONDS).json()
        for found in schemathesis.openapi.from_dict(description).get_all_operations():
            operation = found.ok()
            if operation.path.startswith(ENDING):
                continue
            operations += 1
            for mode in GenerationMode:
                cases = operation.as_strategy(generation_mode=mode)
                checked = settings(
                    max_examples=EXAMPLES,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )(given(cases)(check))
                try:
                    checked()
                except Exception as error:  # of an operation that takes nothing, nothing wrong can be made
                    if "Unsatisfiable" not in type(error).__name__ and "SkipTest" not in repr(type(error)):
                        raise
        assert http_bodies.answer(server) == before
    assert not faults, "\n".join(sorted(set(faults)))
    assert operations > 5 and asked > 10 * EXAMPLES
    print(f"{asked} requests to {operations} operations")
