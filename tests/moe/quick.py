"""What keeps the tests of small models quick: parameters without a compiled initialisation, and a compiler in a hurry."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# A third of the compile time. What is compiled here runs once or twice.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def fan_in(path, shape):
    """Inputs of a kernel; ViT's attention and patches have kernels of several input or output axes."""
    if len(shape) == 3 and path[-2:-1] in (('query',), ('key',), ('value',)):
        return shape[0]
    return int(np.prod(shape[:-1])) if len(shape) == 4 or path[-2:-1] == ('out',) else shape[-2]


def random_params(module, *args, seed=0, **kwargs):
    """Parameters of a Flax module for these inputs, drawn by NumPy: kernels of variance 1 / fan-in, scales around 1."""
    shapes = nn.unbox(jax.eval_shape(functools.partial(module.init, jax.random.key(0), **kwargs), *args))['params']
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        normal = rng.normal(size=shape)
        if path[-1] == 'scale' or not shape:  # one number that routing keeps
            return 1 + 0.1 * normal
        if path[-1] in ('rel_embedding', 'bias', 'output_bias', 'mixing'):
            return 0.3 * normal
        if path[-1] == 'embedding':
            return normal
        normal /= np.sqrt(fan_in(path, shape))
        return normal / 4 if path[-2:-1] == ('query',) else normal

    return unflatten_dict(
        {path: jnp.asarray(draw(path, leaf.shape), jnp.float32) for path, leaf in flatten_dict(shapes).items()}
    )
