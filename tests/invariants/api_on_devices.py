"""`upcycle.load` and `upcycle.upcycle` on a mesh, for the processes of `devices`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import upcycle
from upcycle import partitioning

TOKENS = {
    'encoder_input_tokens': np.arange(1, 65).reshape(8, 8) % 39 + 1,
    'decoder_input_tokens': np.arange(32).reshape(8, 4) % 39,
}
LEAVES = {'wi': 'EDF', 'wo': 'EFD'}
SURGERY = upcycle.Surgery('drop')


def whole(tree: Any) -> dict[str, np.ndarray]:
    """Leaves on the host, by name."""
    return {name: partitioning.whole_on_host(leaf) for name, leaf in flatten_dict(tree, sep='/').items()}


def ours(path: str, shape: tuple[int, ...] | None) -> dict[str, Any]:
    """A checkpoint loaded, upcycled and applied, on a mesh of that shape or on one device.

    Returns:
      `dense` and `sparse` parameters, `logits`, and `parts`: the largest share of an expert leaf on one device.
    """
    mesh = None if shape is None else partitioning.make_mesh(shape, 4)
    dense, params = upcycle.load(path, mesh=mesh)
    sparse = upcycle.sparse(dense, NUM_EXPERTS=4, GROUPS_MULTIPLE_OF=8)
    made, _ = upcycle.upcycle(params, sparse, SURGERY, key=1, mesh=mesh)
    batch = {name: jnp.asarray(tokens) for name, tokens in TOKENS.items()}
    with partitioning.use(partitioning.make_mesh((1, 1, 1), 4, jax.devices()[:1]) if mesh is None else mesh):
        logits = jax.jit(sparse.logits)(made, batch)
    expert = made['decoder']['layers_1']['mlp']['expert']['wo']['kernel']
    return {
        'dense': whole(params),
        'sparse': whole(made),
        'logits': partitioning.whole_on_host(logits),
        'parts': max(shard.data.size for shard in expert.addressable_shards) / expert.size,
    }


def foreign(shape: tuple[int, ...] | None, axes: str) -> dict[str, Any]:
    """Somebody else's MLP, split along `data` while it is dense, upcycled on a mesh (data, expert) or on one device."""
    rng = np.random.default_rng(0)
    tree = {
        'mlp': {'wi': rng.normal(size=(8, 16)).astype(np.float32), 'wo': rng.normal(size=(16, 8)).astype(np.float32)},
        'norm': {'scale': np.ones(8, np.float32)},
    }
    mesh = None
    if shape is not None:
        mesh = Mesh(np.array(jax.devices()).reshape(shape), ('data', 'expert'), axis_types=(AxisType.Explicit,) * 2)
        split = NamedSharding(mesh, PartitionSpec(None, 'data'))
        tree['mlp'] = {name: jax.device_put(leaf, split) for name, leaf in tree['mlp'].items()}
    rule = upcycle.MoERule(path='mlp', leaves=LEAVES | {'wi': axes}, num_experts=4)
    made, _ = upcycle.upcycle(tree, upcycle.PathRules(moe=rule, keep='norm/*'), SURGERY, key=1, mesh=mesh)
    specs = {} if mesh is None else {name: leaf.sharding.spec for name, leaf in flatten_dict(made, sep='/').items()}
    return {'made': whole(made), 'specs': {name: tuple(spec) for name, spec in specs.items()}}
