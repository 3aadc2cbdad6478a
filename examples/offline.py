"""Offline generation: `python examples/offline.py [model]`."""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

DEMO = Path(__file__).parent / "demo" / "checkpoint"


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else str(DEMO), max_model_len=1024)
    questions = ["What is 12 + 7?", "What is the opposite of hot?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    for question, reply in zip(questions, llm.chat(chats, SamplingParams(temperature=0, max_tokens=32)), strict=True):
        print(f"{question} -> {reply.outputs[0].text}")


if __name__ == "__main__":
    main()
