"""How far upcycled models are from the dense one before they are trained."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from smollm2.schedule import BRANCHES, UPCYCLED
from smollm2.texts import Texts

ROWS, LENGTH, EXPERTS = 4, 512, 4
# By name: gin files of the surgery, and bindings.
VARIANTS: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    'copies': ((), {}),
    'copies, raw weights': ((), {'NORMALIZE_COMBINE_WEIGHTS': False}),
    'noise': (('surgery/noise.gin',), {}),
    'drop': (('surgery/drop.gin',), {}),
    # 8 half experts, of which a token takes 4.
    'granular': (('surgery/granular.gin',), {'NUM_EXPERTS': 2 * EXPERTS}),
}
COLUMNS = ('operator', 'dense loss', 'upcycled loss', 'gap of the loss', 'largest gap of a layer', 'tokens')


def measure(model: pathlib.Path, texts: Texts) -> Iterator[dict[str, str]]:
    """Yields a row of figures for each variant, all from its receipt.

    The gap of a layer is |MoE - MLP| / |MLP|, norms over all tokens, on the dense model's activations.

    Args:
      model: folder of the dense model.
      texts: the data; the batch is held-out code.
    """
    import jax
    import jax.numpy as jnp

    import upcycle
    from upcycle import configuration

    for name, (files, more) in VARIANTS.items():
        bindings = {
            'INITIAL_CHECKPOINT_PATH': model,
            'TOKENS_DIR': texts.code,
            'NUM_EXPERTS': EXPERTS,
            'EVAL_BATCH_SIZE': ROWS,
            'SEQUENCE_LENGTH': LENGTH,
            'ACTIVATION_DTYPE': 'float32',
            **more,
        }
        run = configuration.load_model(
            [*BRANCHES[UPCYCLED], *files], {key: str(value) for key, value in bindings.items()}
        )
        batch = jax.tree.map(jnp.asarray, next(iter(run.eval_data.batches())))
        _, receipt = upcycle.upcycle(str(model), run.model, run.surgery, key=0, batch=batch)
        check = receipt['function_check']
        whole = check['whole_model']
        yield {
            'operator': name,
            'dense loss': f'{whole["dense_loss"]:.5f}',
            'upcycled loss': f'{whole["sparse_loss"]:.5f}',
            'gap of the loss': f'{whole["loss_gap"]:+.1e}',
            'largest gap of a layer': f'{max(layer["gap"] for layer in check["layers"].values()):.1e}',
            'tokens': str(ROWS * LENGTH),
        }
