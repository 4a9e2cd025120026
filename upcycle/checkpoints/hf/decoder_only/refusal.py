"""The message for a model that a layout would change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Architecture
from upcycle.checkpoints.hf.decoder_only import facts as facts_lib
from upcycle.checkpoints.hf.decoder_only import routing
from upcycle.checkpoints.hf.decoder_only.facts import Facts


def message(
    closest: Architecture,
    layout: str | None,
    exact: Sequence[Architecture],
    facts: Facts,
    different: Mapping[Architecture, Mapping[str, str]],
) -> str:
    """Returns the message for a model that a layout would change.

    Args:
      closest: the layout.
      layout: its name, if the user named it.
      exact: the layouts that can store the model.
      facts: of the model.
      different: for each layout the names of the facts that it would change, each with the value that it would have.
    """
    ours = facts_lib.compared(facts)
    # Layouts with experts for a model with experts, and the others for a dense one.
    comparable = {
        each: names for each, names in different.items() if not names.keys() & {'moe', 'moe.router', 'layout'}
    }
    changes = []
    for name, theirs in different[closest].items():
        if name not in ours:
            changes.append(theirs)
            continue
        holders = [each.model_types[0] for each, names in comparable.items() if name not in names]
        held = f'{", ".join(holders)} would keep it' if holders else 'no layout has it'
        advice = [routing.ADVICE[name]] if name in routing.ADVICE else []
        if not exact and (not advice or name in routing.ELSEWHERE):
            advice.insert(0, held)
        change = f'{name} = {schema.shown(ours[name])} would become {theirs}'
        changes.append(f'{change} ({"; ".join(advice)})' if advice else change)
    listing = '; '.join(changes)
    if exact:
        names = ' or '.join(each.model_types[0] for each in exact)
        return f'--layout={layout} cannot store this model: {listing}. Use --layout={names}.'
    start = 'no layout of Hugging Face' if layout is None else f'neither --layout={layout} nor another layout'
    return f'{start} can store this model: in {closest.model_types[0]}, {listing}. Store it as --format=upcycle.'
