"""Which model a checkpoint holds, from the names and shapes of its leaves: what import, export and conversion check first."""

import functools
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax

from upcycle import partitioning, schema
from upcycle.errors import DifferentLeaves, UserError
from upcycle.models import BatchSpec, Model

Leaves = Mapping[str, jax.ShapeDtypeStruct]

# Fields of a configuration that change the function and not the shapes of the parameters. In capitals they are macros of gin/.
FACTS = (
    'num_heads',
    'head_dim',
    'mlp_activations',
    'logits_via_embedding',
    'pooling',
    'positions',
    'gelu',
    'norm_epsilon',
)
_POSITION_BIASES = '/relpos_bias/rel_embedding'
_MOE_SEGMENTS = ('expert', 'router', 'shared', 'router_state', 'mixing')


def facts_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's metadata says of the model, by the fields of our configurations."""
    if 'facts' in metadata:
        return dict(metadata['facts'])
    config = metadata.get('model', {}).get('config', {})
    if not isinstance(config, Mapping):
        raise UserError(f'the metadata of the checkpoint is damaged: its model is {schema.shown(config)}.')
    return {name: config[name] for name in FACTS if name in config}


def facts_in(path: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What the names of a checkpoint's leaves say of the model, by the fields of our configurations.

    Raises:
      UserError: the encoder and the decoder of a T5 differ in where their position biases are.
    """
    tables = [name for name in leaves if name.startswith('params/') and name.endswith(_POSITION_BIASES)]
    in_layers = {name for name in tables if '/layers_' in name}
    if not tables:
        return {}
    if len(in_layers) not in (0, len(tables)):
        raise UserError(
            f'{path} has position biases in every layer ({min(in_layers)}) and for a whole stack '
            f'({min({*tables} - in_layers)}), and POSITION_BIASES is one for both stacks.'
        )
    return {'position_biases': 'every_layer' if in_layers else 'shared'}


def different_function(model: Model, facts: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """What a checkpoint says of itself and the model has otherwise; see `require_function`."""
    theirs = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    return {
        name: value
        for name, value in theirs.items()
        if name not in ignored and getattr(model.config, name, value) != value
    }


def require_function(path: str, model: Model, facts: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
    """Compares a model with what a checkpoint says of itself.

    Args:
      path: of the checkpoint, for messages.
      model: the model.
      facts: see `facts_of`.
      ignored: fields that may differ.

    Raises:
      UserError: the model computes another function; the bindings that would fit are named.
    """
    if different := different_function(model, facts, ignored):
        listing = '; '.join(
            f'{name} = {schema.shown(value)}, and the model has {schema.shown(getattr(model.config, name))}'
            for name, value in different.items()
        )
        bindings = ', '.join(f'{name.upper()} = {schema.shown(value)}' for name, value in different.items())
        is_t5_1_0 = facts.get('mlp_activations') in (['relu'], ('relu',)) and facts.get('logits_via_embedding')
        files = ', as models/t5_1_0_base.gin and its other sizes do' if is_t5_1_0 else ''
        raise UserError(f'{path} was made with {listing}: set it in the gin files ({bindings}{files}).')


def smallest_batch(model: Model) -> BatchSpec:
    """A batch that a model takes, to see the shapes of its parameters: its tokens fill GROUPS_MULTIPLE_OF groups."""
    config = model.config
    if model.family == 'vit':
        examples = config.moe.groups_multiple_of if config.moe else 1
        return {'image': ((examples, config.image_size, config.image_size, config.image_channels), 'float32')}
    examples = math.lcm(*(moe.groups_multiple_of for moe in (config.encoder_moe, config.decoder_moe) if moe))
    features = ('encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens')
    return dict.fromkeys(features, ((examples, 1), 'int32'))


def dense_model(path: str, leaves: Leaves, facts: Mapping[str, Any] | None = None) -> Model:
    """The dense model that a checkpoint holds, or was upcycled from.

    Args:
      path: of the checkpoint, for messages.
      leaves: its leaves; of MoE layers the width is read off an expert.
      facts: fields of the configuration that shapes do not tell.

    Raises:
      UserError: it is neither a T5 nor a ViT.
    """
    found = {
        name.removeprefix('params/'): tuple(leaf.shape) for name, leaf in leaves.items() if name.startswith('params/')
    }
    builders = {'token_embedder/embedding': _t5, 'embedding/kernel': _vit}
    build = next((builders[name] for name in builders if name in found), None)
    if build is None:
        raise UserError(f'{path} holds neither a T5 (no token_embedder/embedding) nor a ViT (no embedding/kernel).')
    try:
        return build(path, found, facts_in(path, leaves) | dict(facts or {}))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f'{path} is not a whole model: {error.args[0]} is missing or has another shape.') from error


def check(path: str, leaves: Leaves, facts: Mapping[str, Any] | None = None) -> Model:
    """The dense model of a checkpoint, after its leaves have been compared with that model's.

    MoE layers are only compared among themselves: what they hold is the operators' business.

    Raises:
      UserError: leaves are missing, of another shape, or belong to nothing; all are listed.
    """
    model = dense_model(path, leaves, facts)
    expected = shapes(model)
    sparse = moe_layers(leaves)
    inside = tuple(f'{layer}/' for layer in sparse)
    expected = {name: shape for name, shape in expected.items() if not name.startswith(inside)}
    if 'params/head/kernel' not in leaves:
        # Many vision checkpoints are backbones.
        expected = {name: shape for name, shape in expected.items() if not name.startswith('params/head/')}
    stored = {name: tuple(leaf.shape) for name, leaf in leaves.items() if name.startswith('params/')}
    problems = [f'{name} {shape} is missing' for name, shape in expected.items() if name not in stored]
    for name, shape in stored.items():
        if name.startswith(inside):
            continue
        if name not in expected:
            problems.append(f'{name} {shape} belongs to nothing')
        elif shape != expected[name]:
            problems.append(f'{name} is {shape}, and the other leaves ask for {expected[name]}')
    problems += [problem for layer in sparse for problem in _layer_problems(layer, stored)]
    problems += _state_problems(leaves, stored)
    if problems:
        raise DifferentLeaves(f'{path} is not a whole {model.family}', problems)
    return model


@functools.lru_cache(maxsize=16)
def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters by their names in a checkpoint."""
    spec = smallest_batch(model)
    params = partitioning.unbox(jax.eval_shape(lambda key: model.init(key, spec), jax.random.key(0)))
    return {'params/' + name: tuple(leaf.shape) for name, leaf in _flat(params).items()}


def moe_layers(leaves: Mapping[str, Any]) -> list[str]:
    """Paths of the MoE layers, 'params/encoder/layers_1/mlp', in the order of the checkpoint."""
    return list(dict.fromkeys(_layer_of(name) for name in leaves if name.startswith('params/') and _is_moe(name)))


def _t5(path: str, shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]) -> Model:
    from upcycle.models.encoder_decoder import EncoderDecoderModel
    from upcycle.models.t5 import T5Config

    vocab_size, emb_dim = shapes['token_embedder/embedding']
    first = '/layers_0' if facts.get('position_biases') == 'every_layer' else ''
    heads = shapes[f'encoder{first}{_POSITION_BIASES}'][0]
    joined = shapes['encoder/layers_0/attention/query/kernel'][1]
    gated = any(re.search(r'/mlp/(expert/)?wi_0/kernel$', name) for name in shapes)
    config = {
        'vocab_size': vocab_size,
        'emb_dim': emb_dim,
        'num_heads': heads,
        'head_dim': joined // heads,
        'mlp_dim': _mlp_width(shapes, r'/mlp/(expert/)?wo/kernel$'),
        'num_encoder_layers': _count(shapes, r'encoder/layers_(\d+)/'),
        'num_decoder_layers': _count(shapes, r'decoder/layers_(\d+)/'),
        'mlp_activations': ('gelu', 'linear') if gated else ('relu',),
        'logits_via_embedding': 'decoder/logits_dense/kernel' not in shapes,
        'dtype': 'float32',
    }
    told = _told(T5Config, facts, ('mlp_activations', 'position_biases'))
    return EncoderDecoderModel(T5Config(**config | told))


def _vit(path: str, shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]) -> Model:
    from upcycle.models.image_classifier import ImageClassifier
    from upcycle.models.vit import ViTConfig

    patch, _, channels, emb_dim = shapes['embedding/kernel']
    learned = 'pos_embedding' in shapes
    positions = shapes['pos_embedding'][1] if learned else 1
    grid = math.isqrt(positions)
    if grid * grid != positions:
        raise UserError(
            f'{path} has {positions} positions (pos_embedding), which no square image has, and our ViT takes squares only.'
        )
    config = {
        'num_classes': shapes.get('head/kernel', (0, 1))[1],
        'image_size': grid * patch,
        'patch_size': patch,
        'image_channels': channels,
        'emb_dim': emb_dim,
        'num_heads': shapes['Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel'][1],
        'mlp_dim': _mlp_width(shapes, r'encoderblock_\d+/MlpBlock_0/(expert/)?Dense_1/kernel$'),
        'num_layers': _count(shapes, r'Transformer/encoderblock_(\d+)/'),
        'pooling': 'token' if 'cls' in shapes else 'map' if 'MAPHead_0/probe' in shapes else 'gap',
        'positions': 'learned' if learned else 'sincos2d',
        'representation_size': shapes.get('pre_logits/kernel', (0, None))[1],
        'dtype': 'float32',
    }
    told = _told(ViTConfig, facts, ('gelu', 'norm_epsilon'))
    return ImageClassifier(ViTConfig(**config | told))


def _told(config: type, facts: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What the facts say of these fields of a configuration."""
    told = {name: facts[name] for name in names if name in facts}
    for name, value in told.items():
        if not schema.fits(value, schema.parameters(config)[name].annotation):
            raise ValueError(f'{name} = {schema.shown(value)}, of what it says of itself,')
    return told


def _mlp_width(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """F, of a dense MLP if there is one: experts may be narrower."""
    found = {match[1]: shapes[name] for name in shapes if (match := re.search(pattern, name))}
    return (found.get(None) or found.get('expert/') or shapes[pattern])[-2]


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """How many layers there are, of which each has a parameter."""
    found = {match[1] for name in shapes if (match := re.match(pattern, name))}
    expected = {str(i) for i in range(len(found))}
    if found != expected:
        raise ValueError(f'a layer between 0 and {max(found - expected, key=len)}')
    return len(found)


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, node in tree.items():
        flat |= _flat(node, f'{prefix}{key}/') if isinstance(node, Mapping) else {prefix + key: node}
    return flat


def _is_moe(name: str) -> bool:
    return any(segment in _MOE_SEGMENTS for segment in name.split('/'))


def _layer_of(name: str) -> str:
    segments = name.split('/')
    return '/'.join(segments[: min(segments.index(s) for s in _MOE_SEGMENTS if s in segments)])


def _layer_problems(layer: str, stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    experts = {name: shape for name, shape in stored.items() if name.startswith(f'{layer}/expert/')}
    # A layer that is merged has one number an expert in place of a router.
    routing = (f'{layer}/router/', f'{layer}/mixing')
    routers = {name: shape for name, shape in stored.items() if name.startswith(routing) and shape}
    if not experts or not routers:
        return [f'{layer} has no {"experts" if not experts else "router"}']
    counts = {shape[0] if shape else 0 for shape in experts.values()}
    if len(counts) > 1:
        return [f'{layer}/expert holds {" and ".join(map(str, sorted(counts)))} experts']
    (count,) = counts
    # Soft MoE has a column for each slot of an expert.
    return [f'{name} {shape} does not route to {count} experts' for name, shape in routers.items() if shape[-1] % count]


def _state_problems(leaves: Leaves, stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = []
    for name, leaf in leaves.items():
        if not name.startswith('opt_state/param_states/'):
            continue
        owner, _, slot = name.removeprefix('opt_state/param_states/').rpartition('/')
        shape = stored.get(f'params/{owner}')
        if shape is None:
            problems.append(f'{name} is the state of no parameter')
            continue
        without_one = [shape[:axis] + shape[axis + 1 :] for axis in range(len(shape))]
        if tuple(leaf.shape) not in (without_one if slot in ('v_row', 'v_col') else [shape]):
            problems.append(f'{name} is {tuple(leaf.shape)}, and its parameter is {shape}')
    return problems
