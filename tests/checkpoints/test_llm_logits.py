"""Decoder-only folders compute here what they compute in transformers: logits, loss, hidden states, routing and gradients."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import upcycle
from tests.checkpoints import llms
from tests.fixtures import requires_fixtures
from tests.moe.quick import jit
from upcycle.checkpoints import hf, open_checkpoint

pytestmark = requires_fixtures


def _often(names, often):
    """Marks the names that are not in `often` as exhaustive."""
    return [pytest.param(name, marks=() if name in often else pytest.mark.exhaustive) for name in names]


def loss_per_token(logits, ids):
    logp = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return -np.take_along_axis(np.asarray(logp)[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize('name', [*llms.DENSE, *_often(llms.MOE, {'mixtral', 'qwen2_moe', 'granitemoe'})])
def test_a_folder(name):
    ref, batch = llms.reference(name), llms.batch_of(llms.reference(name))
    model, params = upcycle.load(llms.FOLDERS / name)
    out = llms.outputs(model, params, batch)
    rows = len(ref['input_ids'])
    logits = np.asarray(out['logits'])
    np.testing.assert_allclose(logits[:rows], ref['logits'], rtol=0, atol=1e-4)
    mask = ref['attention_mask'].astype(bool)
    np.testing.assert_allclose(logits[rows : 2 * rows][mask], ref['padded_logits'][mask], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[2 * rows :], ref['packed_logits'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(out['loss'], ref['mean_loss'], rtol=0, atol=1e-5)
    loss = loss_per_token(logits[:rows], ref['input_ids'])
    np.testing.assert_allclose(loss, ref['loss_per_token'], rtol=0, atol=1e-4)
    for ours, theirs in zip(out['hidden_states'], ref['hidden_states_row0'], strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=1e-4)
    if 'router_logits' in ref:
        llms.assert_routing(model, out['routers'], ref)
    reader = open_checkpoint(llms.FOLDERS / name)
    grads = flatten_dict(out['grads'], sep='/')
    theirs = {key.removeprefix('grad/'): value for key, value in ref.items() if key.startswith('grad/')}
    assert theirs
    shapes = {key: value.shape for key, value in grads.items()}
    architecture = hf.of_leaves(shapes, reader.metadata)
    table = architecture.table(architecture.sizes_for(shapes, reader.metadata), shapes)
    compared = set()
    for leaf, entry in table.items():
        ours = np.asarray(grads[leaf])
        for row, (tensor, part) in zip(ours if entry.is_stack else [ours], entry.pieces, strict=True):
            if tensor in theirs:
                ours = entry.turn.to_theirs(row)
                expected = theirs[tensor] if part is None else theirs[tensor][part.region].reshape(ours.shape)
                np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * np.abs(expected).max(), err_msg=leaf)
                compared.add(tensor)
    assert compared == theirs.keys()


@pytest.mark.parametrize('name', llms.PAIRS)
def test_the_dense_model_of_a_pair(name):
    ref = llms.reference(f'upcycle_{name}')
    model, params = upcycle.load(llms.FOLDERS / f'upcycle_{name}' / 'dense')
    with jax.default_matmul_precision('highest'):
        logits = np.asarray(jit(model.logits)(params, {'tokens': ref['input_ids'].astype(np.int32)}))
    np.testing.assert_allclose(logits, ref['logits'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss_per_token(logits, ref['input_ids']), ref['loss_per_token'], rtol=0, atol=1e-4)


@pytest.mark.parametrize('pair', _often(llms.PAIRS, {'qwen3_to_qwen3_moe', 'llama_to_jetmoe'}))
def test_the_experts_of_a_pair(pair):
    ref = llms.reference(f'upcycle_{pair}')
    rows, mask = len(ref['input_ids']), ref['attention_mask'].astype(bool)
    tokens = np.concatenate([ref['input_ids'], ref['input_ids']]).astype(np.int32)
    model, params = upcycle.load(llms.FOLDERS / f'upcycle_{pair}' / 'moe')
    with jax.default_matmul_precision('highest'):
        logits = jit(model.logits)(params, {'tokens': tokens, 'mask': np.concatenate([np.ones_like(mask), mask])})
    logits = np.asarray(logits)
    np.testing.assert_allclose(logits[:rows], ref['moe_logits'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[rows:][mask], ref['padded_logits'][mask], rtol=0, atol=1e-4)
