"""A model's chat template: messages into the prompt text it was trained on, rendered in jinja2's sandbox.

The field's usual behaviour is kept: message text is put into the template as it is, so a special token spelled out in
it (``<|im_end|>``) becomes that token.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from biphase.protos.errors import InvalidRequest, SetupError, one_line


class _Refused(Exception):
    """The template itself said no, by ``raise_exception``."""


class ChatTemplate:
    """A compiled template. ``special_tokens``: the texts that templates use by name (``bos_token``, ``eos_token``)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises SetupError, one line, for a template that is no jinja."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise SetupError(f"chat template: {one_line(error)}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt of (role, content) messages, ready for the assistant's answer.

        Raises InvalidRequest, one line, for messages that the template does not take (a role it does not know, ...).
        """
        if not messages:
            raise InvalidRequest("messages is empty, at least 1 message is needed")
        try:
            return self._template.render(
                messages=[{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except _Refused as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {one_line(error)}") from error
        except (TemplateError, TypeError, ValueError, KeyError, LookupError, ArithmeticError) as error:
            raise InvalidRequest(f"the model's chat template fails on these messages: {one_line(error)}") from error


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own escapes HTML characters, which no prompt wants
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
