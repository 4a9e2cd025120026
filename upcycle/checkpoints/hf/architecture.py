"""What the reader and the writer of Hugging Face folders ask of an architecture: a subclass of `Architecture` in a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from upcycle.checkpoints import safetensors, views

Config = Mapping[str, Any]  # the content of config.json
Shapes = Mapping[str, tuple[int, ...]]  # of our leaves, by their names below `params/`
Tensors = Mapping[str, safetensors.Tensor]  # by Hugging Face's names


@dataclasses.dataclass(frozen=True)
class Turn:
    """How an array lies there and here.

    Attributes:
        to_ours: the lazy array as ours. Raises ValueError where its shape does not fit.
        to_theirs: the way back, of numbers.
    """

    to_ours: Callable[[views.Lazy], views.Lazy]
    to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Turn(lambda x: x, lambda x: x)
# Linear layers are (out, in) there and (in, out) here.
LINEAR = Turn(views.reversed_axes, np.transpose)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What one leaf of ours is there.

    Attributes:
        names: of the tensor; of several, each of which is a row of our leaf, such as the experts of (E, ...).
        turn: of each tensor.
    """

    names: str | tuple[str, ...]
    turn: Turn = SAME

    @property
    def is_stack(self) -> bool:
        """Whether the leaf is made of several tensors."""
        return isinstance(self.names, tuple)

    @property
    def every_name(self) -> tuple[str, ...]:
        """The names of all of its tensors."""
        return self.names if isinstance(self.names, tuple) else (self.names,)


Table = dict[str, Entry]  # by our names below `params/`


class Architecture:
    """One architecture of transformers: its tensors, the fields of its config.json, and its facts.

    A subclass for each lies in a module of this package and is registered in `ARCHITECTURES`.

    Attributes:
        title: in words, for messages.
        family: ours.
        model_types: values of `model_type` that it covers.
        classes: endings of the names in `architectures`; the first stands for all.
        fields: of config.json that are read or compared, and what each may be.
        sizes: those of them that the tensors have too.
        values: of what changes the function otherwise, the only value that our models have; None: none that can be named.
        inputs: fields that say how inputs are made, and what ours are.
        harmless: further fields that change no logits.
        aliases: other names of fields (`attribute_map`).
        depths: fields that count layers, and a pattern of the names of a layer's tensors.
        not_read: tensors that are left out, and why. transformers leaves them out as well.
    """

    title: str
    family: str
    model_types: tuple[str, ...]
    classes: tuple[str, ...]
    fields: Mapping[str, Any]
    sizes: frozenset[str]
    values: Mapping[str, Any]
    inputs: Mapping[str, Any] = {}
    harmless: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = {}
    depths: Mapping[str, str]
    not_read: Mapping[str, str] = {}

    def resolve(self, file: epath.Path, config: dict[str, Any]) -> None:
        """Brings fields that can be written in several ways into one form, and checks what types cannot.

        Raises:
            UserError: a field says what our models do not do.
        """

    def warn(self, file: epath.Path, config: Config) -> None:
        """Warns of fields that transformers itself does not treat alike everywhere."""

    def check_inputs(self, folder: epath.Path, config: Config) -> None:
        """Warns where other files of the folder ask for other inputs than our pipelines make.

        Raises:
            UserError: a file is damaged.
        """

    def rename(self, name: str) -> str:
        """A tensor's name as the table has it, where versions of transformers differ."""
        return name

    def left_out(self, stored: Tensors) -> dict[str, str]:
        """The tensors that are not read, and why."""
        return {name: self.not_read[name] for name in stored if name in self.not_read}

    def read(self, folder: epath.Path, config: Config, stored: Tensors) -> tuple[dict[str, views.Lazy], dict[str, Any]]:
        """Our arrays by their names below `params/`, and the facts that their shapes do not tell.

        Most of it is `sources.by_table`.

        Raises:
            UserError: the configuration and the tensors contradict each other, or hold what our models do not have.
        """
        raise NotImplementedError

    def metadata(self, config: Config) -> dict[str, Any]:
        """More entries of the reader's metadata."""
        return {}

    def holds(self, shapes: Shapes) -> bool:
        """Whether our leaves are those of this architecture."""
        raise NotImplementedError

    def config_sizes(self, shapes: Shapes) -> dict[str, Any]:
        """The fields of config.json that shapes tell, for writing.

        Raises:
            KeyError, IndexError, ValueError, ZeroDivisionError: a leaf is missing.
        """
        raise NotImplementedError

    def compared_sizes(self, shapes: Shapes) -> dict[str, Any]:
        """The fields of config.json that shapes tell, for comparing; raises as `config_sizes`."""
        return self.config_sizes(shapes)

    def table(self, sizes: Config, shapes: Shapes) -> Table:
        """The tensors of a model of these sizes, for writing."""
        raise NotImplementedError

    def validate(self, shapes: Shapes) -> None:
        """Raises UserError where our leaves have no counterpart although each one has."""

    def config(self, sizes: Config, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config.json.

        Args:
            sizes: see `config_sizes`.
            metadata: of our checkpoint, with `facts`.

        Raises:
            UserError: a fact has no counterpart.
        """
        raise NotImplementedError
