"""The demo's data, tokenizer and checkpoint are what their documents say."""

import json
import sys
from itertools import islice
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo"
CHECKPOINT = DEMO / "checkpoint"

sys.path.insert(0, str(DEMO))
import data  # type: ignore[import-not-found]  # noqa: E402
import train  # type: ignore[import-not-found]  # noqa: E402

sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def questions() -> data.Questions:
    return data.Questions()


@pytest.fixture(scope="module")
def claim() -> dict:
    return json.loads((DEMO / "accuracy.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


def held_out() -> list[dict]:
    return [json.loads(line) for line in (DEMO / "heldout.jsonl").read_text().splitlines()]


def test_held_out_file_is_what_the_seed_gives(questions: data.Questions) -> None:
    expected = [{"question": e.question, "answer": e.answer, "task": e.task} for e in questions.held_out]
    assert held_out() == expected
    assert len({data.normalise(e.question) for e in questions.held_out}) == len(expected) >= 300


def test_training_never_shows_a_held_out_prompt(questions: data.Questions, claim: dict) -> None:
    prompts = {data.normalise(e.question) for e in questions.held_out}
    seen = 0
    for chats, _ in islice(train.pools(questions, claim["seed"]), -(-claim["steps"] // train.POOL_STEPS)):
        for _, turns in chats:
            for e in turns:
                seen += 1
                assert data.normalise(e.question) not in prompts, e
    assert seen >= claim["steps"] * train.CHATS_PER_STEP


def test_data_is_right(questions: data.Questions) -> None:
    tasks = {e.task for e in questions.held_out}
    assert {"addition", "subtraction", "multiplication", "opposite"} <= tasks
    compute = {"addition": "+", "subtraction": "-", "multiplication": "*"}
    for e in questions.held_out:
        if e.task in compute:
            a, b = map(int, e.about.split(compute[e.task]))
            assert int(e.answer) == {"+": a + b, "-": a - b, "*": a * b}[compute[e.task]]
        if e.task == "spelling backwards":
            assert e.answer.split("-") == list(e.about[::-1])


@pytest.mark.parametrize(
    "text",
    ["What is 12 + 30?", "naïve 日本語 🎉 don't", "  two\n\n\tlines ", "s-p-e-l-l", "<|im_start|>user\nHi<|im_end|>\n"],
)
def test_tokenizer_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_calibration_file(questions: data.Questions) -> None:
    """It is the one that the code writes, and holds no question that the demo is examined with."""
    chats = [json.loads(line) for line in (DEMO / "calibration.jsonl").read_text().splitlines()]
    assert chats == list(questions.calibration())
    asked = {data.normalise(m["content"]) for chat in chats for m in chat["messages"] if m["role"] == "user"}
    assert not asked & {data.normalise(e.question) for e in questions.held_out}


def test_tokenizer_shape(tokenizer) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == train.VOCABULARY
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert tokenizer.convert_tokens_to_ids(train.SPECIALS) == [1021, 1022, 1023]
    assert tokenizer.eos_token == "<|im_end|>" and config["eos_token_id"] == tokenizer.eos_token_id


def test_chat_template(tokenizer, questions: data.Questions) -> None:
    user = {"role": "user", "content": "What is 12 + 30?"}
    system = {"role": "system", "content": "You are a helpful assistant."}
    prompt = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == prompt
    with_system = tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
    assert with_system == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + prompt
    turns = questions.held_out[:3]
    chat = [system]
    for turn in turns:
        chat += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == train.chatml(system["content"], turns)


def test_only_answers_are_trained(tokenizer, questions: data.Questions) -> None:
    turns = questions.held_out[::100]
    ids = tokenizer(train.chatml("Answer the question.", turns))["input_ids"]
    start, end, assistant = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "assistant"])
    spans = train.answer_spans(ids, start, assistant, end)
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == [t.answer + "<|im_end|>" for t in turns]


def test_checkpoint_is_small_and_complete() -> None:
    names = {file.name for file in CHECKPOINT.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 8_000_000
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text())
    assert generation["do_sample"] is False and generation["temperature"] == 0.0


def test_claimed_accuracy(claim: dict) -> None:
    assert claim["questions"] == len(held_out())
    for measured in claim["exact_match"].values():
        assert min(measured.values()) >= 0.95


@pytest.mark.parametrize(
    ("label", "system"), [("no_system_message", None), ("helpful_assistant", "You are a helpful assistant.")]
)
def test_accuracy_is_the_claimed_one(tokenizer, claim: dict, label: str, system: str | None) -> None:
    """The whole held-out set, as a small sample may hold more than its share of misses; CPUs differ a little."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    asked = held_out()
    given = train.answers(model, tokenizer, [a["question"] for a in asked], system, batch=210)
    right = sum(answer == a["answer"] for a, answer in zip(asked, given, strict=True)) / len(asked)
    assert right >= 0.95
    assert right == pytest.approx(claim["exact_match"]["float32"][label], abs=0.01)
