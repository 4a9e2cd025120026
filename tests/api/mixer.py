"""A foreign MLP-Mixer in Flax linen, dense and sparse, independent of this package."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(self.width)(x))
        return nn.Dense(x.shape[-1])(y)


class Moe(nn.Module):
    """Top-2 without drops."""

    width: int
    num_experts: int

    @nn.compact
    def __call__(self, x):
        probs = nn.softmax(nn.Dense(self.num_experts, use_bias=False, name='router')(x))
        weights, chosen = jax.lax.top_k(probs, 2)
        weights = weights / weights.sum(-1, keepdims=True)
        experts = nn.vmap(Mlp, in_axes=None, out_axes=-2, variable_axes={'params': 0}, split_rngs={'params': True},
                          axis_size=self.num_experts)  # fmt: skip
        y = experts(self.width, name='experts')(x)
        combine = (jax.nn.one_hot(chosen, self.num_experts) * weights[..., None]).sum(-2)
        return jnp.einsum('ble,bled->bld', combine, y)


class Mixer(nn.Module):
    """Patches, token and channel mixing blocks, mean, head."""

    depth: int = 4
    width: int = 16
    sparse_layers: tuple = ()
    num_experts: int = 4

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(self.width, (4, 4), strides=(4, 4), name='stem')(image)
        x = x.reshape(x.shape[0], -1, self.width)
        for i in range(self.depth):
            x = Block(self.width, i in self.sparse_layers, self.num_experts, name=f'block_{i}')(x)
        return nn.Dense(10, name='head')(nn.LayerNorm(name='norm')(x).mean(axis=1))


class Block(nn.Module):
    width: int
    is_sparse: bool
    num_experts: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + Mlp(8, name='token_mixing')(y).swapaxes(1, 2)
        mlp = Moe(32, self.num_experts, name='mlp') if self.is_sparse else Mlp(32, name='mlp')
        return x + mlp(nn.LayerNorm()(x))
