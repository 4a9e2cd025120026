"""Two updates by every optimizer, from one fixed gradient, on several meshes: called in a process with eight devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from tests.moe.quick import jit
from upcycle import partitioning
from upcycle.training.optimizer import Adafactor, AdamW, Sgd

E, D, F, V = 8, 128, 256, 512
OPTIMIZERS = {
    'adafactor': Adafactor(),
    'adafactor with momentum': Adafactor(beta1=0.9, decay_cap=0.999, weight_decay_rate={'kernel': 0.1}),
    'adamw': AdamW(weight_decay_rate=0.1, clip_global_norm=1.0),
    'sgd': Sgd(clip_global_norm=1.0),
}
MESHES = {'one device': (1, 1, 1), '2x4x1': (2, 4, 1), '2x2x2': (2, 2, 2), '1x8x1': (1, 8, 1)}
# Of every layout that the rules make of a parameter one; D, F and V are long enough to be factored.
LEAVES = {
    'expert/wi/kernel': ((E, D, F), ('expert', 'embed', 'expert_mlp')),
    'expert/wo/kernel': ((E, F, D), ('expert', 'expert_mlp', 'embed')),
    'expert/wo/bias': ((E, D), ('expert', 'embed')),
    'router/kernel': ((D, E), ('embed', 'unmodeled')),
    'mlp/wi/kernel': ((D, F), ('embed', 'mlp')),
    'attention/kernel': ((D, D), ('embed', 'joined_kv')),
    'embedding': ((V, D), ('vocab', 'embed')),
    'norm/scale': ((D,), ('embed',)),
}


def _trees():
    """Boxed parameters and a gradient of quite different sizes from leaf to leaf."""
    rng = np.random.default_rng(0)
    params, grads = {}, {}
    for number, (path, (shape, axes)) in enumerate(LEAVES.items()):
        node, other = params, grads
        *folders, name = path.split('/')
        for folder in folders:
            node, other = node.setdefault(folder, {}), other.setdefault(folder, {})
        node[name] = nn.LogicallyPartitioned(rng.normal(size=shape).astype(np.float32), axes)
        other[name] = (10.0 ** (number - 4) * rng.normal(size=shape)).astype(np.float32)
    return params, grads


def _put(tree, specs, mesh):
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


def update(name: str, mesh_name: str, over_data: bool) -> dict[str, np.ndarray]:
    """Parameters and state after two updates on that mesh; `over_data`: with parameters split over data, too."""
    optimizer, shape = OPTIMIZERS[name], MESHES[mesh_name]
    boxed, grads = _trees()
    axes, params = partitioning.batch_axes(boxed), partitioning.unbox(boxed)
    mesh = partitioning.make_mesh(shape, E, jax.devices()[: int(np.prod(shape))])
    with partitioning.use(mesh):
        specs = partitioning.param_specs(boxed, mesh, over_data=over_data)
        state = optimizer.init(params, axes)
        state_specs = optimizer.state_specs(params, specs, axes)

        def twice(params, state):
            for _ in range(2):
                params, state = optimizer.update(grads, state, params, jnp.float32(0.01), axes)
            return params, state

        params, state = jit(twice)(_put(params, specs, mesh), _put(state, state_specs, mesh))
    leaves = flatten_dict({'params': params, 'state': state}, sep='/')
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}
