"""Conversations as text by a model's chat template, and where the assistant's part of it is.

Templates run in jinja2's immutable sandbox, with the globals and filters that transformers gives them.
"""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from upcycle.data.causal.tokenizers import Tokenizer
from upcycle.errors import UserError, one_line

Message = Mapping[str, Any]
Span = tuple[int, int]


class ChatTemplate:
    """A chat template, compiled.

    The assistant's text is what the blocks `{% generation %}` of the template enclose. Without such blocks it is what each
    message of the assistant adds to the text of the messages before it; that is only defined if a message leaves the text
    before it unchanged.

    Args:
      source: the template.
      name: for messages.
      tokens: the special tokens by name, such as 'bos_token'.

    Raises:
      UserError: the template does not parse.
    """

    def __init__(self, source: str, name: str, tokens: Mapping[str, str]):
        import jinja2

        self._name, self._tokens = name, dict(tokens)
        # Characters that no text contains mark the blocks.
        self._marks = tuple(f'\ue000{secrets.token_hex(8)}{end}\ue001' for end in '[]')
        try:
            self._marked = _environment(self._marks).from_string(source)
            self._plain = _environment(('', '')).from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f'the chat template of {name} does not parse ({one_line(error)}): correct it.') from error

    def render(self, messages: Sequence[Message], *, prompt: bool = False, tools: Any = None) -> str:
        """Returns the text of a conversation.

        Args:
          messages: with 'role' and 'content'.
          prompt: whether to begin an answer of the assistant.
          tools: descriptions of the tools that the assistant may call.

        Raises:
          RefusedChat: the template refuses the conversation, or does something that the sandbox forbids.
        """
        return self._text(self._plain, messages, prompt, tools)

    def _text(self, template: Any, messages: Sequence[Message], prompt: bool, tools: Any) -> str:
        import jinja2

        try:
            return template.render(
                messages=[dict(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RefusedChat(f'the chat template of {self._name} refuses it ({one_line(error)})') from error

    def with_spans(self, messages: Sequence[Message], tools: Any = None) -> tuple[str, list[Span]]:
        """Returns the text of a conversation, and the ranges of characters that the assistant writes.

        Raises:
          RefusedChat: the template refuses the conversation.
          UndefinedSpans: the template does not tell where they are.
        """
        text = self.render(messages, tools=tools)
        marked = self._text(self._marked, messages, False, tools)
        if marked == text:
            return text, self._by_prefixes(text, messages, tools)
        spans, clean = [], ''
        opening, closing = self._marks
        for number, part in enumerate(marked.split(opening)):
            inside, end, after = part.partition(closing)
            if bool(end) != bool(number):
                break
            if number:
                spans.append((len(clean), len(clean) + len(inside)))
            clean += inside + after
        if clean != text:
            raise UndefinedSpans(self._name, 'it changes the text of its {% generation %} blocks, or nests them')
        return text, spans

    def _by_prefixes(self, text: str, messages: Sequence[Message], tools: Any) -> list[Span]:
        spans = []
        for i, message in enumerate(messages):
            if message['role'] != 'assistant':
                continue
            before = self.render(messages[:i], prompt=True, tools=tools)
            after = self.render(messages[: i + 1], tools=tools)
            if not after.startswith(before) or not text.startswith(after):
                raise UndefinedSpans(
                    self._name, f'the text of message {i + 1} or of those before it depends on what follows'
                )
            spans.append((len(before), len(after)))
        return spans


class RefusedChat(UserError):  # noqa: N818  named after the mistake
    """A conversation that its chat template does not accept."""


class UndefinedSpans(UserError):  # noqa: N818  named after the mistake
    """A chat template that cannot say where the assistant's tokens are."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"the chat template of {name} cannot say where the assistant's tokens are ({reason}): enclose what the assistant "
            'writes in {% generation %} and {% endgeneration %}, and name the new template with --chat_template.'
        )


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], tools: Any = None
) -> tuple[str, np.ndarray, np.ndarray]:
    """Tokenises a conversation.

    Returns:
      Its text, its ids [n], and uint8 [n]: 1 for tokens that lie wholly in the assistant's text, else 0.

    Raises:
      UserError: see `ChatTemplate.with_spans`.
    """
    text, spans = template.with_spans(messages, tools)
    ids, ranges = tokenizer.encode_with_spans(text)
    edges = np.array(spans, np.int64).reshape(-1, 2)
    begin, end = ranges[:, 0], ranges[:, 1]
    span = np.searchsorted(edges[:, 0], begin, side='right') - 1
    inside = span >= 0
    inside[inside] = end[inside] <= edges[span[inside], 1]
    return text, ids, (inside & (end > begin)).astype(np.uint8)


def check_messages(messages: Any) -> str | None:
    """Returns what is wrong with the messages of a conversation; None if they can be learned from."""
    if not isinstance(messages, list) or not messages:
        return 'is not a list of messages'
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get('role'), str):
            return f'has a message {number} without a role'
        if 'content' not in message and 'tool_calls' not in message:
            return f'has a message {number} without content'
    if all(message['role'] != 'assistant' for message in messages):
        return 'has no message of the assistant'
    return None


def _environment(marks: tuple[str, str]) -> Any:
    """A sandbox in which `{% generation %}` blocks are enclosed in two marks."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags = {'generation'}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            opening, closing = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in marks)
            return [opening, jinja2.nodes.Scope(body, lineno=line), closing]

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = refuse
    environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
    return environment
