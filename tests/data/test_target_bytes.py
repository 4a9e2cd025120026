"""Bytes of text per token of every kind of tokenizer, and bits per byte against a computation by hand."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import random_params
from tests.small import small_llm
from tests.tokens import TEXTS, write_tokenizer
from upcycle.commands import tokenize
from upcycle.data.causal import Shards, Tokens
from upcycle.data.causal.tokenizers import COPIED, open_tokenizer
from upcycle.evaluate import validation
from upcycle.models.causal_lm import CausalLM

TEXT = 'Document 3: é and the rest'


def byte_level(folder):
    write_tokenizer(folder)


def byte_fallback(folder):
    """As Llama 2's: spaces as ▁, one in front of a text, and bytes for unknown characters."""
    import tokenizers

    alphabet = sorted(set(''.join(TEXTS)) - {'é', ' '}) + ['▁']
    vocabulary = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), *alphabet, '▁t', '▁th', '▁the', 'an']
    merges = [('▁', 't'), ('▁t', 'h'), ('▁th', 'e'), ('a', 'n')]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token='<unk>', byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing('<s> $0', special_tokens=[('<s>', 1)])
    tokenizer.add_special_tokens(['<unk>', '<s>', '</s>'])
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'bos_token': '<s>', 'eos_token': '</s>'}))


def sentencepiece(folder):
    import sentencepiece

    (folder / 'text').write_text('\n'.join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / 'text'),
        model_prefix=str(folder / 'tokenizer'),
        vocab_size=300,
        model_type='bpe',
        byte_fallback=True,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


# And the bytes of the space in front of a text.
KINDS = {'byte-level': (byte_level, 0), 'byte fallback': (byte_fallback, 1), 'sentencepiece': (sentencepiece, 1)}


@pytest.mark.parametrize('kind', KINDS)
def test_tokens_have_the_bytes_of_their_text(kind, tmp_path):
    make, space = KINDS[kind]
    make(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    bytes_V, identity = tokenizer.token_bytes(), tokenizer.identity
    assert bytes_V.shape == (identity.vocabulary_size,)
    assert bytes_V[identity.bos_id] == bytes_V[identity.eos_id] == 0
    for text in (TEXT, *TEXTS[:3]):
        ids = tokenizer.encode([text])[0]
        assert bytes_V[ids].sum() == len(text.encode()) + space
        if kind == 'byte-level':
            pieces = [len(tokenizer.decode(ids[:i]).encode('utf-8', 'ignore')) for i in (0, 3)]
            assert bytes_V[ids[:3]].sum() == pieces[1] - pieces[0]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Shards by each tokenizer, and a model for all of them."""
    folder = tmp_path_factory.mktemp('shards')
    (folder / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in TEXTS))
    for kind in ('byte-level', 'byte fallback'):
        (folder / kind).mkdir()
        KINDS[kind][0](folder / kind)
    for kind in ('byte-level', 'byte fallback', 'bytes'):
        tokenizer = kind if kind == 'bytes' else str(folder / kind)
        tokenize.run([str(folder / 'a.jsonl')], tokenizer, str(folder / f'{kind} shards'), validation=0.4, workers=1)
    model = CausalLM(small_llm(vocab_size=400, num_layers=1), z_loss=0.1)
    params = random_params(model.module(), jnp.ones((2, 8), jnp.int32))
    return folder, model, params


@pytest.mark.parametrize(
    'kind', ['byte-level', *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ('byte fallback', 'bytes'))]
)
def test_bits_per_byte_by_hand(kind, made):
    folder, model, params = made
    data = Tokens(Shards(str(folder / f'{kind} shards')), 32, 'validation', 4, repeat=False)
    logits = jax.jit(model.logits)
    nats, count, documents = 0.0, 0, []
    for batch in data.batches():
        log_p_BxLxV = jax.nn.log_softmax(logits(params, {k: batch[k] for k in ('tokens', 'segment_ids', 'mask')}))
        log_p_BxL = np.take_along_axis(np.asarray(log_p_BxLxV, np.float64), batch['targets'][..., None], axis=2)[..., 0]
        nats -= (log_p_BxL * batch['loss_weights']).sum()
        count += int(batch['loss_weights'].sum())
    (corpus,) = data.source.corpora('validation')
    for shard in corpus.shards:
        documents += [data.tokenizer.decode(part) for part in np.split(shard.tokens, shard.ends[:-1])]
    assert sorted(set(documents) - {*TEXTS}) == [] and len(documents) > 4
    # Without BOS the first byte of a document is no target.
    size = sum(len(text.encode()) - (kind == 'bytes') for text in documents)
    step = validation.compiled(model, data.target_bytes)
    metrics = validation.evaluate(step, params, map(jax.device_put, data.batches()))
    assert metrics['bits_per_byte'] == pytest.approx(nats / (math.log(2) * size), rel=1e-5)
    assert metrics['perplexity'] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert metrics['loss'] == pytest.approx(nats / count, rel=1e-5)


def test_data_without_a_tokenizer_still_have_a_perplexity(made, capsys):
    folder, model, _ = made
    for name in COPIED:
        (folder / 'byte-level shards' / 'tokenizer' / name).unlink(missing_ok=True)
    data = Tokens(Shards(str(folder / 'byte-level shards')), 32, 'validation', 4, repeat=False)
    batch = next(data.batches())
    assert data.target_bytes(batch) is None
    assert 'bits_per_byte is not computed' in capsys.readouterr().err
