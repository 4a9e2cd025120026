"""MoE layers in the facts of a decoder-only model, and what the layouts with experts share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from upcycle import schema
from upcycle.checkpoints import views
from upcycle.checkpoints.hf.architecture import LINEAR, NOTES, Config, Entry, Part, Tensors, Turn
from upcycle.checkpoints.hf.decoder_only import routing
from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly
from upcycle.checkpoints.hf.decoder_only.facts import Facts, indices
from upcycle.checkpoints.hf.decoder_only.tensors import Leaf
from upcycle.errors import UserError
from upcycle.moe.conventions import BalanceLoss

# Matrices of an MLP: ours, and the usual names there.
MATRICES = {'wi_0': 'gate_proj', 'wi_1': 'up_proj', 'wo': 'down_proj'}
_FUSED = re.compile(r'(model\.layers\.\d+\..+\.experts)\.(gate_up_proj|down_proj)')
_SCALE = 'upcycle_weight_scale'  # note in a file
# The width of a shared expert of zeros, for layouts that always have one: it divides among tensor-parallel devices, and is the
# size of a block of llama.cpp's quantised types.
ZERO_SHARED_WIDTH = 32


class WithExperts(DecoderOnly):
    """Base of the layouts with a Top-K router without capacity; see `DecoderOnly`.

    Attributes:
      block: name of an MLP in a layer, with or without experts.
      router: name of the router below it.
      matrices: names of an expert's matrices, by ours.
      count: the field with the number of experts.
      width: the field with the width of an expert.
      always_normalized: whether the weights of the chosen experts sum to 1 without a field that says so.
      balance: the field with the weight of the balance loss, and its default.
    """

    fields = {
        **DecoderOnly.fields,
        **dict.fromkeys(('num_experts', 'num_local_experts', 'num_experts_per_tok'), schema.Count),
    }
    harmless = DecoderOnly.harmless | {'output_router_logits'}
    block: str = 'mlp'
    router: str = 'gate'
    matrices: Mapping[str, str] = MATRICES
    count: str = 'num_experts'
    width: str = 'intermediate_size'
    always_normalized: bool = False
    balance: tuple[str, float] = ('router_aux_loss_coef', 0.001)

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        return super().facts(file, config) | self.moe_facts(file, config)

    def moe_facts(self, file: epath.Path, config: Config) -> Facts:
        """Returns the MoE layers that a config.json asks for.

        Raises:
          UserError: a token cannot choose that many experts.
        """
        experts, chosen = config[self.count], config['num_experts_per_tok']
        if chosen > experts:
            raise UserError(f'{file}: num_experts_per_tok is {chosen}, but {self.count} is {experts}.')
        moe = {
            'router': 'top_k',
            'num_experts': experts,
            'num_selected_experts': chosen,
            'normalize_combine_weights': self.always_normalized or config['norm_topk_prob'],
            'dispatch': 'ragged',
            'expert_mlp_dim': config[self.width],
            'weight_scale': _scale_in(config.get(NOTES, {})),
        }
        return {'moe': moe, 'moe_layers': 'all'}

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        moe = facts['moe']
        return {
            **super().spell(facts),
            self.count: moe['num_experts'],
            'num_experts_per_tok': moe['num_selected_experts'],
            self.width: routing.expert_width(moe, facts['mlp_dim']),
            **({} if self.always_normalized else {'norm_topk_prob': moe['normalize_combine_weights']}),
            'output_router_logits': False,
        }

    def not_expressed(self, facts: Facts) -> dict[str, str]:
        """See `DecoderOnly`."""
        if facts['moe'] is None:
            return {'moe': schema.shown('experts')}
        if facts['moe']['router'] != 'top_k':  # whose settings mean something else
            return {'moe.router': schema.shown('top_k')}
        if _is_power_of_2(facts['moe'].get('weight_scale', 1.0)):  # multiplied into the experts
            facts = facts | {'moe': {name: value for name, value in facts['moe'].items() if name != 'weight_scale'}}
        return super().not_expressed(facts)

    def notes(self, sizes: Config) -> dict[str, str]:
        """Returns the scale of the experts, so that we read the same numbers again; see `Architecture`."""
        scale = sizes['facts']['moe'].get('weight_scale')
        return super().notes(sizes) | ({} if scale is None else {_SCALE: repr(scale)})

    def config(self, sizes: Config, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """See `Architecture`. The weight of the balance loss is that of the run.

        `BalanceLoss.SWITCH` is transformers' loss, E * sum of shares * mean probabilities, in the same unit; but ours is the mean
        over layers and groups, whose tokens transformers pools. A weight of another loss is not written.
        """
        field, default = self.balance
        config = {field: default, **super().config(sizes, metadata)}
        run = metadata.get('model', {})
        if 'aux_loss_factor' not in run:
            return config
        moe = run['config']['moe']
        is_theirs = moe.get('balance_loss') in (None, BalanceLoss.SWITCH) and moe.get('adaptive_balance') is None
        del config[field]
        return config | ({field: run['aux_loss_factor']} if is_theirs else {})

    def dimensions(self, facts: Facts) -> dict[str, int]:
        """See `DecoderOnly`."""
        moe = facts['moe']
        if moe is None:
            return super().dimensions(facts)
        return {
            **super().dimensions(facts),
            self.count: moe['num_experts'],
            self.width: routing.expert_width(moe, facts['mlp_dim']),
            'shared_expert_intermediate_size': moe.get('shared_mlp_dim', 0),
            '1': 1,
        }

    def mlp(self, facts: Facts, layer: int, ours: str, theirs: str) -> dict[str, Leaf]:
        """Returns the leaves of an MLP with or without experts; see `DecoderOnly`."""
        if facts['moe'] is None or layer not in indices(facts['moe_layers'], facts['num_layers']):
            return super().mlp(facts, layer, ours, theirs)
        theirs = f'{theirs.rpartition(".")[0]}.{self.block}'
        router = Entry(f'{theirs}.{self.router}.weight', LINEAR)
        return {
            f'{ours}/router/router_weights/w/kernel': Leaf(router, ('hidden_size', self.count)),
            **self.experts(facts, f'{ours}/expert', theirs),
        }

    def experts(self, facts: Facts, ours: str, theirs: str) -> dict[str, Leaf]:
        """Returns the leaves of the experts of a layer: a tensor for each matrix of each expert."""
        leaves = {}
        for matrix, name in self.matrices.items():
            names = tuple(f'{theirs}.experts.{e}.{name}.weight' for e in range(facts['moe']['num_experts']))
            sizes = (self.width, 'hidden_size') if matrix == 'wo' else ('hidden_size', self.width)
            leaves[f'{ours}/{matrix}/kernel'] = Leaf(Entry(names, _turn(matrix, facts)), (self.count, *sizes))
        return leaves

    def read(self, folder: epath.Path, config: Config, stored: Tensors) -> tuple[dict[str, views.Lazy], dict[str, Any]]:
        """Reads fused tensors, as mergekit and `save_original_format=False` write them, as one for each expert."""
        return super().read(folder, config, self._by_expert(folder, stored))

    def _by_expert(self, folder: epath.Path, stored: Tensors) -> Tensors:
        """Returns the tensors under the names of single experts.

        Raises:
          UserError: a fused tensor cannot be cut into experts.
        """
        out: dict[str, Any] = {}
        for name, tensor in stored.items():
            if (match := _FUSED.fullmatch(name)) is None:
                out[name] = tensor
                continue
            matrices = ('wi_0', 'wi_1') if match[2] == 'gate_up_proj' else ('wo',)
            if len(tensor.shape) != 3 or tensor.shape[1] % len(matrices):
                raise UserError(
                    f'{name} of {folder} has the wrong shape {list(tensor.shape)}: it must hold all experts.'
                )
            rows = tensor.shape[1] // len(matrices)
            for e in range(tensor.shape[0]):
                for i, matrix in enumerate(matrices):
                    part = Part(tensor.shape, (i * rows, (i + 1) * rows), e)
                    out[f'{match[1]}.{e}.{self.matrices[matrix]}.weight'] = part.of(tensor)
        return out


class Fused(WithExperts):
    """Base of the layouts that store all experts of a layer in `input_linear`, with gate and up, and `output_linear`."""

    block = 'block_sparse_moe'
    router = 'router.layer'
    count = 'num_local_experts'

    def experts(self, facts: Facts, ours: str, theirs: str) -> dict[str, Leaf]:
        """See `WithExperts`."""
        count, hidden = facts['moe']['num_experts'], facts['emb_dim']
        width = routing.expert_width(facts['moe'], facts['mlp_dim'])

        def leaf(name: str, shape: tuple[int, int], rows: tuple[int, int], sizes: tuple[str, str]) -> Leaf:
            parts = tuple(Part((count, *shape), rows, e) for e in range(count))
            turn = _turn('wo' if name == 'output_linear' else 'wi', facts)
            return Leaf(Entry((f'{theirs}.{name}.weight',) * count, turn, parts), (self.count, *sizes))

        into, out = (2 * width, hidden), (hidden, width)
        return {
            f'{ours}/wi_0/kernel': leaf('input_linear', into, (0, width), ('hidden_size', self.width)),
            f'{ours}/wi_1/kernel': leaf('input_linear', into, (width, 2 * width), ('hidden_size', self.width)),
            f'{ours}/wo/kernel': leaf('output_linear', out, (0, hidden), (self.width, 'hidden_size')),
        }

    def rename(self, name: str) -> str:
        """Also takes the names of transformers' parameters; see `Architecture`."""
        name = super().rename(name)
        for theirs, stored in (
            ('experts.gate_up_proj', 'input_linear.weight'),
            ('experts.down_proj', 'output_linear.weight'),
            ('router.weight', 'router.layer.weight'),
        ):
            if name.endswith(f'.{self.block}.{theirs}'):
                return f'{name.removesuffix(theirs)}{stored}'
        return name


def _turn(matrix: str, facts: Facts) -> Turn:
    """Returns the change of layout of an expert's matrix. The scale of weights is a factor of `wo`."""
    scale = facts['moe'].get('weight_scale', 1.0)
    if matrix != 'wo' or scale == 1:
        return LINEAR
    return Turn(
        lambda tensor: views.Scaled(LINEAR.to_ours(tensor), 1 / scale),
        lambda x: LINEAR.to_theirs(x * np.asarray(scale, x.dtype)),
    )


def _scale_in(notes: Mapping[str, str]) -> float:
    """Returns the scale in the notes of a file of ours; 1 for others."""
    try:
        scale = float(notes.get(_SCALE, 1.0))
    except ValueError:
        return 1.0
    return scale if _is_power_of_2(scale) else 1.0


def _is_power_of_2(scale: float) -> bool:
    """Whether a multiplication is exact."""
    return scale > 0 and math.frexp(scale)[0] == 0.5
