"""Structured output: whatever the model would say, it says it in the form that was asked for."""

import json
import re
from typing import Any

import pytest

from tests.features.service import Service

PROMPT = [40, 41, 42, 300, 301, 40, 41, 500, 42]
SUM = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 0, "maximum": 99},
        "words": {"type": "array", "items": {"enum": ["big", "small"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["sum", "words"],
    "additionalProperties": False,
}


def check_sum(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"sum", "words"}
    assert 0 <= value["sum"] <= 99
    assert 1 <= len(value["words"]) <= 3 and set(value["words"]) <= {"big", "small"}


@pytest.mark.representative
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 4, "n": 3}], ids=str)
@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        pytest.param({"regex": r"[0-9]{3}-[a-f]{2,4}"}, r"[0-9]{3}-[a-f]{2,4}", marks=pytest.mark.feature("regex")),
        pytest.param({"choice": ["forty-two", "seven"]}, r"forty-two|seven", marks=pytest.mark.feature("choice")),
        pytest.param(
            {"grammar": 'root ::= "(" root ")" | [0-9]'}, r"\(*[0-9]\)*", marks=pytest.mark.feature("grammar")
        ),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_constraint(service: Service, constraint: dict[str, Any], pattern: str, sampling: dict[str, Any]) -> None:
    options = {"max_tokens": 40, "ignore_eos": False, "structured_outputs": constraint, **sampling}
    if "grammar" in constraint:
        options["logit_bias"] = {str(service.tokenize("(")[0]): -5.0}  # or a random model may nest for ever
    for choice in service.complete(PROMPT, **options).choices:
        assert choice.finish_reason == "stop"
        assert re.fullmatch(pattern, choice.text), choice.text
        assert choice.text.count("(") == choice.text.count(")")


@pytest.mark.representative
@pytest.mark.feature("JSON schema")
def test_json_schema(service: Service) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SUM}}
    answer = service.chat("What is 12 + 7?", max_completion_tokens=80, response_format=form)
    check_sum(answer.choices[0].message.content)
    (choice,) = service.complete(PROMPT, max_tokens=80, ignore_eos=False, structured_outputs={"json": SUM}).choices
    check_sum(choice.text)
    stream = service.chat("What is 12 + 7?", max_completion_tokens=80, response_format=form, stream=True)
    check_sum("".join(chunk.choices[0].delta.content or "" for chunk in stream))


@pytest.mark.feature("JSON schema")
def test_json_schema_in_responses(service: Service) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "sum", "schema": SUM, "strict": True}}
    reply = service.client.responses.create(
        model="served", input="What is 12 + 7?", temperature=0, max_output_tokens=80, text=form
    )
    check_sum(reply.output_text)


@pytest.mark.feature("JSON object")
def test_json_object(service: Service) -> None:
    """Any object; a model that knows no JSON opens lists for ever, so quotes and braces are made likely."""
    bias = {str(service.tokenize(text)[0]): 4.0 for text in ('"', "}", "{")}
    form: Any = {"type": "json_object"}
    answer = service.chat("Hello", max_completion_tokens=120, response_format=form, logit_bias=bias, temperature=0)
    assert answer.choices[0].message.content.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.feature("structural tags")
def test_structural_tag(service: Service) -> None:
    """What follows a tag that the answer begins with has its form."""
    form = {"type": "tag", "begin": "<sum>", "content": {"type": "regex", "pattern": "[0-9]{2}"}, "end": "</sum>"}
    tag: Any = {"type": "structural_tag", "format": form}
    answer = service.chat("What is 12 + 7?", max_completion_tokens=40, response_format=tag)
    assert re.fullmatch("<sum>[0-9]{2}</sum>", answer.choices[0].message.content)
