"""One server of the demo checkpoint for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.servers import DEMO, Server, serve


@pytest.fixture(scope="session")
def demo() -> Iterator[Server]:
    with serve(DEMO, "--served-model-name", "demo", "--max-num-seqs", "32", "--max-logprobs", "20") as server:
        yield server
