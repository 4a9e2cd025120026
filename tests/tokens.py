"""Small texts, conversations and tokenizers, for tests of tokens."""

import json
import os
import pathlib

TEXTS = [f'Document {i}: ' + 'é and the rest, ' * (i % 7) + '\nend.\n' for i in range(40)]
CHATML = """\
{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MESSAGES = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'Hé?'},
    {'role': 'assistant', 'content': 'Hello ☺.'},
    {'role': 'user', 'content': 'Bye.'},
    {'role': 'assistant', 'content': 'Ciao.'},
]


def write_tokenizer(folder: str | os.PathLike[str], template: str | None = None) -> None:
    """Writes a byte-level tokenizer.json of 300 tokens that adds BOS, with its configuration, to a folder."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=['<s>', '</s>', '<|im_start|>', '<|im_end|>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing('<s> $0', special_tokens=[('<s>', 0)])
    tokenizer.enable_truncation(4)  # as some published files; it must not cut documents
    tokenizer.save(os.path.join(folder, 'tokenizer.json'))
    config = {'bos_token': '<s>', 'eos_token': {'content': '</s>'}, 'chat_template': template}
    (pathlib.Path(folder) / 'tokenizer_config.json').write_text(json.dumps(config))
