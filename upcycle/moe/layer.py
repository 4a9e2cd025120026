"""The MoE layer as a Flax module.

Parameters: `router/router_weights/w/kernel` (D, E), `expert/...` with a leading axis E, and with shared experts `shared/...`, one
MLP of their joint width, and perhaps `shared_gate/kernel` (D, 1); perhaps `output_bias` (D,). For `router_state/...` see
`moe.state`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh

from upcycle import partitioning
from upcycle.errors import UserError
from upcycle.moe import all_to_all, ragged
from upcycle.moe.conventions import Exchange
from upcycle.moe.groups import check_groups, layer_name, microbatch_groups
from upcycle.moe.routers.base import MoE, Routed
from upcycle.moe.routers.merged import Merged
from upcycle.moe.routers.top_k import TopK
from upcycle.moe.routing import CHOSEN, Choices, Mixing, Routing, token_sums
from upcycle.moe.state import NAME as STATE
from upcycle.moe.state import OUTPUT_COUNT, OUTPUT_SUM, RouterState

# The variable collection of a layer's routing metrics.
METRICS = 'moe_metrics'


class RouterWeights(nn.Module):
    """Logits of a linear router, in float32; cosines instead of products with `cosine`. Named as in flaxformer.

    `precision='highest'`, because a TPU multiplies float32 in bfloat16 by default.
    """

    num_logits: int
    init_stddev: float
    cosine: bool = False
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_stddev), ('embed', 'unmodeled'))
        dense = nn.Dense(
            self.num_logits,
            use_bias=self.use_bias,
            dtype=jnp.float32,
            precision='highest',
            kernel_init=init,
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('unmodeled',)),
            dot_general=_cosines if self.cosine else None,
            name='w',
        )
        return dense(x_BxLxD)


def _cosines(x_BxLxD: jax.Array, kernel_DxN: jax.Array, *dot_general: Any, **options: Any) -> jax.Array:
    """Computes the cosines of the input and each column of the kernel, as a `dot_general` of `nn.Dense`."""

    def unit(v: jax.Array, axis: int) -> jax.Array:
        return v * jax.lax.rsqrt(jnp.square(v).sum(axis=axis, keepdims=True) + 1e-12)

    return jax.lax.dot_general(unit(x_BxLxD, -1), unit(kernel_DxN, 0), *dot_general, **options)


class Router(nn.Module):
    """Jitter, then logits in float32: (B, L, D) -> (B, L, E), linear; for Soft MoE (B, L, E * C), scaled cosines."""

    config: Routed

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, *, training: bool) -> jax.Array:
        config = self.config
        x_BxLxD = x_BxLxD.astype(jnp.float32)
        jitter = config.jitter_noise
        if training and jitter > 0:
            x_BxLxD *= jax.random.uniform(
                self.make_rng('jitter'), x_BxLxD.shape, minval=1.0 - jitter, maxval=1.0 + jitter
            )
        weights = RouterWeights(
            config.num_logits, config.router_init_stddev, config.cosine, config.logits_have_bias, name='router_weights'
        )
        if config.cosine:
            scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, ()), (), jnp.float32)
            return scale * weights(x_BxLxD)
        return weights(x_BxLxD)


class _SharedGate(nn.Module):
    """The weight of the shared experts for each token, a sigmoid in float32: (B, L, D) -> (B, L).

    As `shared_expert_gate` of transformers' `Qwen2MoeSparseMoeBlock`. It starts at 0, with a weight of one half.
    """

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, ('embed', 'unmodeled'))
        kernel_Dx1 = self.param('kernel', init, (x_BxLxD.shape[-1], 1), jnp.float32)
        return jax.nn.sigmoid(jnp.dot(x_BxLxD.astype(jnp.float32), kernel_Dx1, precision='highest')[..., 0])


class MoELayer(nn.Module):
    """Replaces a dense MLP by E copies of it, each on the tokens that the router sends it.

    Attributes:
      config: router, capacity and conventions.
      expert: class of the dense MLP, called as (x, training) and mapped over a leading expert axis. Dropless layers call it once
        for all experts, with `group_sizes`.
      expert_arguments: its constructor's arguments.
      shared_arguments: arguments of the one MLP that is all shared experts; None without shared experts.
      output_bias: add a bias to the layer's output, whatever experts took a token.
    """

    config: MoE
    expert: type[nn.Module]
    expert_arguments: Mapping[str, Any]
    shared_arguments: Mapping[str, Any] | None = None
    output_bias: bool = False

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, real_BxL: jax.Array, *, training: bool, decoding: bool = False) -> jax.Array:
        """Applies the layer.

        Args:
          x_BxLxD: tokens, flattened to (B * L) and cut into contiguous groups.
          real_BxL: bool, False at padding.
          training: selects the capacity factor, and turns jitter and expert dropout on.
          decoding: one position at a time against a cache; dropless, since a batch of single tokens has no length to average
            the load over.

        Returns:
          (B, L, D) in the dtype of the input; without shared experts and bias 0 for a token that no expert took.

        Raises:
          UserError: the tokens do not divide into the groups asked for, or the groups not among the devices of the mesh.
        """
        config = self.config.when(training=training)
        if config.num_shared_experts and self.shared_arguments is None:
            raise ValueError('num_shared_experts is set, but the layer has no shared_arguments.')
        if isinstance(config, Merged):
            y_BxLxD = self._merged(x_BxLxD, real_BxL, training)
        else:
            y_BxLxD = self._routed(config, x_BxLxD, real_BxL, training, decoding)
        return with_output_bias(self, y_BxLxD) if self.output_bias else y_BxLxD

    def _routed(
        self, config: Routed, x_BxLxD: jax.Array, real_BxL: jax.Array, training: bool, decoding: bool
    ) -> jax.Array:
        B, L, D = x_BxLxD.shape
        scores = scores_of(self, config, x_BxLxD, real_BxL, training=training, decoding=decoding)
        if config.dropless:
            y_BxLxD, choices = self._dropless(x_BxLxD, scores, real_BxL, training and not decoding)
            return self._with_shared(y_BxLxD, x_BxLxD, choices, training)

        G, mesh, state = scores.groups, scores.mesh, scores.state
        C = B * L // G if decoding else config.capacity(B * L // G, training=training)
        x_ExGxCxD, routing, metrics = all_to_all.dispatch_tokens(
            x_BxLxD, scores.logits_BxLxE, real_BxL, config, G, C, mesh, state.get('bias')
        )
        _log(self, metrics, routing, scores)
        y_ExGxCxD = self._apply_experts(x_ExGxCxD, training)
        default_ExD = state.get('default_output')
        if default_ExD is not None:
            # Every expert answers every token with its default; one that took the token adds its output's difference to it.
            if training:
                _record(self, _outputs(y_ExGxCxD, routing, B * L // G))
            y_ExGxCxD -= default_ExD[:, None, None].astype(y_ExGxCxD.dtype)
        y_BxLxD = all_to_all.combine_outputs(y_ExGxCxD, routing, (B, L, D), config, mesh)
        if default_ExD is not None:
            y_BxLxD += (config.probabilities(scores.logits_BxLxE, real_BxL) @ default_ExD).astype(y_BxLxD.dtype)
        return self._with_shared(y_BxLxD, x_BxLxD, routing, training)

    def _merged(self, x_BxLxD: jax.Array, real_BxL: jax.Array, training: bool) -> jax.Array:
        """Applies one MLP: lambda * shared + (1 - lambda) * sum_e softmax(a)_e W_e (XFT, arXiv 2404.15247, section 3.2)."""
        config, D = self.config, x_BxLxD.shape[-1]
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        mixing_E = self.param('mixing', zeros, (config.num_experts,), jnp.float32)
        if self.is_initializing():
            self._apply_experts(jnp.zeros((config.num_experts, 1, 1, D), x_BxLxD.dtype), training)
            if self.shared_arguments is not None:
                self.expert(**self.shared_arguments, name='shared')(x_BxLxD, training)
            return x_BxLxD
        share_E = jax.nn.softmax(mixing_E)
        merged = jax.tree.map(
            lambda leaf: jnp.tensordot(share_E, leaf.astype(jnp.float32), axes=1), self.get_variable('params', 'expert')
        )
        if self.shared_arguments is not None:
            share = config.merged_shared_weight
            shared = self.get_variable('params', 'shared')
            merged = jax.tree.map(lambda a, b: share * a + (1.0 - share) * b, shared, merged)
        rngs = {'dropout': self.make_rng('dropout')} if self.has_rng('dropout') else {}
        module = self.expert(**self.expert_arguments, parent=None)
        self.sow('intermediates', 'routing', Mixing(real_BxL[..., None] * 1.0, real_BxL[..., None] * 1.0))
        self.sow('intermediates', 'token_weight', real_BxL * 1.0)
        return module.apply({'params': merged}, x_BxLxD, training, rngs=rngs)

    def _apply_experts(self, x_ExGxCxD: jax.Array, training: bool) -> jax.Array:
        E, G, C, D = x_ExGxCxD.shape
        experts = nn.vmap(
            self.expert,
            in_axes=(0, None),
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            axis_size=E,
            metadata_params={nn.PARTITION_NAME: 'expert'},
        )
        y_ExNxD = experts(**self.expert_arguments, name='expert')(x_ExGxCxD.reshape(E, G * C, D), training)
        return y_ExNxD.reshape(x_ExGxCxD.shape)

    def _with_shared(
        self, y_BxLxD: jax.Array, x_BxLxD: jax.Array, routing: Routing | Choices | Mixing, training: bool
    ) -> jax.Array:
        """Adds the shared experts, and sows the sum of all of a token's weights into the intermediates."""
        if self.shared_arguments is None and not self.is_mutable_collection('intermediates'):
            return y_BxLxD
        weight_BxL = token_sums(routing, x_BxLxD.shape[0] * x_BxLxD.shape[1] // routing[0].shape[0])
        weight_BxL = weight_BxL.reshape(x_BxLxD.shape[:2])
        if self.shared_arguments is not None:
            shared_BxL = 1.0 - weight_BxL if self.config.leaves_the_rest else jnp.ones_like(weight_BxL)
            if self.config.shared_gate:
                shared_BxL = shared_BxL * _SharedGate(name='shared_gate')(x_BxLxD)
            shared_BxLxD = self.expert(**self.shared_arguments, name='shared')(x_BxLxD, training)
            y_BxLxD += shared_BxLxD * shared_BxL[..., None].astype(y_BxLxD.dtype)
            weight_BxL += shared_BxL
        self.sow('intermediates', 'token_weight', weight_BxL)
        return y_BxLxD

    def _dropless(
        self, x_BxLxD: jax.Array, scores: 'Scores', real_BxL: jax.Array, training: bool
    ) -> tuple[jax.Array, Choices]:
        if training and scores.mesh is not None and self.expert_arguments.get('dropout_rate', 0.0) > 0:
            raise UserError(
                "DISPATCH = 'ragged' on several devices would draw an expert dropout that depends on the mesh: set "
                "EXPERT_DROPOUT_RATE = 0, or use 'gather'."
            )
        choices = choices_of(self, self.config, scores, real_BxL)
        if self.is_initializing():
            self._apply_experts(jnp.zeros((self.config.num_experts, 1, 1, x_BxLxD.shape[-1]), x_BxLxD.dtype), training)
            return x_BxLxD, choices
        rngs = {'dropout': self.make_rng('dropout')} if self.has_rng('dropout') else {}

        def experts(params: Any, x_RxD: jax.Array, sizes_E: jax.Array) -> jax.Array:
            module = self.expert(**self.expert_arguments, parent=None)
            return module.apply({'params': params}, x_RxD, training, group_sizes=sizes_E, rngs=rngs)

        axes = None
        if scores.mesh is not None and partitioning.experts_are_over_data():
            expert = self.expert(**self.expert_arguments, parent=None)
            one = jax.eval_shape(lambda key: expert.init(key, x_BxLxD[:1, 0], False), jax.random.key(0))
            axes = partitioning.logical_axes(one['params'])
        params = self.get_variable('params', 'expert')
        exchange = self.config.exchange if training else Exchange.RING
        y_BxLxD, dropped = ragged.exchange_and_apply(
            experts, params, x_BxLxD, choices, self.config, scores.mesh, exchange, axes=axes
        )
        if exchange is not Exchange.RING:
            wanted = (choices.expert_GxSxK < self.config.num_experts).sum()
            _record(self, {'fraction_dropped': dropped / jnp.maximum(wanted, 1)})
        return y_BxLxD, choices


def with_output_bias(module: nn.Module, y_BxLxD: jax.Array) -> jax.Array:
    """Adds the parameter `output_bias` (D,) of `module` to its output."""
    init = nn.with_logical_partitioning(nn.initializers.zeros, ('embed',))
    return y_BxLxD + module.param('output_bias', init, y_BxLxD.shape[-1:], jnp.float32).astype(y_BxLxD.dtype)


class Scores(NamedTuple):
    """What a layer routes by.

    Attributes:
      logits_BxLxE: of the router, with noise.
      groups: G, the number of routing groups.
      mesh: in use; None if the compiler partitions the layer, or for one device.
      balance: see `Routed.balance_loss_of`.
      state: see `moe.state`.
    """

    logits_BxLxE: jax.Array
    groups: int
    mesh: AbstractMesh | None
    balance: jax.Array | None
    state: Mapping[str, jax.Array]


def scores_of(
    module: nn.Module, config: Routed, x_BxLxD: jax.Array, real_BxL: jax.Array, *, training: bool, decoding: bool
) -> Scores:
    """Applies the router of a layer, which is called in the compact method of `module`; see `MoELayer.__call__`."""
    B, L, D = x_BxLxD.shape
    mesh = partitioning.current_mesh()
    shards = partitioning.batch_shards(mesh)
    if decoding:
        # Nothing is dropped, so groups do not matter. The compiler partitions a batch that does not divide.
        G = shards if B % shards == 0 else 1
        mesh = mesh if B % shards == 0 else None
    else:
        G = microbatch_groups(config, B, L)
        if not config.dropless:
            check_groups(G, shards)
    clean_BxLxE = logits_BxLxE = Router(config, name='router')(x_BxLxD, training=training)
    noisy = training and config.noise_stddev > 0
    if noisy:
        noise_BxLxE = jax.random.normal(module.make_rng('jitter'), logits_BxLxE.shape)
        logits_BxLxE = logits_BxLxE + config.noise_stddev * noise_BxLxE
    state = RouterState(config, name=STATE)(D)
    clean_GxSxE, noisy_GxSxE, real_GxS = (x.reshape(G, -1, *x.shape[2:]) for x in (clean_BxLxE, logits_BxLxE, real_BxL))
    balance = config.balance_loss_of(clean_GxSxE, noisy_GxSxE if noisy else None, real_GxS)
    return Scores(logits_BxLxE, G, mesh, balance, state)


def choices_of(module: nn.Module, config: TopK, scores: Scores, real_BxL: jax.Array) -> Choices:
    """Chooses the experts of a dropless layer, (B, L, K), and logs them in the variables of `module`."""
    B, L, E = scores.logits_BxLxE.shape
    # Groups only matter to the balance loss, which is a mean over them; routing is token by token.
    choices, metrics = config.route_dropless(
        scores.logits_BxLxE.reshape(scores.groups, -1, E),
        real_BxL.reshape(scores.groups, -1),
        scores.state.get('bias'),
    )
    _log(module, metrics, choices, scores)
    return Choices(*(x.reshape(B, L, config.num_selected_experts) for x in choices))


def _log(module: nn.Module, metrics: dict[str, jax.Array], routing: Any, scores: Scores) -> None:
    loss = metrics['auxiliary_loss'] if scores.balance is None else scores.balance
    _record(module, metrics | {'auxiliary_loss': loss * scores.state.get('loss_weight', 1.0)})
    module.sow('intermediates', 'routing', routing)


def _record(module: nn.Module, metrics: dict[str, jax.Array]) -> None:
    if module.is_mutable_collection(METRICS):
        for name, value in metrics.items():
            module.put_variable(METRICS, name, value)


def _outputs(y_ExGxCxD: jax.Array, routing: Routing, num_tokens: int) -> dict[str, jax.Array]:
    """Sums each expert's outputs over its full slots, and counts these."""
    used_ExGxC = (routing.token_GxExC < num_tokens).swapaxes(0, 1).astype(jnp.float32)
    sum_ExD = jnp.einsum('egcd,egc->ed', y_ExGxCxD.astype(jnp.float32), used_ExGxC)
    return jax.lax.stop_gradient({OUTPUT_SUM: sum_ExD, OUTPUT_COUNT: used_ExGxC.sum(axis=(1, 2))})


def replace_mlp(
    moe: MoE,
    mlp: type[nn.Module],
    arguments: Mapping[str, Any],
    expert_arguments: Mapping[str, Any],
    name: str | None = None,
    *,
    output_bias: bool = False,
) -> MoELayer:
    """Returns the MoE layer that replaces an MLP.

    Args:
      moe: configuration of the layer.
      mlp: class of the MLP.
      arguments: of the dense MLP.
      expert_arguments: arguments that differ for experts; a `dropout_rate` of None does not.
      name: of the module.
      output_bias: see `MoELayer`.
    """
    narrow = {'mlp_dim': moe.expert_width(arguments['mlp_dim']), 'embed_axis': 'mlp_embed', 'mlp_axis': 'expert_mlp'}
    expert = {**arguments, **expert_arguments, **narrow}
    if expert['dropout_rate'] is None:
        expert['dropout_rate'] = arguments['dropout_rate']
    shared = moe.shared_width(arguments['mlp_dim'])
    shared_arguments = {**arguments, 'mlp_dim': shared} if shared else None
    return MoELayer(moe, mlp, expert, shared_arguments, output_bias, name=name)


def moe_metrics(written: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Names routing metrics for the log: their means over all MoE layers, and each layer's own.

    The mean of `auxiliary_loss` counts Expert Choice layers as 0, as flaxformer's does.

    Args:
      written: the collection `METRICS` of a model.
    """
    by_layer: dict[str, dict[str, jax.Array]] = {}
    for (*path, name), value in flatten_dict(dict(written)).items():
        by_layer.setdefault(name, {})[layer_name('/'.join(path))] = value
    metrics = {}
    for name, layers in by_layer.items():
        if name not in ('load', OUTPUT_SUM, OUTPUT_COUNT, CHOSEN):
            metrics[f'experts/{name}'] = sum(layers.values()) / len(layers)
        metrics |= {f'experts/{layer}/{name}': value for layer, value in layers.items()}
    return metrics
