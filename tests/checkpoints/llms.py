"""Decoder-only folders of transformers among the fixtures; how to copy one with changes, and how to run one."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tests.fixtures import fixtures_dir
from tests.moe.quick import jit
from upcycle.checkpoints import safetensors
from upcycle.models.decoder import head_of

FOLDERS = fixtures_dir() / 'llm'
DENSE = (
    *('llama', 'llama_bias', 'llama_tied_rope_llama3', 'mistral_window', 'qwen2', 'qwen3', 'gemma', 'gemma2'),
    *('gemma3_text', 'smollm3', 'olmo2', 'phi3', 'phi3_partial', 'granite'),
)
MOE = (
    *('mixtral', 'qwen2_moe', 'qwen2_moe_every_layer', 'qwen3_moe_norm', 'qwen3_moe_nonorm', 'olmoe', 'flex_olmo'),
    *('granitemoe', 'jetmoe'),
)
PAIRS = ('granite_to_granitemoe', 'llama_to_jetmoe', 'llama_to_mixtral', 'olmo2_to_flex_olmo', 'qwen3_to_qwen3_moe')


def config_of(name, file='config.json'):
    """The content of a fixture's configuration."""
    return json.loads((FOLDERS / name / file).read_text())


def tensors_of(folder):
    """All tensors of a folder, by their names there."""
    stored, _ = safetensors.read_files(epath.Path(folder) / safetensors.SINGLE)
    return {name: tensor.read(()) for name, tensor in stored.items()}


def copy(name, target, *, file='config.json', without=(), change=None, **fields):
    """Copies a fixture.

    Args:
      name: of the fixture.
      target: the new folder.
      file: which configuration becomes config.json.
      without: fields to leave out.
      change: changes the tensors, a dictionary by name; None: the file is linked.
      **fields: new values of the configuration.
    """
    target.mkdir()
    config = {key: value for key, value in config_of(name, file).items() if key not in without} | fields
    (target / 'config.json').write_text(json.dumps(config))
    if change is None:
        (target / safetensors.SINGLE).symlink_to(FOLDERS / name / safetensors.SINGLE)
        return target
    tensors = tensors_of(FOLDERS / name)
    write(target, change(tensors) or tensors)
    return target


def write(folder, tensors):
    """Writes tensors to a folder."""
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in tensors.items()}
    writer = safetensors.FilesWriter(epath.Path(folder), shapes)
    for name, value in tensors.items():
        writer.write(name, value)
    writer.finish({})


@functools.cache
def reference(name):
    """The outputs of transformers for a fixture."""
    with np.load(FOLDERS / name / 'ref.npz') as file:
        return dict(file)


def batch_of(ref):
    """One batch with all inputs of a reference: two rows, the same padded, and two documents packed into a row."""
    rows, length = ref['input_ids'].shape
    pad = 2 * rows + 1
    tokens = np.concatenate([ref['input_ids'], ref['padded_input_ids'], ref['packed_input_ids']])
    mask = np.ones((pad, length), bool)
    mask[rows : 2 * rows] = ref['attention_mask']
    segments = np.ones((pad, length), np.int32)
    segments[-1] = ref['packed_segment_ids'][0]
    weights = np.zeros((pad, length), np.float32)
    weights[:rows, :-1] = 1
    return {
        'tokens': tokens.astype(np.int32),
        'targets': np.pad(tokens[:, 1:], ((0, 0), (0, 1))).astype(np.int32),
        'loss_weights': weights,
        'mask': mask,
        'segment_ids': segments,
    }


def outputs(model, params, batch):
    """Returns the mean loss of the plain rows, the outputs of the embedding, each layer, router and the head, and gradients."""

    def loss(params):
        seen = {}

        def record(call, arguments, named, context):
            y = call(*arguments, **named)
            if context.method_name == '__call__':
                seen['/'.join(context.module.path)] = y
            return y

        with nn.intercept_methods(record):
            sums, aux, _ = model.forward(params, batch, None, training=False)
        config = model.config
        states = [seen['token_embedder'] * config.embedding_multiplier]
        states += [seen[f'decoder/layers_{i}'] for i in range(config.num_layers)]
        routers = [seen[f'{path}/router'] for path in model.moe_layers()]
        head = head_of(config, params)
        logits = head.logits(head.kernel, seen[''])
        return sums['loss'] / sums['weight'], (logits, [*states[:-1], seen['decoder/decoder_norm']], routers, aux)

    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    with jax.default_matmul_precision('highest'):
        (value, (logits, states, routers, aux)), grads = jit(jax.value_and_grad(loss, has_aux=True))(params)
    made = {'loss': value, 'logits': logits, 'hidden_states': states, 'routers': routers, 'aux': aux}
    return {**made, 'grads': grads}


def assert_routing(model, routers, ref):
    """Asserts that the logits of routers, for the rows of a reference, choose its experts with its weights."""
    rows, length = ref['input_ids'].shape
    routers = {path: logits[:rows] for path, logits in zip(model.moe_layers(), routers, strict=True)}
    for kind, prefix in (('mlp', 'router'), ('self_attention', 'attention_router')):
        paths = [path for path in routers if path.endswith(kind)]
        layers = [int(path.split('/')[1].removeprefix('layers_')) for path in paths]
        np.testing.assert_array_equal(layers, ref['moe_layers'] if f'{prefix}_logits' in ref else [])
        for i, path in enumerate(paths):
            moe = model.moe_layers()[path]
            flat = np.asarray(routers[path]).reshape(-1, moe.num_experts)
            np.testing.assert_allclose(flat, ref[f'{prefix}_logits'][i], rtol=0, atol=1e-4)
            choices, _ = moe.route_dropless(routers[path], np.ones((rows, length), bool))
            experts, weights = (np.asarray(x).reshape(rows * length, -1) for x in choices)
            np.testing.assert_array_equal(experts, ref[f'{prefix}_experts'][i])
            np.testing.assert_allclose(weights, ref[f'{prefix}_weights'][i], rtol=0, atol=1e-5)
