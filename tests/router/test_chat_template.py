"""Chat templates: what users' templates call, what is refused in one line, what the sandbox forbids."""

import datetime

import pytest

from biphase.protos.errors import InvalidRequest, SetupError
from biphase.router.chat_template import ChatTemplate


def render(source: str, *messages: tuple[str, str], **tokens: str) -> str:
    return ChatTemplate(source, tokens).render(list(messages) or [("user", "hello")])


def test_messages_and_generation_prompt() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompt = render(source, ("system", "be kind"), ("user", "hi"), bos_token="[B]", eos_token="[E]")
    assert prompt == "[B]<system>be kind[E]<user>hi[E]<assistant>"
    assert ChatTemplate(source, {}).render([("user", "hi")], add_generation_prompt=False) == "<user>hi"


def test_blocks_are_trimmed_as_transformers_does() -> None:
    assert (
        render("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n") == "hello\n"
    )


def test_loop_controls() -> None:
    source = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    assert render(source, ("user", "a"), ("user", "b")) == "a"


def test_tojson_keeps_characters_as_they_are() -> None:
    assert render("{{ messages | tojson }}", ("user", "<é> & 'x'")) == '[{"role": "user", "content": "<é> & \'x\'"}]'
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_unset_names_are_false() -> None:
    assert render("{% if tools %}tools{% endif %}{% if documents %}documents{% endif %}{{ bos_token }}-") == "-"


def test_content_is_text_not_template() -> None:
    assert render("{{ messages[0].content }}", ("user", "{{ 7 * 7 }} <|im_end|>")) == "{{ 7 * 7 }} <|im_end|>"


def test_raise_exception_is_the_users_mistake() -> None:
    with pytest.raises(InvalidRequest, match="refuses these messages: Roles must alternate$"):
        render("{{ raise_exception('Roles must\n alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
    ],
    ids=["attributes", "mutation", "missing", "arithmetic", "types"],
)
def test_failures_while_rendering_are_one_line(source: str) -> None:
    with pytest.raises(InvalidRequest, match="^the model's chat template fails on these messages: [^\n]+$"):
        render(source)


@pytest.mark.parametrize("source", ["{% for %}", "{{ messages | nosuch }}", "{% if x %}"])
def test_a_broken_template_is_found_at_start_up(source: str) -> None:
    with pytest.raises(SetupError, match="^chat template: [^\n]+$"):
        ChatTemplate(source, {})


def test_no_messages() -> None:
    with pytest.raises(InvalidRequest, match="messages is empty, at least 1"):
        ChatTemplate("x", {}).render([])
