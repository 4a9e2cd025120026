"""Conversations: the chat template, and a loss on the assistant's tokens only."""

import dataclasses
import json

import numpy as np
import pytest

from tests.data.test_tokenize import bpe  # noqa: F401  a fixture
from tests.test_cli import call
from tests.tokens import CHATML, MESSAGES
from upcycle.data.causal import Shards, Tokens, chat
from upcycle.data.causal.tokenizers import ByteTokenizer, open_tokenizer
from upcycle.errors import UserError

GENERATION = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}{{ m.content | trim }}</s>{% endgeneration %}
{% else %}[{{ m.content }}]{% endif %}{% endfor %}"""
# As Qwen3's: the reasoning of earlier answers disappears.
FORGETS = """\
{% for m in messages %}({{ m.role }}: {% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}
{{ m.content }}){% endfor %}{% if add_generation_prompt %}(assistant: {% endif %}"""


def learned(source, messages=MESSAGES, tokenizer=None):
    """The text of a conversation, and the parts of it that are learned."""
    tokenizer = tokenizer or ByteTokenizer()
    template = chat.ChatTemplate(source, 'the test', {'bos_token': '<s>'})
    text, ids, loss = chat.encode_chat(tokenizer, template, messages)
    assert tokenizer.decode(ids) == text
    edges = np.flatnonzero(np.diff(loss, prepend=0, append=0)).reshape(-1, 2)
    return text, [tokenizer.decode(ids[first:last]) for first, last in edges]


def test_prefixes_tell_what_the_assistant_writes():
    text, parts = learned(CHATML)
    assert parts == ['Hello ☺.<|im_end|>\n', 'Ciao.<|im_end|>\n']
    assert text.startswith('<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé?')


def test_generation_blocks_tell_it():
    text, parts = learned(GENERATION)
    assert text == '<s>[Be brief.][Hé?]Hello ☺.</s>[Bye.]Ciao.</s>' and parts == ['Hello ☺.</s>', 'Ciao.</s>']


@pytest.mark.parametrize('source', [CHATML, GENERATION])
def test_text_and_parts_are_those_of_transformers(source):
    utils = pytest.importorskip('transformers.utils.chat_template_utils')
    rendered, spans = utils.render_jinja_template(
        [MESSAGES], chat_template=source, return_assistant_tokens_mask='{% generation' in source, bos_token='<s>'
    )
    template = chat.ChatTemplate(source, 'the test', {'bos_token': '<s>'})
    text, ours = template.with_spans(MESSAGES)
    assert rendered == [text]
    if '{% generation' in source:
        assert [tuple(span) for span in spans[0]] == ours


UNDEFINED = {
    'an answer changes later': (FORGETS, 'the text of message 3 or of those before it depends on what follows'),
    'the blocks are changed': (
        '{% filter upper %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{% endfilter %}',
        'it changes the text of its {% generation %} blocks, or nests them',
    ),
}


@pytest.mark.parametrize('case', UNDEFINED)
def test_a_template_that_cannot_say_where_is_refused(case):
    source, reason = UNDEFINED[case]
    with pytest.raises(chat.UndefinedSpans, match="the test cannot say where the assistant's tokens are") as error:
        learned(source)
    assert reason in str(error.value) and '\n' not in str(error.value)


def test_one_answer_is_enough_for_such_a_template():
    assert learned(FORGETS, MESSAGES[1:3])[1] == ['<think></think>\nHello ☺.)'.replace('\n', '')]


def test_the_sandbox_and_what_it_offers():
    def render(source):
        return chat.ChatTemplate(source, 'the test', {}).render(MESSAGES[:2], tools=[{'a': 'é<'}])

    assert render("{{ tools | tojson }} {{ strftime_now('%Y')|length }}") == '[{"a": "é<"}] 4'
    assert render('{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}') == 'x'
    for source in ('{{ raise_exception("no tools") }}', '{{ messages.append(1) }}', '{{ "".__class__.__mro__ }}'):
        with pytest.raises(chat.RefusedChat, match='the chat template of the test refuses it'):
            render(source)
    with pytest.raises(UserError, match='does not parse'):
        render('{% if %}')


@pytest.fixture
def conversations(tmp_path):
    (tmp_path / 'chat.jsonl').write_text(
        json.dumps({'messages': MESSAGES}) + '\n' + json.dumps({'messages': MESSAGES[1:3]})
    )
    (tmp_path / 'chatml.jinja').write_text(CHATML)
    return tmp_path


def test_shards_of_conversations_train_on_the_assistant_only(conversations, bpe, capsys):  # noqa: F811
    to = conversations / 'out'
    command = ['tokenize', f'--from={conversations}/chat.jsonl', '--chat', f'--tokenizer={bpe}', f'--to={to}']
    code, _, err = call([*command, '--workers=1'], capsys)
    assert code == 2 and f'--tokenizer={bpe} has no chat template' in err
    template = f'--chat_template={conversations}/chatml.jinja'
    code, _, err = call([*command, '--workers=1', '--validation=0', template], capsys)
    assert code == 0, err
    assert (to / 'tokenizer' / 'chat_template.jinja').read_text() == CHATML
    tokenizer = open_tokenizer(bpe)
    data = Tokens(Shards(str(to)), 256, 'train', 2, packing='whole', repeat=False, shuffle=False)
    (batch,) = data.batches()
    row, segments = batch['tokens'][0], batch['segment_ids'][0]
    assert tokenizer.decode(row[segments == 1]) == learned(CHATML, tokenizer=tokenizer)[0]
    assert not (row[segments > 0] == tokenizer.identity.bos_id).any()
    for segment, expected in ((1, learned(CHATML)[1]), (2, learned(CHATML, MESSAGES[1:3])[1])):
        targets = batch['targets'][0][(segments == segment) & (batch['loss_weights'][0] > 0)]
        assert tokenizer.decode(targets) == ''.join(expected)
    np.testing.assert_array_equal(batch['mask'], batch['segment_ids'] > 0)
    assert not batch['mask'][1].any() and not capsys.readouterr().err
    _ = dataclasses.replace(data, packing='split', sequence_length=8).rows
    assert "PACKING = 'split' cuts them anywhere" in capsys.readouterr().err


BAD = {
    '{"text": "a"}': 'line 1 is not a list of messages',
    '{"messages": [{"content": "a"}]}': 'line 1 has a message 1 without a role',
    '{"messages": [{"role": "user"}]}': 'line 1 has a message 1 without content',
    '{"messages": [{"role": "user", "content": "a"}]}': 'line 1 has no message of the assistant',
    '{"messages": [{"role": "assistant", "content": null}]}': 'line 1: the chat template of',
}


@pytest.mark.parametrize('line', BAD)
def test_bad_conversations_are_named(line, conversations, bpe, capsys):  # noqa: F811
    (conversations / 'bad.jsonl').write_text(line)
    options = [f'--tokenizer={bpe}', f'--chat_template={conversations}/chatml.jinja', '--workers=1', '--chat']
    code, _, err = call(
        ['tokenize', f'--from={conversations}/bad.jsonl', f'--to={conversations}/out', *options], capsys
    )
    assert code == 2 and BAD[line] in err.splitlines()[-1] and '--max_bad_records' in err
    assert not (conversations / 'out').exists()
