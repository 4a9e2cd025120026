"""A summary of a run, printed before anything is allocated."""

from upcycle import cost
from upcycle.moe.groups import layer_name
from upcycle.moe.routers.base import MoE
from upcycle.training.start import Start


def describe(start: Start) -> str:
    """Returns a line each for model, MoE layers, data, steps and mesh."""
    run, state = start.run, start.layout.abstract
    params = state.params
    layers = run.model.moe_layers()
    total = cost.num_parameters(params)
    active = cost.num_active_parameters(params, layers)
    spec = run.train_data.batch_spec()
    flops = cost.step_flops(run.model, spec)
    sizes = f'{total / 1e6:.2f}M parameters' + (f', {active / 1e6:.2f}M of them active for a token' if layers else '')
    lines = [
        f'model   {run.model.family}, {sizes}; {cost.bytes_per_device(state) / 2**20:.0f} MiB of state on a device; '
        f'{flops / 1e9:.2f} GFLOP a step',
    ]
    stacks: dict[MoE, list[str]] = {}
    for path, moe in layers.items():
        stacks.setdefault(moe, []).append(layer_name(path))
    lines += [f'MoE     {", ".join(paths)}: {moe.in_words()}' for moe, paths in stacks.items()]
    shapes = ', '.join(f'{name} {shape}' for name, (shape, _) in spec.items() if name in run.model.inputs)
    lines.append(f'data    {shapes}; {run.train_data.promise()}')
    source = 'from scratch' if run.initial_checkpoint_path is None else f'from {run.initial_checkpoint_path}'
    if run.surgery is not None:
        operator = run.surgery.made_by or 'no MLP expanded'
        source += f' ({operator}, optimizer state {run.surgery.optimizer_state})'
    lines.append(f'steps   to {run.total_steps}, {source}; into {run.model_dir}')
    lines.append(f'mesh    {dict(start.mesh.shape)}')
    return '\n'.join(lines)
