"""Clients of a server under test, in a process of their own: `python -m tests.distributed.crowd URL`.

Each streams one long generation. A number on standard input lets that many enter; the answer is a line "answered" once
each of them has some tokens or has ended. At the end of the input all are awaited, and told about in a line of JSON.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx

LENGTH = 16000  # tokens that each asks for: minutes
ANSWERED = 5  # events of a client that is certainly being answered

BODY = {"model": "tiny", "prompt": [3, 5, 7], "max_tokens": LENGTH, "ignore_eos": True, "stream": True}
BODY |= {"stream_options": {"include_usage": True}}


@dataclass
class Outcome:
    """How a client's generation went."""

    events: int = 0  # with tokens
    finish: str | None = None  # the server's finish_reason
    tokens: int = 0  # that the server counts at the end of a whole answer
    error: str | None = None  # in the stream, as a status, or of the connection
    ended: float = 0.0  # time.monotonic(), the same clock in all processes

    def read(self, line: str) -> None:
        """One line of the stream."""
        if line.startswith("data: {"):
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self.error = json.dumps(event["error"])
            elif event["choices"]:
                self.events += 1
                self.finish = event["choices"][0]["finish_reason"] or self.finish
            else:
                self.tokens = event["usage"]["completion_tokens"]

    @property
    def whole(self) -> bool:
        """Whether the client has all that it asked for."""
        return self.finish == "length" and self.tokens == LENGTH

    @property
    def knows(self) -> bool:
        """Whether the client was told that its answer is not the whole one."""
        return self.error is not None or self.finish in ("abort", "error")


async def ask(client: httpx.AsyncClient, url: str, outcome: Outcome) -> None:
    """Stream a generation to its end, whatever that is."""
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=BODY) as response:
            if response.status_code != 200:
                outcome.error = f"{response.status_code} {(await response.aread()).decode(errors='replace')}"
                return
            async for line in response.aiter_lines():
                outcome.read(line)
    except httpx.HTTPError as error:
        outcome.error = repr(error)
    finally:
        outcome.ended = time.monotonic()


async def main(url: str) -> None:
    outcomes: list[Outcome] = []
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        tasks = []
        while line := await asyncio.to_thread(sys.stdin.readline):
            newcomers = [Outcome() for _ in range(int(line))]
            outcomes += newcomers
            tasks += [asyncio.create_task(ask(client, url, outcome)) for outcome in newcomers]
            while any(outcome.events < ANSWERED and not outcome.ended for outcome in newcomers):
                await asyncio.sleep(0.05)
            print("answered", flush=True)
        await asyncio.gather(*tasks)
    print(json.dumps([asdict(outcome) for outcome in outcomes]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
