"""One training step's loss, gradients and metrics on a mesh: called in processes with several devices; see `devices.py`."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from tests.moe.quick import jit, random_params
from tests.small import (
    image_batch,
    llm_batch,
    llm_moe,
    module_inputs,
    random_batch,
    real_tokens,
    small_llm,
    small_t5,
    small_vit,
    spec_of,
    vit_moe,
    with_moe,
)
from upcycle import partitioning, platforms
from upcycle.data import WHOLE
from upcycle.evaluate import token_statistics
from upcycle.models.causal_lm import CausalLM
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.head import Head, head_sums
from upcycle.models.image_classifier import ImageClassifier
from upcycle.models.layers import attention, products_with_columns
from upcycle.moe.config import changed
from upcycle.moe.conventions import AdaptiveBalance, RouterType
from upcycle.moe.groups import num_groups
from upcycle.moe.layer import Router
from upcycle.training.step import TrainState, train_step

MESHES = {
    'one device': (1, 1, 1),
    '8x1x1': (8, 1, 1),
    '1x8x1': (1, 8, 1),
    '2x4x1': (2, 4, 1),
    '2x2x2': (2, 2, 2),
    '1x4x2': (1, 4, 2),
}
# What splits in all three ways.
ALL_AXES = '2x2x2'
T5 = small_t5(emb_dim=32, mlp_dim=64, num_heads=2, head_dim=16)
# Entries of a vocabulary.
CHUNK = 50
# One layer a stack, and it is sparse.
SPARSE = {f'num_{stack}_layers': 1 for stack in ('encoder', 'decoder')} | {
    f'{stack}_moe_layers': (0,) for stack in ('encoder', 'decoder')
}


def _model(encoder: dict, decoder: dict, logits_chunk: int | None = None, **fields) -> EncoderDecoderModel:
    moe = with_moe(T5, num_experts=8, group_size=32, groups_multiple_of=8)
    moe = dataclasses.replace(
        moe,
        encoder_moe=changed(moe.encoder_moe, **encoder),
        decoder_moe=changed(moe.decoder_moe, **decoder),
        **fields,
    )
    return EncoderDecoderModel(moe, aux_loss_factor=1.0, router_z_loss_factor=0.1, logits_chunk=logits_chunk)


def _vit(fields: dict, **moe) -> ImageClassifier:
    config = small_vit(
        emb_dim=32, mlp_dim=64, num_heads=2, pooling='map', num_layers=4 if 'scan_layers' in fields else 2
    )
    moe = vit_moe(**{'groups_multiple_of': 8, **moe})
    config = dataclasses.replace(config, moe=moe, group_images=2, **fields)
    return ImageClassifier(config, aux_loss_factor=1.0, router_z_loss_factor=0.1)


def _llm(moe: dict, *, attention_experts: bool = False, **fields) -> CausalLM:
    moe = llm_moe(**{'num_experts': 8, 'groups_multiple_of': 8, 'group_size': 32, **moe})
    # Half of the vocabulary is a prime number of entries.
    config = small_llm(vocab_size=134, moe=moe, attention_moe=moe if attention_experts else None, **fields)
    return CausalLM(config, aux_loss_factor=1.0, router_z_loss_factor=0.1, z_loss=0.01, logits_chunk=CHUNK)


NORMALIZED = {'normalize_combine_weights': True}
BALANCED = {'balance_bias_rate': 0.01, 'adaptive_balance': AdaptiveBalance()}
SHARED = {'num_shared_experts': 1}
SHARED_GATED = SHARED | {'shared_gate': True, 'router_bias': True, 'weight_scale': 0.5}
SHARED_XFT = {'num_shared_experts': 2, 'granularity': 2, 'shared_weights': 'xft'}
# Name: model, microbatches, parameters split over data.
CASES = {
    'gather': (_model({}, {}), 1, False),
    'einsum': (_model({'dispatch': 'einsum'}, {'dispatch': 'einsum'}), 1, False),
    'soft, and balanced top 2': (
        _model({'router': 'soft', 'slots_per_expert': 2}, NORMALIZED | BALANCED, **SPARSE),
        1,
        False,
    ),
    'ragged': (
        _model({'router': 'top_k', 'dispatch': 'ragged'}, {'dispatch': 'ragged'} | NORMALIZED, **SPARSE),
        1,
        False,
    ),
    'microbatches over split parameters': (
        _model({'groups_multiple_of': 16}, {'groups_multiple_of': 16, 'default_output_decay': 0.9}, CHUNK, **SPARSE),
        2,
        True,
    ),
    'scanned and rematerialised': (
        _model(SHARED_XFT, SHARED | {'dispatch': 'ragged'}, num_encoder_layers=4, scan_layers=True, remat='exchange'),
        1,
        True,
    ),
    'scanned, all computed again': (
        _model(
            {'groups_multiple_of': 16},
            {'groups_multiple_of': 16},
            num_encoder_layers=4,
            num_decoder_layers=2,
            scan_layers=True,
            remat='full',
        ),
        2,
        True,
    ),
    'vit': (_vit({}), 1, False),
    'llm': (
        _llm(
            SHARED_GATED,
            window=5,
            window_layers=(0,),
            qk_norm='projection',
            qkv_bias=True,
            mlp_bias=True,
            moe_layers=(1,),
        ),
        1,
        False,
    ),
    'llm, scanned over split parameters': (
        _llm(
            {'groups_multiple_of': 16},
            tied_embeddings=True,
            attention_experts=True,
            moe_output_bias=True,
            scan_layers=True,
            remat='full',
        ),
        2,
        True,
    ),
    'vit, top 2': (
        _vit(
            {'scan_layers': True},
            router='top_k',
            fill_order='priority',
            balance_loss='importance_load',
            groups_multiple_of=16,
        ),
        2,
        True,
    ),
}
# Of these also what each expert reads: with slots, and without.
LOOKED_AT = {'gather', 'ragged'}
# Forms of the program, which are compared on two meshes; routers and dispatches on all.
FORMS = {
    'microbatches over split parameters',
    'scanned and rematerialised',
    'scanned, all computed again',
    'vit, top 2',
    'llm, scanned over split parameters',
}


def meshes_of(case: str) -> list[str]:
    """The names of the meshes that a case is compared on with one device."""
    return ['2x4x1', ALL_AXES] if case in FORMS else [name for name in MESHES if name != 'one device']


class Gradients:
    """In place of an optimizer: the "parameters" after a step are the gradients."""

    def update(self, grads, state, params, learning_rate, batch_axes):
        return grads, state


def step(case: str, mesh_shape: str | tuple[int, int, int], *, kernels: bool = False) -> dict[str, np.ndarray]:
    """`gradient|PATH` and `metric|NAME` of a case's step on that mesh, or that of `MESHES`, of the devices of all processes.

    With `kernels` attention is that of TPUs, in interpret mode.
    """
    model, microbatches, over_data = CASES[case]
    batch, params, boxed = _inputs(case)
    shape = MESHES.get(mesh_shape, mesh_shape)
    mesh = partitioning.make_mesh(shape, 8, platforms.devices()[: int(np.prod(shape))])
    with partitioning.use(mesh, over_data=over_data), mock.patch.object(attention, 'interpreted', kernels):
        specs = partitioning.param_specs(boxed, mesh, over_data=over_data)
        state, metrics = _step(model, params, specs, batch, mesh, microbatches, look=case in LOOKED_AT)
    return {
        f'{kind}|{path}': np.asarray(value)
        for kind, found in (('gradient', flatten_dict(state.params, sep='/')), ('metric', metrics))
        for path, value in multihost_utils.process_allgather(dict(found), tiled=True).items()
    }


@functools.cache
def _inputs(case: str):
    """Batch and parameters of a case, and its parameters' shapes with their logical axes."""
    model = CASES[case][0]
    batch, params = jax.device_get(_inputs_with_margins(model))
    return batch, params, jax.eval_shape(lambda key: model.init(key, spec_of(batch)), jax.random.key(0))


def _step(model, params, specs, batch, mesh, microbatches, look):
    params = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)
    whole = partitioning.replicated(mesh)
    state = TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), whole),
        params=params,
        opt_state={},
        rng=jax.device_put(jax.random.key_data(jax.random.key(0)), whole),
    )
    batch = partitioning.put_batch(batch, partitioning.batch_sharding(mesh), WHOLE)
    step = functools.partial(
        train_step,
        model=model,
        optimizer=Gradients(),
        learning_rate=lambda step: jnp.zeros(()),
        batch_axes=None,
        num_microbatches=microbatches,
    )
    state, metrics = jit(step)(state, batch)
    return state, metrics | (token_statistics.compiled(model)(params, batch) if look else {})


def _inputs_with_margins(model):
    """The first batch in which no choice of a router is closer than 1e-4 (in probability) to going the other way."""
    looped = dataclasses.replace(model.config, scan_layers=False, remat='none')
    plain = dataclasses.replace(model, config=looped)
    params = random_params(plain.module(), **module_inputs(_batch(plain, 0)))

    @jit
    def margin(batch):
        _, written = plain.module().apply(
            {'params': params},
            **module_inputs(batch),
            training=True,
            capture_intermediates=lambda module, _: isinstance(module, Router),
            mutable=['intermediates'],
        )
        margins = []
        for path, moe in plain.moe_layers().items():
            node = written['intermediates']
            for key in path.split('/'):
                node = node[key]
            logits_BxLxE = node['router']['__call__'][0]
            real_BxL = real_tokens(batch, path, logits_BxLxE.shape[1])
            bias_E = functools.reduce(dict.get, path.split('/'), params).get('router_state', {}).get('bias', 0.0)
            if moe.router is not RouterType.SOFT:
                margins.append(_margin(moe, logits_BxLxE, real_BxL, bias_E))
        return jnp.stack(margins).min()

    for seed in range(200):
        batch = _batch(plain, seed)
        if margin(batch) > 1e-4:
            return batch, params
    raise AssertionError('no batch without close calls among 200')


def _batch(model, seed):
    if model.family == 'vit':
        return image_batch(model.config, batch=16, seed=seed, filled=1)
    if model.family == 'llm':
        return llm_batch(batch=16, seed=seed)
    return random_batch(batch=16, inputs=16, targets=8, padding=3, seed=seed)


def _margin(moe, logits_BxLxE, real_BxL, bias_E):
    groups = num_groups(real_BxL.size, moe.group_size, moe.groups_multiple_of)
    probs_GxSxE = jax.nn.softmax(logits_BxLxE).reshape(groups, -1, moe.num_experts)
    real_GxS = real_BxL.reshape(groups, -1)
    if moe.router is RouterType.EXPERT_CHOICE:
        C = moe.capacity(probs_GxSxE.shape[1], training=True)
        sorted_GxExS = -jnp.sort(-jnp.where(real_GxS[..., None], probs_GxSxE, -1.0), axis=1)
        return (sorted_GxExS[:, C - 1] - sorted_GxExS[:, C]).min()
    sorted_GxSxE = -jnp.sort(-(probs_GxSxE + bias_E), axis=-1)
    gaps_GxSxK = sorted_GxSxE[..., : moe.num_selected_experts] - sorted_GxSxE[..., 1 : moe.num_selected_experts + 1]
    return jnp.where(real_GxS[..., None], gaps_GxSxK, 1.0).min()


def loss_in_chunks(chunk: int) -> str:
    """The compiled gradient of a head's loss on the mesh that splits everything: 16 rows of 2 tokens, 12 x 130 kernel."""
    mesh = partitioning.make_mesh(MESHES[ALL_AXES], None)
    rows = partitioning.batch_sharding(mesh)

    def loss(kernel, x, targets):
        head = Head(kernel, ('embed', 'vocab'), products_with_columns)
        return head_sums(head, x, targets, targets, chunk=chunk, z_loss=0.0, label_smoothing=0.0)['loss']

    with partitioning.use(mesh):
        columns = NamedSharding(mesh, PartitionSpec(None, 'model'))
        kernel = jax.ShapeDtypeStruct((12, 130), jnp.float32, sharding=columns)
        x = jax.ShapeDtypeStruct((16, 2, 12), jnp.float32, sharding=rows)
        targets = jax.ShapeDtypeStruct((16, 2), jnp.int32, sharding=rows)
        gradient = jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(columns, rows))
        return gradient.lower(kernel, x, targets).compile().as_text()
