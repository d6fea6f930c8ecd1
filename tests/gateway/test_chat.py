"""The model's chat template is applied in a process that cannot do harm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from gateway.chat import ChatTemplate
from gateway.errors import RequestError
from pagewire.runtime.errors import StartError
from tests.gateway.tiny_tokenizers import TEMPLATE

Make = Callable[[str], Awaitable[ChatTemplate]]
MESSAGES = [("system", "be brief"), ("user", "héllo \U0001f642")]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[ChatTemplate] = []

    async def start(template: str) -> ChatTemplate:
        chat = ChatTemplate(template, {"bos_token": "<s>"}, timeout_s=3.0)
        made.append(chat)
        await chat.start()
        return chat

    yield start
    for chat in made:
        await chat.close()


async def test_a_conversation_becomes_the_templates_text_with_a_generation_prompt(make: Make) -> None:
    chat = await make(TEMPLATE)
    assert await chat.render(MESSAGES) == "[system] be brief\n[user] héllo \U0001f642\n[assistant]"


async def test_special_tokens_loop_controls_generation_blocks_and_tojson_work_as_published_templates_expect(
    make: Make,
) -> None:
    chat = await make(
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{% set ns = namespace(a=1) %}{{ ns.a }}"
    )
    assert await chat.render(MESSAGES) == '<s>{"role": "system", "content": "be brief"}1'


async def test_text_of_clients_is_never_taken_for_a_template(make: Make) -> None:
    chat = await make(TEMPLATE)
    assert await chat.render([("user", "{{ 7 * 7 }}")]) == "[user] {{ 7 * 7 }}\n[assistant]"


async def test_a_refusal_by_the_template_reaches_the_client(make: Make) -> None:
    chat = await make(TEMPLATE)
    with pytest.raises(RequestError) as caught:
        await chat.render([("robot", "hi")])
    assert "no robots" in caught.value.message
    assert caught.value.violations[0].field == "prompt.chat"


HARMFUL = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'x' * 10**11 }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "objects": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "mutation": "{{ messages.append(1) }}",
    "missing": "{{ nothing.at.all }}",
}


@pytest.mark.parametrize("name", HARMFUL)
async def test_a_harmful_template_fails_its_request_and_the_next_one_is_served(make: Make, name: str) -> None:
    guard = "{% if messages[0].role == 'bad' %}" + HARMFUL[name] + "{% else %}fine{% endif %}"
    chat = await make(guard)
    with pytest.raises(RequestError) as caught:
        await chat.render([("bad", "x")])
    assert caught.value.reason == "CHAT_TEMPLATE_FAILED"
    assert "Error" not in caught.value.message
    assert await chat.render([("user", "x")]) == "fine"


async def test_a_template_that_is_not_jinja_is_refused_at_start(make: Make) -> None:
    with pytest.raises(StartError, match="chat template"):
        await make("{% for %}")
