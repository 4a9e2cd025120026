"""Generation on a mesh: called in a process with eight devices; see `devices.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from tests.moe.quick import random_params
from tests.small import llm_moe, small_llm
from upcycle import partitioning, platforms
from upcycle.models.causal_lm import CausalLM

MODEL = CausalLM(small_llm(moe=llm_moe(num_experts=8)))


def generate(shape: tuple[int, int, int], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and scores of prompts of different lengths, on a mesh with sharded parameters."""
    params = random_params(MODEL.module(), jnp.ones((2, 8), jnp.int32))
    boxed = jax.eval_shape(lambda key: MODEL.init(key, MODEL.smallest_batch()), jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 128, (rows, 6)), rng.integers(1, 7, rows)
    mesh = partitioning.make_mesh(shape, 8, platforms.devices()[: int(np.prod(shape))])
    with partitioning.use(mesh):
        specs = partitioning.param_specs(boxed, mesh)
        params = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)
        made = MODEL.generate(params, tokens, np.arange(6) < lengths[:, None], max_new_tokens=4)
        return np.asarray(made.tokens), np.asarray(made.scores)
