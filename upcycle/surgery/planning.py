"""Plans a surgery: finds the source of every target leaf from names and shapes."""

import math
import re
from collections.abc import Sequence

import jax

from upcycle.errors import DifferentLeaves, UserError
from upcycle.moe.groups import is_attention
from upcycle.surgery.operators import Leaf, Operator, Start
from upcycle.surgery.plan import (
    COUNT,
    EXPERT,
    MIXING,
    MOMENTS,
    PARAMS,
    ROUTER,
    ROUTER_STATE,
    SHARED,
    SHARED_GATE,
    STATES,
    Abstract,
    Action,
    Axes,
    OptimizerState,
    Plan,
    Row,
    Surgery,
    is_clock,
    mlp_of,
)
from upcycle.surgery.router_init import INHERITED


def plan_surgery(
    dense: Abstract,
    sparse: Abstract,
    spec: Surgery,
    axes: Axes | None = None,
    *,
    head: Sequence[str] = (),
    grids: Sequence[str] = (),
) -> Plan:
    """Finds the source of every target leaf. Reads no data.

    Args:
      dense: leaves of the checkpoint, from its metadata.
      sparse: leaves of the model to train.
      spec: the specification.
      axes: logical axes of the target's parameters, for operators that work along an axis.
      head: paths of the parameters that `spec.new_head` reinitialises.
      grids: last segments of the names of parameters that may be interpolated; see `models.Model`.

    Raises:
      DifferentLeaves: a leaf has no source, two sources, or one of another shape, or a dense leaf is unused.
      UserError: the operator needs another kind of checkpoint.
    """
    operator = spec.operator
    base, several, problems = _one_of_several(dense)
    num_mlps = _num_mlps(base, sparse, spec, several)
    logical = axes or {}
    shapes = ({name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (base, sparse))
    sources_of = None if spec.dense_operator is None else spec.dense_operator.sources(*shapes)
    rows: list[Row] = []
    dropped: dict[str, str] = {}

    def in_head(name: str) -> bool:
        path = name.removeprefix(STATES).removeprefix(PARAMS)
        return spec.new_head and path != name and any(path.startswith(f'{part}/') for part in head)

    def add(target: str, action: Action, *sources: str) -> None:
        if action is Action.EXPERTS and not operator.reads:
            reason = f'EXPERT_OPERATOR = {operator.name!r} initialises experts randomly'
            dropped.update(dict.fromkeys(sources, reason))
            sources = ()
        if several and action is Action.KEEP and not operator.averages and not is_clock(target):
            sources = tuple(f'{source}@0' for source in sources)
        elif several:
            action = Action.MEAN if action is Action.KEEP else action
            sources = tuple(f'{source}@{i}' for source in sources for i in range(several))
        leaf = sparse[target]
        rows.append(Row(target, sources, action, tuple(leaf.shape), leaf.dtype, logical.get(target, ())))

    for target, leaf in sparse.items():
        if operator is not None and EXPERT in target.split('/') and target.startswith(PARAMS):
            _refuse_attention(target, operator)
            operator.check(leaf.shape[0], num_mlps)
        result = _without_source(target, base, spec, is_new=in_head(target))
        if result is None and sources_of is not None and target.startswith((PARAMS, STATES)):
            result = _remake(target, leaf, base, spec, sources_of(target))
        if result is None:
            result = _source(target, leaf, base, spec, logical.get(target, ()), grids)
        if isinstance(result, str):
            problems.append(result)
        else:
            add(target, *result)

    used = {source for row in rows for source in row.sources}
    unfit = {match[1] or match[2] for problem in problems if (match := _UNFIT.search(problem))}
    for source, leaf in dense.items():
        name = _base_name(source)
        if source in used or name in unfit or name in dropped or name == 'step' or is_clock(name):
            continue
        reason = 'NEW_HEAD = True' if in_head(name) else _why_dropped(name, sparse, spec)
        if reason is None and several and not operator.averages and f'{name}@0' in used:
            reason = "BRANCHES_REST = 'first'"
        if reason is None and spec.dense_operator is not None:
            reason = spec.dense_operator.drops(source)
        if reason is None:
            problems.append(f'{source} {_show(leaf)} of the checkpoint is not used by the model')
        else:
            dropped[source] = reason
    if problems:
        raise _explain(problems, base, sparse, spec, head)
    return Plan(tuple(rows), dropped, spec, num_mlps, _measured(rows, base, spec))


def _refuse_attention(target: str, operator: Operator) -> None:
    """Raises UserError if a leaf of experts is one of attention experts."""
    layer = mlp_of(target).removeprefix(PARAMS)
    if is_attention(layer):
        raise UserError(
            f'EXPERT_OPERATOR = {operator.name!r} would make the attention experts of {layer}, but only copying a checkpoint '
            'that has them is implemented: set EXPERT_OPERATOR = None, or ATTENTION_MOE = None.'
        )


def _without_source(target: str, base: Abstract, spec: Surgery, *, is_new: bool) -> tuple[Action | str, ...] | None:
    """Returns the action and sources of a leaf that is not made from the checkpoint's leaf of that name, or None.

    Args:
      target: the leaf.
      base: leaves of the checkpoint.
      spec: the specification.
      is_new: the leaf belongs to a head that is reinitialised.
    """
    segments = target.split('/')
    is_router = spec.operator is not None and ROUTER in segments
    is_gate = spec.operator is not None and spec.operator.starts_from is not Start.MOE and SHARED_GATE in segments
    keeps_state = spec.optimizer_state is OptimizerState.TILE
    if target == 'rng':
        return (Action.NEW,)
    if is_clock(target) and spec.optimizer_state is not OptimizerState.FRESH_CLOCK:
        # The decay clock continues at the step, even if the moments are fresh.
        return Action.KEEP, target if target in base and (keeps_state or target != COUNT) else 'step'
    if target.startswith('opt_state/') and (is_router or is_new or not keeps_state):
        return (Action.ZEROS,)
    if is_gate:
        return (Action.ZEROS,)  # the shared experts' weight is then one half
    if is_new:
        return (Action.NEW,)
    if {ROUTER_STATE, MIXING} & {*segments} and (spec.made_by is not None or target not in base):
        return (Action.ZEROS,)
    if is_router:
        return Action.ROUTER, *([target] if spec.router_init in INHERITED else [])
    return None


def _why_dropped(name: str, sparse: Abstract, spec: Surgery) -> str | None:
    """Returns why a leaf of the checkpoint is dropped on purpose, or None if it must not be."""
    segments, operator = name.split('/'), spec.operator
    is_router = ROUTER in segments
    if ROUTER_STATE in segments:
        return 'router state restarts at 0'
    if is_router and any(MIXING in target.split('/') for target in sparse):
        return 'merged experts have no router'
    if name == 'rng':
        return 'the run has its own random key'
    if name.startswith('opt_state/') and is_router and operator is not None:
        return 'routers start with fresh state'
    if name.startswith('opt_state/') and spec.optimizer_state is not OptimizerState.TILE:
        return f"OPTIMIZER_STATE = '{spec.optimizer_state}'"
    if is_router and operator is not None and operator.starts_from is Start.MOE:
        return f"ROUTER_INIT = '{spec.router_init}' reinitialises routers"
    return None


_SEVERAL = re.compile(r'@\d+$')


def _base_name(source: str) -> str:
    return _SEVERAL.sub('', source)


def _one_of_several(dense: Abstract) -> tuple[Abstract, int, list[str]]:
    """Returns the common leaves of several checkpoints without `@i`, the number of checkpoints (0 for one), and problems."""
    if not any(_SEVERAL.search(name) for name in dense):
        return dense, 0, []
    count = 1 + max(int(_SEVERAL.search(name)[0][1:]) for name in dense)
    base, problems = {}, []
    for name in dict.fromkeys(map(_base_name, dense)):
        shapes = [getattr(dense.get(f'{name}@{i}'), 'shape', 'missing') for i in range(count)]
        if len(set(shapes)) == 1:
            base[name] = dense[f'{name}@0']
        else:
            problems.append(f'{name} differs between the checkpoints: {", ".join(map(str, shapes))}')
    return base, count, problems


def _num_mlps(dense: Abstract, sparse: Abstract, spec: Surgery, several: int) -> int:
    """Returns the number of MLPs that an operator starts from.

    Raises:
      UserError: the operator needs another kind of checkpoint.
    """
    operator = spec.operator
    if several and (operator is None or operator.starts_from is not Start.SEVERAL):
        subject = 'this run' if operator is None else f'EXPERT_OPERATOR = {operator.name!r}'
        raise UserError(
            f"INITIAL_CHECKPOINT_PATH names {several} checkpoints, and {subject} starts from one: name one, or use 'branches'."
        )
    if operator is None or operator.starts_from is not Start.MOE:
        if operator is not None and spec.router_init in INHERITED:
            raise UserError(
                f"ROUTER_INIT = '{spec.router_init}' needs the checkpoint's router, and EXPERT_OPERATOR = {operator.name!r} "
                "starts from a dense checkpoint: use 'normal'."
            )
        return max(several, 1)
    experts = [name for name in sparse if name.startswith(PARAMS) and EXPERT in name.split('/')]
    counts = {dense[name].shape[0] for name in experts if name in dense}
    if not counts:
        raise UserError(
            f'EXPERT_OPERATOR = {operator.name!r} starts from {operator.starts_from}, and this one has none in the MoE layers of '
            "the model: use another operator, such as 'copy'."
        )
    if len(counts) > 1:
        raise UserError(
            f'EXPERT_OPERATOR = {operator.name!r} needs the same number of experts in all layers, and the layers of the '
            f'checkpoint have {sorted(counts)}: use another checkpoint.'
        )
    return counts.pop()


_NEEDS = 'needs a source of shape'
_UNFIT = re.compile(rf'^(\S+) {_NEEDS} .*, not |{_NEEDS} .*, but (\S+) is ')


def _remake(
    target: str, leaf: jax.ShapeDtypeStruct, dense: Abstract, spec: Surgery, sources: tuple[str, ...]
) -> tuple[Action | str, ...] | str:
    """Returns the action and sources of a leaf that the dense operator makes, or a problem."""
    if missing := [name for name in sources if name not in dense]:
        return f'{target} {_show(leaf)} has no source: the checkpoint has no {missing[0]}'
    shapes = [tuple(dense[name].shape) for name in sources]
    if not spec.dense_operator.fits(shapes, tuple(leaf.shape)):
        shown = ' and '.join(f'{name} {_show(dense[name])}' for name in sources)
        return f'{target} {_show(leaf)} cannot be made from {shown} by DENSE_OPERATOR = {spec.dense_operator.name!r}'
    unchanged = sources == (target,) and shapes == [tuple(leaf.shape)]
    return (Action.KEEP if unchanged else Action.REMAKE, *sources)


def _source(
    target: str,
    leaf: jax.ShapeDtypeStruct,
    dense: Abstract,
    spec: Surgery,
    axes: tuple[str | None, ...],
    grids: Sequence[str],
) -> tuple[Action, str] | str:
    """Returns the action and source of a leaf that comes from the checkpoint, or a problem."""
    segments = target.split('/')
    from_moe = spec.operator is not None and spec.operator.starts_from is Start.MOE
    candidates = [target]
    if spec.operator is not None and not from_moe and (EXPERT in segments or SHARED in segments):
        candidates.append('/'.join(segment for segment in segments if segment not in (EXPERT, SHARED)))
    sources = [name for name in candidates if name in dense]
    if not sources:
        return f'{target} {_show(leaf)} has no source: the checkpoint has no {candidates[-1]}'
    if len(sources) > 1:
        return f'{target} has two sources: {" and ".join(sources)}'
    (source,) = sources
    old = tuple(dense[source].shape)
    is_new_expert = EXPERT in segments and (source != target or from_moe)
    want = tuple(leaf.shape[1:]) if is_new_expert else tuple(leaf.shape)
    if is_new_expert and target.startswith(PARAMS):
        want = spec.operator.source_shape(Leaf(tuple(leaf.shape), axes)) if spec.operator.reads else old
    if is_new_expert and from_moe:
        want = (*old[:1], *want)
    is_grid = target.startswith(PARAMS) and target.rpartition('/')[2] in grids
    if is_grid and _is_resized(old, want):
        return Action.RESIZE, source
    if old != want and source == target:
        return f'{target} {_NEEDS} {want}, not {old}'
    if old != want:
        return f'{target} {_show(leaf)} {_NEEDS} {want}, but {source} is {_show(dense[source])}'
    if not is_new_expert:
        return Action.KEEP, source
    return Action.TILE if target.startswith('opt_state/') else Action.EXPERTS, source


def _measured(rows: list[Row], dense: Abstract, spec: Surgery) -> dict[str, tuple[tuple[str, int], ...]]:
    """Returns, for each MLP, the leaves that the operator measures and the size of their parameter."""
    mlps: dict[str, list[tuple[str, int]]] = {}
    wanted = () if spec.operator is None else spec.operator.measured
    for row in rows:
        if not wanted or row.action is not Action.EXPERTS:
            continue
        (name,) = row.sources
        state = STATES + name.removeprefix(PARAMS)
        moments = [f'{state}/{moment}' for moment in MOMENTS if f'{state}/{moment}' in dense]
        if 'opt_state' in wanted and not moments:
            raise UserError(
                f"EXPERT_OPERATOR = '{spec.operator}' measures the optimizer's second moments, and the checkpoint has none of "
                f"{name}: use GROW_UTILITY = 'weight' or 'uniform'."
            )
        measured = [*([name] if 'params' in wanted else []), *(moments if 'opt_state' in wanted else [])]
        mlps.setdefault(mlp_of(row.target), []).extend((leaf, math.prod(row.shape[1:])) for leaf in measured)
    return {mlp: tuple(leaves) for mlp, leaves in mlps.items()}


def _is_resized(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """True for shapes (1, L, D) of positions on square grids of different sizes."""
    if len(old) != 3 or len(new) != 3:
        return False
    squares = all(math.isqrt(shape[1]) ** 2 == shape[1] for shape in (old, new))
    return squares and old[1] != new[1] and (old[0], old[2]) == (new[0], new[2])


def _show(leaf: jax.ShapeDtypeStruct) -> str:
    return f'({", ".join(map(str, leaf.shape))}) {leaf.dtype}'


def _explain(problems: list[str], dense: Abstract, wanted: Abstract, spec: Surgery, head: Sequence[str]) -> UserError:
    if not any(name.startswith(STATES) for name in dense) and all(p.startswith('opt_state/') for p in problems):
        return UserError(
            "OPTIMIZER_STATE = 'tile' needs the checkpoint's optimizer state, and none can be read (`upcycle inspect` lists what "
            "is not read): set OPTIMIZER_STATE = 'fresh'."
        )
    has_experts, wants_experts = (any(EXPERT in name.split('/') for name in leaves) for leaves in (dense, wanted))
    routes = any({ROUTER, MIXING} & {*name.split('/')} for name in dense)
    if routes and spec.operator is not None and spec.operator.starts_from is not Start.MOE:
        return UserError(
            f'EXPERT_OPERATOR = {spec.operator.name!r} starts from {spec.operator.starts_from}, and this one has experts: name a '
            'dense one, or add experts to this one with surgery/grow.gin or surgery/merge.gin; `upcycle export` copies it '
            'without surgery, and models/from_checkpoint.gin with runs/continue_dense.gin trains it.'
        )
    heading = 'The checkpoint does not fit the model: it has another architecture, or the sizes in the gin files differ'
    wrong_shape = [problem.split(' ')[0].split('/') for problem in problems if _NEEDS in problem]
    inside = wrong_shape and all({EXPERT, SHARED} & {*segments} for segments in wrong_shape)
    if all(any(f'/{part}/' in problem for part in head) for problem in problems):
        heading = (
            'The head of the checkpoint does not fit the model: to fine-tune on other classes, set NEW_HEAD = True in '
            'runs/finetune.gin'
        )
    elif has_experts and not wants_experts and spec.operator is None:
        heading += ' (it has experts and the model has none: include its moe/ file)'
    elif wants_experts and not has_experts and spec.operator is None:
        heading += ' (the model has experts and it has none: use runs/upcycle.gin, or remove the moe/ file)'
    elif inside and any(EXPERT in segments for segments in wrong_shape):
        heading += (
            " (EXPERT_GRANULARITY makes experts narrower: use EXPERT_OPERATOR = 'granular' or 'partial'; with another "
            "EXPERT_MLP_DIM than the dense MLP's width use 'random')"
        )
    elif inside:
        heading += (
            ' (the shared experts together must be as wide as the dense MLP: set NUM_SHARED_EXPERTS = EXPERT_GRANULARITY, '
            'or SHARED_MLP_DIM to its width)'
        )
    return DifferentLeaves(heading, problems)
