"""What a chat has besides text: templates, tools, reasoning. Grammars make small models say what parsers look for."""

import json
from typing import Any

import anthropic
import pytest

from tests.features.service import TERSE, Service

QUESTION = "What is 12 + 7?"
ADD: dict[str, Any] = {
    "name": "add",
    "description": "Adds two digits.",
    "parameters": {
        "type": "object",
        "properties": {name: {"type": "integer", "minimum": 0, "maximum": 9} for name in ("a", "b")},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": ADD}]
STRICT = [{"type": "function", "function": ADD | {"strict": True}}]  # arguments that keep to the schema
CALL = r'<tool_call>\{"name": "add", "arguments": \{"a": [0-9], "b": [0-9]\}\}</tool_call>'


def check_call(name: str, arguments: str) -> None:
    assert name == "add"
    values = json.loads(arguments)
    assert set(values) == {"a", "b"} and all(value in range(10) for value in values.values())


def rendered(service: Service, **options: Any) -> str:
    ids = service.post("/tokenize", {"model": "served", **options}).json()["tokens"]
    text: str = service.post("/detokenize", {"model": "served", "tokens": ids}).json()["prompt"]
    return text


@pytest.mark.representative
@pytest.mark.feature("chat templates")
def test_a_template_of_the_checkpoint_and_one_of_the_request(service: Service) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    begin = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
    assert rendered(service, messages=messages) == begin + "<|im_start|>assistant\n"
    thinking = {"chat_template_kwargs": {"thinking": True}}
    assert rendered(service, messages=messages, **thinking) == begin + "<|im_start|>assistant\n<think>"
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    options = {"chat_template": template, "ignore_eos": True, "return_token_ids": True}
    refused = service.post("/v1/chat/completions", {"model": "served", "messages": messages, **options})
    assert refused.status_code == 400 and "trust" in refused.json()["error"]["message"]
    prefix = [*messages, {"role": "assistant", "content": "The answer is"}]
    options = {"add_generation_prompt": False, "ignore_eos": True, "return_token_ids": True}
    answer = service.chat("", messages=prefix, extra_body=options)
    prompt = service.post("/tokenize", {"model": "served", "messages": prefix, "add_generation_prompt": False}).json()
    service.family.check_greedy(prompt["tokens"], answer.choices[0].token_ids)


@pytest.mark.representative
@pytest.mark.feature("tool calling: required and named")
@pytest.mark.parametrize("choice", ["required", "named"])
def test_tools_that_must_be_called(service: Service, choice: str) -> None:
    wanted: Any = "required" if choice == "required" else {"type": "function", "function": {"name": "add"}}
    options: dict[str, Any] = {"tools": STRICT, "tool_choice": wanted, "logit_bias": TERSE}
    options["max_completion_tokens"] = 80
    (call, *_) = service.chat(QUESTION, **options).choices[0].message.tool_calls
    check_call(call.function.name, call.function.arguments)
    name, arguments = "", ""
    for chunk in service.chat(QUESTION, stream=True, **options):
        for delta in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            if delta.index == 0:
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
    check_call(name, arguments)


@pytest.mark.representative
@pytest.mark.feature("tool calling: the model's choice")
def test_tools_that_may_be_called(service: Service) -> None:
    """A grammar stands for a model that was trained to call tools; the parser is hermes."""
    options: dict[str, Any] = {"tools": TOOLS, "max_completion_tokens": 80}
    body = {"extra_body": {"structured_outputs": {"regex": CALL}}}
    answer = service.chat(QUESTION, **options, **body).choices[0]
    assert answer.finish_reason == "tool_calls" and not answer.message.content
    (call,) = answer.message.tool_calls
    check_call(call.function.name, call.function.arguments)
    name, arguments = "", ""
    for chunk in service.chat(QUESTION, stream=True, **options, **body):
        for delta in chunk.choices[0].delta.tool_calls or []:
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    check_call(name, arguments)
    # The call and its result go back into the prompt.
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "19"},
    ]
    text = rendered(service, messages=messages, tools=TOOLS)
    assert '"name": "add"' in text and text.index("<tool_call>") < text.index("tool\n19")
    assert service.chat("", messages=messages, tools=TOOLS).choices[0].message.content is not None


@pytest.mark.feature("tool calling: the model's choice")
def test_no_tool_is_called_where_none_may_be(service: Service) -> None:
    answer = service.chat(QUESTION, tools=TOOLS, tool_choice="none").choices[0]
    assert not answer.message.tool_calls


@pytest.mark.feature("Anthropic Messages API")
def test_tools_and_forms_of_messages(service: Service) -> None:
    """A call and its result in the prompt, and an answer that has a form."""
    client = anthropic.Anthropic(base_url=service.server.url, api_key="none", timeout=120, max_retries=0)
    tool: Any = {"name": "add", "description": ADD["description"], "input_schema": ADD["parameters"]}
    use = {"type": "tool_use", "id": "call-1", "name": "add", "input": {"a": 7, "b": 9}}
    result = {"type": "tool_result", "tool_use_id": "call-1", "content": "16"}
    messages: Any = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    body = {"model": "served", "messages": messages, "tools": [tool], "max_tokens": 16}
    rendered_ids = service.post("/v1/messages/render", body).json()["token_ids"]
    text = service.post("/detokenize", {"model": "served", "tokens": rendered_ids}).json()["prompt"]
    assert '"name": "add"' in text and text.index("<tool_call>") < text.index("tool\n16")
    counted = client.messages.count_tokens(model="served", messages=messages, tools=[tool])
    assert counted.input_tokens == len(rendered_ids)
    form = {"format": {"type": "json_schema", "schema": ADD["parameters"]}}
    message = client.messages.create(
        model="served",
        max_tokens=60,
        messages=[{"role": "user", "content": QUESTION}],
        extra_body={"temperature": 0, "output_config": form},
    )
    (block,) = message.content
    assert block.type == "text"
    check_call("add", block.text)


@pytest.mark.feature("tool calling: required and named")
@pytest.mark.feature("Responses API")
def test_tools_of_responses(service: Service) -> None:
    tool: Any = {"type": "function", "strict": True, **ADD}
    reply = service.client.responses.create(
        model="served",
        input=QUESTION,
        temperature=0,
        max_output_tokens=80,
        tools=[tool],
        tool_choice="required",
        extra_body={"logit_bias": TERSE},
    )
    call = next(item for item in reply.output if item.type == "function_call")
    check_call(call.name, call.arguments)


@pytest.mark.representative
@pytest.mark.feature("reasoning parsers")
@pytest.mark.feature("thinking budget")
def test_reasoning_ends_at_its_budget_and_is_told_apart(service: Service) -> None:
    """These models never end it by themselves; what follows has the form that was asked for."""
    own: dict[str, Any] = {
        "chat_template_kwargs": {"thinking": True},
        "thinking_token_budget": 5,
        "return_token_ids": True,
        "structured_outputs": {"regex": "[0-9]{2}"},
    }
    options: dict[str, Any] = {"max_completion_tokens": 24, "logit_bias": {"1023": -100.0}}
    choice = service.chat(QUESTION, extra_body=own, **options).choices[0]
    end = choice.token_ids.index(1025)
    assert end == 5
    assert choice.message.content.isdecimal() and len(choice.message.content) == 2
    assert choice.message.reasoning
    reasoning, content = "", ""
    for chunk in service.chat(QUESTION, extra_body=own, stream=True, **options):
        if chunk.choices:
            reasoning += getattr(chunk.choices[0].delta, "reasoning", None) or ""
            content += chunk.choices[0].delta.content or ""
    # A random model may leave a character unfinished at the end, which a stream does not send.
    assert reasoning.rstrip("\ufffd") == choice.message.reasoning.rstrip("\ufffd")
    assert content == choice.message.content
