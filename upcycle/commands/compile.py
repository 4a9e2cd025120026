"""`upcycle compile`: the TPU compiler's account of a run's step."""

import json
from collections.abc import Mapping, Sequence

from upcycle import compile as aot
from upcycle import configuration, outputs
from upcycle.errors import UserError


def run(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    topology: str,
    *,
    num_slices: int = 1,
    utilization: float = 0.4,
    as_json: bool = False,
    out: str | None = None,
    hlo: str | None = None,
) -> None:
    """`upcycle compile`: the TPU compiler's account of a run's step."""
    for name, path in (('--out', out), ('--hlo', hlo)):
        if path is not None:
            outputs.check(name, path, outputs.Kind.FILE)
    if not 0 < utilization <= 1:
        raise UserError(f'--utilization={utilization:g} must lie in (0, 1].')
    run = configuration.load_model(gin_files, bindings)
    account, text = aot.compile_run(run, topology, num_slices=num_slices)
    if hlo is not None:
        outputs.write('--hlo', hlo, text)
    found = json.dumps(aot.as_json(account, run, utilization), indent=1)
    if out is not None:
        outputs.write('--out', out, found + '\n')
    print(found if as_json else aot.show(account, run, utilization))
