"""A streamed chat with the server that `make serve` starts: `python examples/client.py "What is 12 + 7?"`."""

import sys

from openai import OpenAI


def main() -> None:
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    question = sys.argv[1] if len(sys.argv) > 1 else "What is 12 + 7?"
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=[{"role": "user", "content": question}], stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
