"""The base of all decoder-only architectures: fields of config.json, tensors, and the choice of a layout for writing.

A layout can store a model if reading the config.json that the layout writes gives the model's facts again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints import json_files, views
from upcycle.checkpoints.hf.architecture import LINEAR, Architecture, Config, Entry, Shapes, Table, Tensors
from upcycle.checkpoints.hf.decoder_only import equal_experts, refusal, rope, tensors
from upcycle.checkpoints.hf.decoder_only import facts as facts_lib
from upcycle.checkpoints.hf.decoder_only.facts import Facts
from upcycle.checkpoints.hf.decoder_only.tensors import EMBEDDING, HEAD, NORMS, Leaf, linear
from upcycle.checkpoints.hf.sources import CONFIG, required
from upcycle.errors import UserError

ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'relu': 'relu'}
ACTIVATIONS |= dict.fromkeys(('gelu_pytorch_tanh', 'gelu_new', 'gelu_fast'), 'gelu')
_SPELLED = {'silu': 'silu', 'relu': 'relu', 'gelu': 'gelu_pytorch_tanh'}
# Buffers of RoPE, in files of transformers before 4.32.
_FREQUENCIES = re.compile(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq')
# Fields that a folder's next user needs and that do not change the logits: kept for writing.
KEPT: Mapping[str, Any] = {
    'max_position_embeddings': schema.Count,
    **json_files.TOKEN_IDS,
    **dict.fromkeys(('initializer_range', 'attention_dropout'), float),
    **dict.fromkeys(('router_aux_loss_coef', 'aux_loss_coef', 'router_jitter_noise'), float),
}
# Fields that do not change the logits: identifiers of tokens, other heads, training, lengths of tokenizers and files, kernels,
# other programs.
_HARMLESS = """
    unk_token_id decoder_start_token_id id2label num_labels is_decoder tie_encoder_decoder
    resid_pdrop embd_pdrop neftune_noise_alpha max_sequence_length model_max_length pretraining_tp
    _flash_attn_2_enabled use_flash_attention_2 auto_map trust_remote_code is_llama_config transformers.js_config
    unsloth_fixed unsloth_version
"""


class DecoderOnly(Architecture):
    """The base; see `Architecture`. Subclasses set defaults and change `facts`, `spell` and the leaves of a layer.

    Attributes:
      rope_types: types of scaling that the architecture has in transformers.
      rope_theta: its value if the file does not have it.
      partial_rope: whether the architecture reads `partial_rotary_factor`.
      activation_field: the field with the activation.
      activations: our name of each of its values.
      whole_heads: whether transformers requires that `hidden_size` is a multiple of the number of heads.
    """

    family = facts_lib.FAMILY
    fields = {
        **KEPT,
        **dict.fromkeys(('vocab_size', 'hidden_size', 'intermediate_size'), schema.Count),
        **dict.fromkeys(('num_attention_heads', 'num_key_value_heads', 'head_dim'), schema.Count),
        'num_hidden_layers': schema.Depth,
        'original_max_position_embeddings': schema.Count,
        **dict.fromkeys(('rms_norm_eps', 'rope_theta', 'partial_rotary_factor'), schema.Positive),
        **dict.fromkeys(('rope_scaling', 'rope_parameters'), Mapping[str, Any]),
        'tie_word_embeddings': bool,
        'hidden_act': str,
    }
    sizes = frozenset()  # the shape of each tensor is compared
    values = {
        'is_encoder_decoder': False,
        'pruned_heads': {},
        'rope_interleaved': False,
        **dict.fromkeys(
            ('use_mrope', 'lm_head_bias', 'use_bidirectional_attention', 'attention_bias', 'mlp_bias'), False
        ),
    }
    harmless = frozenset(_HARMLESS.split())
    depths = {'num_hidden_layers': r'model\.layers\.(\d+)\.'}
    defaults = {'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'hidden_act': 'silu'}
    nullable = frozenset(
        ('head_dim', 'num_key_value_heads', 'sliding_window', 'attn_logit_softcapping', 'final_logit_softcapping')
    )
    refuses_unknown_fields = True
    rope_types: Sequence[str] = ('default', 'linear', 'llama3', 'yarn')
    rope_theta: float = 10000.0
    partial_rope: bool = False
    activation_field: str = 'hidden_act'
    activations: Mapping[str, str] = ACTIVATIONS
    whole_heads: bool = False

    def __init_subclass__(cls) -> None:
        cls.values = {name: value for name, value in cls.values.items() if name not in cls.fields}

    def resolve(self, file: epath.Path, config: dict[str, Any]) -> None:
        """Fills in the sizes that other sizes imply; see `Architecture`."""
        names = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size')
        _, width, _, heads, _ = required(file.parent, config, *names)
        config.setdefault('num_key_value_heads', heads)
        config.setdefault('head_dim', width // heads)
        if heads % config['num_key_value_heads'] or not config['head_dim']:
            raise UserError(
                f'{file}: num_attention_heads is {heads}: it must be a multiple of num_key_value_heads, '
                f'{config["num_key_value_heads"]}, and at most hidden_size, {width}.'
            )

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """Returns the fields of the network's configuration that a config.json asks for, if not neutral.

        Raises:
          UserError: our models do not support a value.
        """
        return {
            'vocab_size': config['vocab_size'],
            'emb_dim': config['hidden_size'],
            'num_heads': config['num_attention_heads'],
            'num_kv_heads': config['num_key_value_heads'],
            'head_dim': config['head_dim'],
            'mlp_dim': config['intermediate_size'],
            'num_layers': config['num_hidden_layers'],
            'mlp_activations': [self._activation(file, config), 'linear'],
            'tied_embeddings': config['tie_word_embeddings'],
            'norm_epsilon': float(config['rms_norm_eps']),
            **dict.fromkeys(('qkv_bias', 'out_bias'), config.get('attention_bias', False)),
            'mlp_bias': config.get('mlp_bias', False),
            **self.rope(file, config),
        }

    def rope(self, file: epath.Path, config: Config) -> Facts:
        """Returns the facts of rotary positions."""
        return rope.read(file, config, types=self.rope_types, theta=self.rope_theta, partial=self.partial_rope)

    def _activation(self, file: epath.Path, config: Config) -> str:
        name = config[self.activation_field]
        if name not in self.activations:
            raise UserError(
                f'{file}: {self.activation_field} is {schema.shown(name)}: it must be one of {", ".join(self.activations)}.'
            )
        return self.activations[name]

    def spell(self, facts: Facts) -> dict[str, Any]:
        """Returns the fields of config.json that express facts, as far as the layout has them, without `model_type`."""
        return {
            'vocab_size': facts['vocab_size'],
            'hidden_size': facts['emb_dim'],
            'num_attention_heads': facts['num_heads'],
            'num_key_value_heads': facts['num_kv_heads'],
            'head_dim': facts['head_dim'],
            'intermediate_size': facts['mlp_dim'],
            'num_hidden_layers': facts['num_layers'],
            self.activation_field: _SPELLED.get(facts['mlp_activations'][0], facts['mlp_activations'][0]),
            'tie_word_embeddings': facts['tied_embeddings'],
            'rms_norm_eps': facts['norm_epsilon'],
            **({'attention_bias': facts['qkv_bias']} if 'attention_bias' in self.fields else {}),
            **({'mlp_bias': facts['mlp_bias']} if 'mlp_bias' in self.fields else {}),
            **rope.spell(facts),
        }

    def completed(self, facts: Facts) -> Facts:
        """Returns the canonical facts with the parts that the layout always has, whose parameters are constants.

        Without an effect are biases of zeros, because a layout has them for all projections of attention or for none.
        """
        if 'attention_bias' in self.fields and (facts['qkv_bias'] or facts['out_bias']):
            return facts | {'qkv_bias': True, 'out_bias': True}
        return facts

    def not_expressed(self, facts: Facts) -> dict[str, str]:
        """Returns the names of the canonical facts that the layout would change, each with the value that it would have."""
        facts = self.completed(facts)
        config = {'model_type': self.model_types[0], **self.spell(facts)}
        config = {name: value for name, value in (self.defaults | config).items() if value is not None}
        try:
            self.resolve(epath.Path(CONFIG), config)
            back = facts_lib.canonical(self.facts(epath.Path(CONFIG), config))
        except UserError as error:
            return {'layout': str(error).rstrip('.')}
        ours, theirs = facts_lib.compared(facts), facts_lib.compared(back)
        different = {
            name: schema.shown(theirs[name]) for name, value in ours.items() if name in theirs and theirs[name] != value
        }
        if self.whole_heads and facts['emb_dim'] % facts['num_heads']:
            different['num_heads'] = f'a divisor of {facts["emb_dim"]}'
        return different

    def dimensions(self, facts: Facts) -> dict[str, int]:
        """Returns the sizes of tensors by the fields of config.json that they follow from."""
        return {
            'vocab_size': facts['vocab_size'],
            'hidden_size': facts['emb_dim'],
            'num_attention_heads * head_dim': facts['num_heads'] * facts['head_dim'],
            'num_key_value_heads * head_dim': facts['num_kv_heads'] * facts['head_dim'],
            'head_dim': facts['head_dim'],
            'intermediate_size': facts['mlp_dim'],
        }

    def leaves(self, facts: Facts) -> dict[str, Leaf]:
        """Returns all leaves of a model, by their names below `params/`."""
        leaves = {'token_embedder/embedding': Leaf(Entry(EMBEDDING), ('vocab_size', 'hidden_size'))}
        for i in range(facts['num_layers']):
            ours, theirs = f'decoder/layers_{i}', f'model.layers.{i}'
            for their_norm, our_norm in NORMS[facts['norm_placement']]:
                leaves[f'{ours}/{our_norm}/scale'] = Leaf(Entry(f'{theirs}.{their_norm}.weight'), ('hidden_size',))
            leaves |= self.attention(facts, i, f'{ours}/self_attention', f'{theirs}.self_attn')
            leaves |= self.mlp(facts, i, f'{ours}/mlp', f'{theirs}.mlp')
        leaves['decoder/decoder_norm/scale'] = Leaf(Entry('model.norm.weight'), ('hidden_size',))
        if not facts['tied_embeddings']:
            leaves['decoder/logits_dense/kernel'] = Leaf(Entry(HEAD, LINEAR), ('hidden_size', 'vocab_size'))
        return leaves

    def attention(self, facts: Facts, layer: int, ours: str, theirs: str) -> dict[str, Leaf]:
        """Returns the leaves of an attention layer."""
        width, heads, kv_heads = 'hidden_size', 'num_attention_heads * head_dim', 'num_key_value_heads * head_dim'
        leaves = {}
        for part, name, bias, sizes in (
            ('query', 'q_proj', facts['qkv_bias'], (width, heads)),
            ('key', 'k_proj', facts['qkv_bias'], (width, kv_heads)),
            ('value', 'v_proj', facts['qkv_bias'], (width, kv_heads)),
            ('out', 'o_proj', facts['out_bias'], (heads, width)),
        ):
            leaves |= linear(f'{ours}/{part}', f'{theirs}.{name}', sizes, bias=bias)
        if facts['qk_norm'] != 'none':
            per_head = facts['qk_norm'] == 'head'
            for part, name, size in (('query', 'q_norm', heads), ('key', 'k_norm', kv_heads)):
                entry = Entry(f'{theirs}.{name}.weight')
                leaves[f'{ours}/{part}_norm/scale'] = Leaf(entry, ('head_dim' if per_head else size,))
        return leaves

    def mlp(self, facts: Facts, layer: int, ours: str, theirs: str) -> dict[str, Leaf]:
        """Returns the leaves of the MLP of a layer."""
        width, hidden = 'hidden_size', 'intermediate_size'
        leaves = {}
        for matrix, name, sizes in (
            ('wi_0', 'gate_proj', (width, hidden)),
            ('wi_1', 'up_proj', (width, hidden)),
            ('wo', 'down_proj', (hidden, width)),
        ):
            leaves |= linear(f'{ours}/{matrix}', f'{theirs}.{name}', sizes, bias=facts['mlp_bias'])
        return leaves

    def notes(self, sizes: Config) -> dict[str, str]:
        """Returns the layers whose experts are copies of a dense MLP; see `Architecture`."""
        equal = sizes[equal_experts.KEY]
        return {equal_experts.NOTE: ','.join(map(str, equal))} if equal else {}

    def rename(self, name: str) -> str:
        """Adds the prefix that bare models lack and that wrappers have; see `Architecture`."""
        return f'model.{name}' if name.startswith(('layers.', 'embed_tokens.', 'norm.')) else name

    def left_out(self, stored: Tensors) -> dict[str, str]:
        """See `Architecture`."""
        return {name: 'constants of RoPE, which are computed' for name in stored if _FREQUENCIES.fullmatch(name)}

    def read(self, folder: epath.Path, config: Config, stored: Tensors) -> tuple[dict[str, views.Lazy], dict[str, Any]]:
        """See `Architecture`."""
        found = self.facts(folder / CONFIG, config)
        stored, found['tied_embeddings'] = tensors.with_head(folder, found['tied_embeddings'], dict(stored))
        facts = facts_lib.canonical(found)
        sources = tensors.read(folder, stored, self.leaves(facts), self.dimensions(facts))
        model = {'family': self.family, 'config': {**facts, 'dtype': 'float32'}}
        kept = {name: config[name] for name in KEPT if name in config}
        return sources, {'model': model, 'kept': kept}

    def holds(self, shapes: Shapes) -> bool:
        """See `Architecture`."""
        return 'decoder/decoder_norm/scale' in shapes and not any(name.startswith('encoder/') for name in shapes)

    def compared_sizes(self, shapes: Shapes) -> dict[str, Any]:
        """Returns no sizes: `read` compares each shape."""
        return {}

    def choose(
        self, alternatives: Sequence[Architecture], metadata: Mapping[str, Any], layout: str | None
    ) -> Architecture:
        """Returns the layout of the source if it can store the model, and else the first that can; see `Architecture`."""
        facts = facts_lib.of_metadata(metadata)
        wanted = metadata.get('model_type') if layout is None else layout
        layouts = sorted(alternatives, key=lambda each: wanted not in each.model_types)
        different = {each: each.not_expressed(facts) for each in layouts}
        exact = [each for each in layouts if not different[each]]
        if exact and (layout is None or exact[0] is layouts[0]):
            return exact[0]
        fewest = min(layouts, key=lambda each: (bool({'moe', 'layout'} & different[each].keys()), len(different[each])))
        closest = fewest if layout is None else layouts[0]
        raise UserError(refusal.message(closest, layout, exact, facts, different))

    def with_equal_experts(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """See `Architecture`."""
        return equal_experts.of_all_layers(metadata)

    def sizes_for(self, shapes: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what writing needs; see `Architecture`.

        It is `facts`, completed; `constants`, the leaves that completed facts have in addition, with their shapes;
        `equal_experts`, the layers whose experts are copies of a dense MLP.
        """
        facts, equal = facts_lib.of_metadata(metadata), metadata.get(equal_experts.KEY, ())
        completed = self.completed(facts)
        leaves, sizes = self.leaves(completed), self.dimensions(completed)
        added = leaves.keys() - self.leaves(facts).keys() | equal_experts.routers(leaves, equal)
        constants = {name: tuple(sizes[size] for size in leaves[name].sizes) for name in sorted(added)}
        return {'facts': completed, 'constants': constants, equal_experts.KEY: equal}

    def constants(self, sizes: Config) -> dict[str, tuple[tuple[int, ...], float]]:
        """See `Architecture`."""
        return {name: (shape, 0.0) for name, shape in sizes['constants'].items()}

    def table(self, sizes: Config, shapes: Shapes) -> Table:
        """See `Architecture`."""
        table = {name: leaf.entry for name, leaf in self.leaves(sizes['facts']).items()}
        return equal_experts.as_copies(table, sizes[equal_experts.KEY])

    def config(self, sizes: Config, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """See `Architecture`. Some layouts' own `pad_token_id` is beyond a small vocabulary, which transformers refuses."""
        return {
            'architectures': [self.classes[0]],
            'model_type': self.model_types[0],
            'pad_token_id': None,
            **metadata.get('kept', {}),
            **self.spell(sizes['facts']),
        }
