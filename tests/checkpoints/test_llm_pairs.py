"""A dense folder of transformers, upcycled from folder to folder, computes the same in the MoE class of transformers, and here.

Needs PyTorch (`pip install upcycle[hf]`; the CPU build is enough), and is skipped without it.
"""

import json

import numpy as np
import pytest

import upcycle
from tests.moe.quick import jit
from upcycle import cli
from upcycle.checkpoints import open_checkpoint
from upcycle.commands import train
from upcycle.errors import UserError
from upcycle.transfer import transfer

_WHY = 'needs `pip install upcycle[hf]`: no pair of a dense layout and one with experts is compared with transformers'
torch = pytest.importorskip('torch', reason=_WHY)
transformers = pytest.importorskip('transformers', minversion='5', reason=_WHY)
tokenizers = pytest.importorskip('tokenizers', reason=_WHY)

from tests.checkpoints import torch_models  # noqa: E402

pytestmark = pytest.mark.exhaustive

BIASES = {'attention_bias': True}
LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 100.0, 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
LLAMA3 |= {'original_max_position_embeddings': 16}
YARN = {'rope_type': 'yarn', 'rope_theta': 100.0, 'factor': 4.0, 'original_max_position_embeddings': 16}
PARTIAL = {'rope_parameters': {'rope_type': 'default', 'rope_theta': 100.0, 'partial_rotary_factor': 0.5}}
NO_WINDOW, WINDOW = {'sliding_window': None}, {'sliding_window': 5}
QWEN_WINDOW = {'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1}
GRANITE = {'embedding_multiplier': 3.0, 'residual_multiplier': 0.6, 'attention_multiplier': 0.2, 'logits_scaling': 2.0}
SOME = {'MOE_LAYERS': '(0, 2)'}
RAW = {'NORMALIZE_COMBINE_WEIGHTS': 'False'}
GATED = 'recipes/gated_shared_expert.gin'


def k_of(experts, chosen):
    return {'NUM_EXPERTS': experts, 'NUM_SELECTED_EXPERTS': chosen}


# Class and configuration of the dense model, bindings of the conversion, the layout, and whether it must be named.
PAIRS = {
    'llama': ('Llama', {}, {}, 'mixtral', False),
    'llama, tied, head_dim, llama3': (
        'Llama',
        {'tie_word_embeddings': True, 'head_dim': 12, 'rope_parameters': LLAMA3},
        {},
        'mixtral',
        False,
    ),
    'llama, yarn': ('Llama', {'rope_parameters': YARN}, {}, 'mixtral', False),
    'llama, 3 of 5': ('Llama', {}, k_of(5, 3), 'mixtral', False),
    'llama, all of 4': ('Llama', {}, k_of(4, 4), 'mixtral', False),
    'llama, 1 of 3': ('Llama', {}, k_of(3, 1), 'mixtral', False),
    'mistral, window': ('Mistral', WINDOW, {}, 'mixtral', False),
    'phi3': ('Phi3', NO_WINDOW, {}, 'mixtral', False),
    'phi3, window': ('Phi3', WINDOW, {}, 'mixtral', False),
    'smollm3 without options': ('SmolLM3', {'no_rope_layers': [1, 1, 1]}, {}, 'mixtral', False),
    'granite without multipliers': ('Granite', {'attention_multiplier': 8**-0.5}, {}, 'mixtral', False),
    'llama, some layers': ('Llama', {}, SOME, 'qwen2_moe', False),
    'llama to qwen2_moe': ('Llama', {'rope_parameters': LLAMA3}, {}, 'qwen2_moe', True),
    'mistral, some layers': ('Mistral', NO_WINDOW, SOME, 'qwen2_moe', False),
    'qwen2': ('Qwen2', {'tie_word_embeddings': True}, {}, 'qwen2_moe', False),
    'qwen2, some layers': ('Qwen2', {}, SOME, 'qwen2_moe', False),
    'qwen3': ('Qwen3', {'head_dim': 12, 'tie_word_embeddings': True}, {}, 'qwen3_moe', False),
    'qwen3, biases, some layers': ('Qwen3', BIASES | {'head_dim': 12}, SOME, 'qwen3_moe', False),
    'olmo2': ('Olmo2', {}, {}, 'flex_olmo', False),
    'olmo2, biases': ('Olmo2', BIASES, k_of(5, 3), 'flex_olmo', False),
    'granite': ('Granite', GRANITE, {}, 'granitemoe', False),
    'llama to granitemoe': ('Llama', {}, {}, 'granitemoe', True),
    'llama, biases': ('Llama', BIASES, {}, 'granitemoe', False),
    'qwen2 to granitemoe': ('Qwen2', {}, {}, 'granitemoe', True),
}


def make_folder(name, fields, path):
    model = torch_models.make_with_margin(name, **fields)
    model.save_pretrained(path)
    return model


def convert(source, target, bindings, layout=None, files=()):
    bindings = {'NUM_EXPERTS': 4} | bindings
    arguments = ['convert', f'--from={source}', f'--to={target}', '--format=huggingface']
    arguments += [f'--gin_file={file}' for file in ('moe/llm.gin', *files)]
    arguments += [f'--gin.{name}={value}' for name, value in bindings.items()]
    return cli.run([*arguments, *([] if layout is None else [f'--layout={layout}'])])


def check(model, folder, layout, atol=1e-5):
    """Asserts that a folder of this layout computes the function of a model there and here."""
    tokens = torch_models.tokens_of(model)
    expected = torch_models.theirs(model, tokens)
    assert json.loads((folder / 'config.json').read_text())['model_type'] == layout
    torch_models.assert_equal_logits(torch_models.theirs(torch_models.load(folder), tokens), expected, atol)
    torch_models.assert_equal_logits(torch_models.ours(folder, tokens), expected, atol)


@pytest.mark.parametrize('pair', PAIRS)
def test_is_the_dense_function(pair, tmp_path):
    name, fields, bindings, layout, is_named = PAIRS[pair]
    model = make_folder(name, fields, tmp_path / 'dense')
    convert(tmp_path / 'dense', tmp_path / 'moe', bindings, layout if is_named else None)
    check(model, tmp_path / 'moe', layout)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_keeps_the_type_of_the_source(dtype, tmp_path):
    torch_models.make('Llama', dtype=getattr(torch, dtype)).save_pretrained(tmp_path / 'dense')
    model = torch_models.load(tmp_path / 'dense')
    convert(tmp_path / 'dense', tmp_path / 'moe', {})
    check(model, tmp_path / 'moe', 'mixtral')
    assert json.loads((tmp_path / 'moe' / 'config.json').read_text())['torch_dtype'] == dtype
    leaves = open_checkpoint(tmp_path / 'moe').leaves()
    assert {leaf.dtype.name for name, leaf in leaves.items() if name.endswith('wo/kernel')} == {dtype}


@pytest.mark.parametrize('bindings', [{}, SOME])
def test_a_gated_shared_expert(bindings, tmp_path):
    model = make_folder('Qwen2', {}, tmp_path / 'dense')
    convert(tmp_path / 'dense', tmp_path / 'moe', bindings, files=[GATED])
    check(model, tmp_path / 'moe', 'qwen2_moe')


# Class, configuration, bindings, layout, and words of the refusal. All of these load in transformers, most without a message.
WRONG = {
    'partial rotary': ('Phi3', PARTIAL, {}, 'mixtral', 'rope_dims = 4 would become None'),
    'a window': ('Mistral', WINDOW, {}, 'granitemoe', 'window = 5 would become None'),
    'a window for qwen2_moe': ('Mistral', WINDOW, {}, 'qwen2_moe', 'window = 5 would become None'),
    'windows of qwen2': ('Qwen2', QWEN_WINDOW, {}, 'qwen2_moe', 'window = 5 would become None'),
    'biases of MLPs': ('Llama', {'mlp_bias': True}, {}, 'mixtral', 'mlp_bias = True would become False'),
    'biases of attention': ('Qwen2', {}, {}, 'mixtral', 'qkv_bias = True would become False'),
    'norms of heads': ('Qwen3', {}, {}, 'mixtral', "qk_norm = 'head' would become 'none'"),
    'no norms of heads': ('Llama', {}, {}, 'qwen3_moe', "qk_norm = 'none' would become 'head'"),
    'norms on outputs': ('Olmo2', {}, {}, 'olmoe', "norm_placement = 'post' would become 'pre'"),
    'multipliers': ('Granite', GRANITE, {}, 'mixtral', 'embedding_multiplier = 3.0 would become 1.0'),
    'raw weights to mixtral': ('Llama', {}, RAW, 'mixtral', 'normalize_combine_weights = False would become True'),
    'raw weights to granitemoe': (
        'Granite',
        {},
        RAW,
        'granitemoe',
        'normalize_combine_weights = False would become True',
    ),
    'dense layers': ('Llama', {}, SOME, 'mixtral', r'moe_layers = \[0, 2\] would become .all.'),
    'dense layers of olmo2': ('Olmo2', {}, SOME, None, r'moe_layers = \[0, 2\] would become .all.'),
    'layers without RoPE': ('SmolLM3', {'no_rope_layers': [1, 0, 1]}, {}, None, 'rope_layers'),
    'gemma': ('Gemma', {'head_dim': 8}, {}, None, 'norm_offset = 1.0 would become 0.0'),
    'gemma 2': ('Gemma2', {'head_dim': 8}, {}, None, "norm_placement = 'both' would become"),
    'attention without experts': ('Llama', {'rms_norm_eps': 1e-6}, {}, 'jetmoe', 'attention_moe'),
    'a dense layout': ('Llama', {}, {}, 'llama', 'layout=llama cannot store this model'),
}


@pytest.mark.parametrize('case', WRONG)
def test_what_a_layout_would_change_is_refused(case, tmp_path):
    name, fields, bindings, layout, words = WRONG[case]
    make_folder(name, fields, tmp_path / 'dense')
    with pytest.raises(UserError, match=words):
        convert(tmp_path / 'dense', tmp_path / 'moe', bindings, layout)
    assert not (tmp_path / 'moe').exists()


TASK = ('tasks/synthetic_tokens.gin',)
STEPS = {
    'ACTIVATION_DTYPE': 'float32',
    'BATCH_SIZE': '4',
    'SEQUENCE_LENGTH': '16',
    'EVAL_STEPS': '1',
    'EVAL_PERIOD': '3',
    'LOG_PERIOD': '3',
    'CHECKPOINT_PERIOD': '3',
    'TRAIN_STEPS': '3',
    'WARMUP_STEPS': '1',
    'BASE_LEARNING_RATE': '1e-2',
    'OPTIMIZER_STATE': "'fresh'",
    'NUM_EMBEDDINGS': str(torch_models.SIZES['vocab_size']),
}
# Class, configuration, and files and bindings of the training; models with experts are trained as they are.
TRAINED = {
    'mixtral': ('Mistral', WINDOW, ('moe/llm.gin',), {}),
    'qwen2_moe': ('Qwen2', {}, ('moe/llm.gin', GATED), SOME),
    'qwen3_moe': ('Qwen3', {'head_dim': 12}, ('moe/llm.gin',), RAW | SOME),
    'flex_olmo': ('Olmo2', {}, ('moe/llm.gin',), {}),
    'granitemoe': ('Granite', GRANITE, ('moe/llm.gin',), {}),
    'olmoe': ('Olmoe', {'num_experts': 4, 'num_experts_per_tok': 2, 'clip_qkv': 1.2}, (), {}),
    'jetmoe': ('JetMoe', {'num_local_experts': 4, 'num_experts_per_tok': 2, 'kv_channels': 10}, (), {}),
}


@pytest.mark.parametrize('layout', TRAINED)
def test_a_trained_model(layout, tmp_path):
    name, fields, files, bindings = TRAINED[layout]
    model = make_folder(name, fields, tmp_path / 'source')
    run = 'runs/upcycle.gin' if files else 'runs/continue_dense.gin'
    sparse = {'NUM_EXPERTS': '4'} if files else {}
    named = {'INITIAL_CHECKPOINT_PATH': str(tmp_path / 'source'), 'MODEL_DIR': str(tmp_path / 'run')}
    more = files[1:]
    train.run(('models/from_checkpoint.gin', *files[:1], *TASK, run, *more), STEPS | sparse | bindings | named)
    written = transfer(str(tmp_path / 'run'), str(tmp_path / 'written'), 'huggingface', optimizer_state='none')
    assert open_checkpoint(written).metadata['model_type'] == layout
    trained, params = upcycle.load(tmp_path / 'run')
    theirs = torch_models.load(written)
    tokens = torch_models.tokens_with_margin(theirs)
    expected = torch_models.theirs(theirs, tokens)
    assert np.abs(expected['plain'] - torch_models.theirs(model, tokens)['plain']).max() > 1e-2
    torch_models.assert_equal_logits(torch_models.logits_of(trained, params, tokens), expected)
    # Reading the folder gives the same bits.
    run, again = open_checkpoint(tmp_path / 'run'), open_checkpoint(written)
    leaves = [leaf for leaf in run.leaves() if leaf.startswith('params/')]
    added = {leaf for leaf in again.leaves() if leaf.startswith('params/')} - {*leaves}
    assert not added
    for leaf in leaves:
        np.testing.assert_array_equal(again.read(leaf), run.read(leaf), err_msg=leaf)


def test_router_columns_from_prompts(tmp_path):
    """They point to the means of what transformers' MLPs read on the prompts of each expert."""
    model = make_folder('Mistral', {}, tmp_path / 'dense')
    words = {f'w{i}': i for i in range(model.config.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='w0'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / 'dense' / 'tokenizer.json'))
    prompts = [[[5, 6, 7], [8, 9, 10, 11, 12]], [[20, 21]], [[3, 30, 13, 31]]]
    for e, each in enumerate(prompts):
        lines = (' '.join(f'w{token}' for token in prompt) for prompt in each)
        (tmp_path / str(e)).write_text('\n'.join(lines))
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, given, i=i: seen.__setitem__(i, given[0][0].mean(dim=0)))
    means = {i: [] for i in range(model.config.num_hidden_layers)}
    for each in prompts:
        of_prompts = []
        for prompt in each:
            with torch.no_grad():
                model(torch.tensor([prompt]))
            of_prompts.append(dict(seen))
        for i in means:
            means[i].append(torch.stack([states[i] for states in of_prompts]).mean(dim=0))
    files = repr(tuple(str(tmp_path / str(e)) for e in range(3)))
    bindings = {'ROUTER_INIT': 'hidden', 'ROUTER_PROMPTS': files, 'ROUTER_INIT_STDDEV': 1.0}
    convert(tmp_path / 'dense', tmp_path / 'moe', {'NUM_EXPERTS': 3} | bindings)
    reader = open_checkpoint(tmp_path / 'moe')
    for i, rows in means.items():
        mean_ExD = torch.stack(rows).numpy()
        unit_ExD = mean_ExD / np.linalg.norm(mean_ExD, axis=-1, keepdims=True)
        router_DxE = reader.read(f'params/decoder/layers_{i}/mlp/router/router_weights/w/kernel')
        np.testing.assert_allclose(router_DxE.T, unit_ExD * unit_ExD.shape[1] ** 0.5, atol=1e-4)


def greedy(folder, prompt, count):
    """The `count` likeliest tokens after a prompt, one after the other, by our model."""
    model, params = upcycle.load(folder)
    logits = jit(model.logits)
    tokens = np.pad(np.asarray(prompt, np.int32), ((0, 0), (0, count)))
    for i in range(np.shape(prompt)[1], tokens.shape[1]):
        tokens[:, i] = logits(params, {'tokens': tokens})[:, i - 1].argmax(-1)
    return tokens


@pytest.mark.parametrize('name', ['Mistral', 'Qwen3'])
def test_the_auto_classes_load_the_folder_and_generate(name, tmp_path):
    model = make_folder(name, {}, tmp_path / 'dense')
    words = {f'w{i}': i for i in range(model.config.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='w3'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = '{% for message in messages %}{{ message.content }} {% endfor %}'
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='w2', chat_template=template)
    fast.save_pretrained(tmp_path / 'dense')
    convert(tmp_path / 'dense', tmp_path / 'moe', {})
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'moe')
    prompt = again('w5 w17 w9 w80', return_tensors='pt')
    assert prompt['input_ids'].tolist() == [[5, 17, 9, 80]] and again.eos_token_id == 2
    chat = again.apply_chat_template([{'role': 'user', 'content': 'w7 w8'}], tokenize=False)
    assert chat.split() == ['w7', 'w8']
    sparse = torch_models.load(tmp_path / 'moe')
    generated = sparse.generate(**prompt, do_sample=False, max_new_tokens=8).numpy()
    assert generated.shape == (1, 12) or generated[0, -1] == 2
    np.testing.assert_array_equal(generated, model.generate(**prompt, do_sample=False, max_new_tokens=8).numpy())
    found = greedy(tmp_path / 'moe', prompt['input_ids'].numpy(), 8)
    np.testing.assert_array_equal(found[:, : generated.shape[1]], generated)
