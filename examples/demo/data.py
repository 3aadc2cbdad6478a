"""The demo's synthetic questions: seeded, split into training and held-out questions that share no prompt.

Every question is a fact (a sum of numbers up to 20, a product up to 10 x 10, an opposite, a plural, a spelling ...)
in one of several wordings. What is held out is the wording of a fact: training shows the fact in other words, and the
words with other facts.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import words as w

SEED = 20250


@dataclass(frozen=True)
class Example:
    """One question with its exact answer, and what it is about."""

    task: str
    about: str
    question: str
    answer: str


def normalise(question: str) -> str:
    """What makes two prompts the same: letters, digits and operators, whatever the case, spaces and closing marks."""
    return re.sub(r"[\s?.!=,]", "", question.lower())


ADD = [
    "What is {a} + {b}?", "{a} + {b} = ?", "{a} + {b}", "{a} plus {b}?", "Compute {a} + {b}.", "Add {a} and {b}.",
    "What is {a} plus {b}?", "What is the sum of {a} and {b}?", "Calculate {a} + {b}.", "How much is {a} + {b}?",
    "Tom has {a} apples and buys {b} more. How many apples does Tom have?",
    "There are {a} books in a box and {b} books in a bag. How many books are there?",
]  # fmt: skip
SUBTRACT = [
    "What is {a} - {b}?", "{a} - {b} = ?", "{a} - {b}", "{a} minus {b}?", "Compute {a} - {b}.",
    "Subtract {b} from {a}.", "What is {a} minus {b}?", "Take {b} away from {a}.", "Calculate {a} - {b}.",
    "How much is {a} - {b}?", "Anna has {a} coins and loses {b}. How many coins are left?",
]  # fmt: skip
TIMES = ["What is {q}?", "{q} = ?", "Compute {q}.", "Calculate {q}.", "How much is {q}?", "{q}"]


def facts() -> list[tuple[str, str, list[str], str]]:
    """Every fact: task, what it is about, its wordings, its answer."""
    found: list[tuple[str, str, list[str], str]] = []

    def table(task: str, entries: dict[str, str], *wordings: str) -> None:
        found.extend((task, x, [q.format(x=x) for q in wordings], answer) for x, answer in entries.items())

    for a in range(21):
        for b in range(21):
            found.append(("addition", f"{a}+{b}", [q.format(a=a, b=b) for q in ADD], str(a + b)))
            if a >= b:
                found.append(("subtraction", f"{a}-{b}", [q.format(a=a, b=b) for q in SUBTRACT], str(a - b)))
    pairs = [(a, b) for a in range(11) for b in range(11)]
    for a, b in pairs:
        signs = [f"{a} * {b}", f"{a} times {b}", f"{a} x {b}"]
        found.append(("multiplication", f"{a}*{b}", [t.format(q=q) for t in TIMES for q in signs], str(a * b)))
    both = w.OPPOSITES | {b: a for a, b in w.OPPOSITES.items() if b not in w.OPPOSITES and b != "light"}
    table("opposite", both, "What is the opposite of {x}?", "Opposite of {x}?", "Give me the opposite of {x}.",
          "Which word is the opposite of {x}?", "What is the opposite of the word {x}?")  # fmt: skip
    table("colour", w.COLOURS, "What colour is {x}?", "What color is {x}?", "Which colour is {x}?",
          "Tell me the colour of {x}.", "What is the colour of {x}?")  # fmt: skip
    table("plural", w.PLURALS, "What is the plural of {x}?", "Plural of {x}?", "Give me the plural of {x}.",
          "What is the plural of the word {x}?", "Write the plural of {x}.")  # fmt: skip
    table("capital", w.CAPITALS, "What is the capital of {x}?", "Capital of {x}?", "Which city is the capital of {x}?",
          "Name the capital of {x}.", "What is the capital city of {x}?")  # fmt: skip
    table("sound", w.SOUNDS, "What does a {x} say?", "What sound does a {x} make?", "Which sound does a {x} make?",
          "What is the sound of a {x}?")  # fmt: skip
    table("young", w.YOUNG, "What is a young {x} called?", "What is a baby {x} called?",
          "What do you call a young {x}?", "What do you call a baby {x}?")  # fmt: skip
    for kind, names in (("day", w.DAYS), ("month", w.MONTHS)):
        for word, step in (("after", 1), ("before", -1)):
            entries = {x: names[(i + step) % len(names)] for i, x in enumerate(names)}
            table(f"{kind} {word}", entries, f"Which {kind} comes {word} {{x}}?", f"What {kind} comes {word} {{x}}?",
                  f"What comes {word} {{x}}?", f"What is the {kind} {word} {{x}}?",
                  f"Name the {kind} {word} {{x}}.")  # fmt: skip
    table("spelling", {x: "-".join(x) for x in w.SPELL}, "Spell {x}.", "Spell the word {x}.", "How do you spell {x}?",
          "How is {x} spelled?")  # fmt: skip
    table("spelling backwards", {x: "-".join(x[::-1]) for x in w.SPELL}, "Spell {x} backwards.",
          "Spell the word {x} backwards.", "How do you spell {x} backwards?",
          "What is {x} spelled backwards?")  # fmt: skip
    table("letters", {x: str(len(x)) for x in w.SPELL}, "How many letters are in {x}?",
          "How many letters does {x} have?", "Count the letters in {x}.",
          "How many letters are in the word {x}?")  # fmt: skip
    return found


# Share of the training questions; the other tasks share the rest by their number of facts.
SHARES = {"addition": 0.25, "subtraction": 0.15, "multiplication": 0.15, "chat": 0.02}
HELD_OUT = 420


class Questions:
    """The split: `held_out` is a fixed list, `sample` draws training questions that share no prompt with it."""

    def __init__(self, seed: int = SEED) -> None:
        rng = random.Random(seed)
        every = facts()
        chosen = {i: rng.choice(every[i][2]) for i in rng.sample(range(len(every)), HELD_OUT)}
        held = {normalise(question) for question in chosen.values()}
        self.held_out = [Example(*every[i][:2], question, every[i][3]) for i, question in sorted(chosen.items())]
        self._facts: dict[str, list[tuple[str, list[str], str]]] = {}
        for task, about, wordings, answer in every:
            kept = [question for question in wordings if normalise(question) not in held]
            self._facts.setdefault(task, []).append((about, kept, answer))
        self._facts["chat"] = [("chat", wordings, answer) for answer, wordings in w.CHATS.items()]
        rest = {task: len(known) for task, known in self._facts.items() if task not in SHARES}
        left = 1 - sum(SHARES.values())
        shares = SHARES | {task: left * count / sum(rest.values()) for task, count in rest.items()}
        self._tasks, self._weights = list(shares), list(shares.values())

    def sample(self, rng: random.Random) -> Example:
        """One training question, sometimes written carelessly (no capital, no closing mark)."""
        task = rng.choices(self._tasks, self._weights)[0]
        about, wordings, answer = rng.choice(self._facts[task])
        question = rng.choice(wordings)
        if rng.random() < 0.1:
            question = question[0].lower() + question[1:]
            question = question.rstrip("?.") if rng.random() < 0.5 else question
        return Example(task, about, question, answer)

    def chats(self, seed: int, count: int) -> Iterator[tuple[str | None, list[Example]]]:
        """Training chats: a system message or None, and one to six turns (mostly one)."""
        rng = random.Random(seed)
        for _ in range(count):
            system = None
            if rng.random() < 0.35:
                system = w.SYSTEM_MESSAGES[0] if rng.random() < 0.7 else rng.choice(w.SYSTEM_MESSAGES)
            turns = 1 if rng.random() < 0.9 else rng.randint(2, 4)
            yield system, [self.sample(rng) for _ in range(turns)]

    def calibration(self, count: int = 128) -> Iterator[dict[str, list[dict[str, str]]]]:
        """Chats of one turn each, as `vllm-ms quantize --calibration` reads them: {"messages": [...]}."""
        for system, (turn, *_) in self.chats(SEED + 1, count):
            messages = [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
            yield {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}
