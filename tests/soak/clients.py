"""Clients that ask, stream, break off and come back, for a time; every answer that is whole is compared."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp

from tests.soak.questions import Question

WAIT = 120.0  # seconds for one answer


@dataclass
class Outcomes:
    """How many requests ended in which way, how many tokens were right, and the first few faults in words."""

    counts: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        self.counts["fault"] += 1
        if len(self.faults) < 20:
            self.faults.append(text)


async def load(url: str, questions: Sequence[Question], clients: int, seconds: float, seed: int) -> Outcomes:
    """That many clients for `seconds`; returns when the last of them has its answer."""
    outcomes = Outcomes()
    end = time.monotonic() + seconds
    timeout, connector = aiohttp.ClientTimeout(total=WAIT), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def client(rng: Random) -> None:
            while time.monotonic() < end:
                try:
                    await _one(session, url, rng, rng.choice(questions), outcomes)
                except (aiohttp.ClientError, TimeoutError) as error:
                    outcomes.fault(repr(error))
                await asyncio.sleep(rng.choice((0, 0, 0.01, 0.2)))

        await asyncio.gather(*(client(Random(f"{seed} {number}")) for number in range(clients)))
    return outcomes


async def _one(session: aiohttp.ClientSession, url: str, rng: Random, asked: Question, outcomes: Outcomes) -> None:
    kind = rng.choice(("whole", "whole", "whole", "streamed", "streamed", "broken off", "given up", "sampled"))
    body: dict[str, Any] = {"model": asked.model, "prompt": asked.prompt, "max_tokens": len(asked.answer)}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    if kind == "sampled":
        body |= {"temperature": 1.5, "seed": rng.randrange(2**31), "top_k": rng.choice((0, 5)), "logprobs": 3}
    if kind in ("streamed", "broken off"):
        body |= {"stream": True}
    asking = session.post(f"{url}/v1/completions", json=body)
    if kind == "given up":
        try:
            async with asyncio.timeout(rng.choice((0.001, 0.02, 0.1))), asking as response:
                await response.read()
        except TimeoutError:
            pass
        outcomes.counts[kind] += 1
        return
    async with asking as response:
        if response.status != 200:
            outcomes.fault(f"{response.status} {(await response.text())[:300]}")
        elif kind == "broken off":
            await _tokens(response, rng.randrange(len(asked.answer)))
            response.close()
            outcomes.counts[kind] += 1
        else:
            streamed = kind == "streamed"
            found = await _tokens(response) if streamed else (await response.json())["choices"][0]["token_ids"]
            if kind == "sampled":
                right = len(found) == len(asked.answer)
            else:
                right = found == asked.answer
            if right:
                outcomes.counts[kind] += 1
                outcomes.tokens += len(found)
            else:
                outcomes.fault(f"{kind}, {asked.model}, prompt {asked.prompt}: {found}, where {asked.answer} is right")


async def _tokens(response: aiohttp.ClientResponse, most: int | None = None) -> list[int]:
    """Of a stream, up to its end or until there are `most`."""
    found: list[int] = []
    while (most is None or len(found) < most) and (line := await response.content.readline()):
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise aiohttp.ClientError(f"in a stream: {event['error']}")
            for choice in event["choices"]:
                found += choice["token_ids"] or []
    return found
