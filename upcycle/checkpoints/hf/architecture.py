"""The interface that an architecture implements for the reader and the writer of Hugging Face folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from upcycle.checkpoints import views
from upcycle.errors import UserError

Config = Mapping[str, Any]  # the content of config.json
NOTES = '_notes'  # key of the notes in the header of the files, next to the fields that are read
Shapes = Mapping[str, tuple[int, ...]]  # of our leaves, by their names below `params/`
Tensors = Mapping[str, views.Lazy]  # by Hugging Face's names


@dataclasses.dataclass(frozen=True)
class Turn:
    """The change of layout between a tensor and our array.

    Attributes:
      to_ours: converts a lazy tensor to ours. Raises ValueError if its shape does not fit.
      to_theirs: the inverse, on NumPy arrays.
    """

    to_ours: Callable[[views.Lazy], views.Lazy]
    to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Turn(lambda x: x, lambda x: x)
# Linear layers: PyTorch's (out, in) is our (in, out).
LINEAR = Turn(views.reversed_axes, np.transpose)


@dataclasses.dataclass(frozen=True)
class Part:
    """A contiguous part of a tensor that several of our leaves share, such as the queries of a fused projection.

    Attributes:
      shape: of the whole tensor.
      rows: start and stop of the part on the first axis, or on the second axis if `index` is given.
      index: on the first axis, such as an expert; None: the first axis is that of `rows`.
    """

    shape: tuple[int, ...]
    rows: tuple[int, int]
    index: int | None = None

    @property
    def region(self) -> views.Region:
        """The part as a region of the tensor."""
        rows = (slice(*self.rows),)
        return rows if self.index is None else (slice(self.index, self.index + 1), *rows)

    def of(self, source: views.Lazy) -> views.Lazy:
        """Returns a view of the part; raises ValueError if the tensor has another shape."""
        if source.shape != self.shape:
            raise ValueError(f'it must be {list(self.shape)}')
        return views.Window(source if self.index is None else views.Layer(source, 0, self.index), (slice(*self.rows),))


@dataclasses.dataclass(frozen=True)
class Entry:
    """The tensor or tensors of one of our leaves.

    Attributes:
      names: the name of the tensor, or a tuple of names if each row of our leaf is a tensor, such as the experts of (E, ...).
      turn: the change of layout of each tensor, or of each part.
      parts: the part of each tensor that belongs to the leaf; (): the whole tensors.
      copies: whether each of the tensors, or of their parts, is the whole leaf; for writing.
    """

    names: str | tuple[str, ...]
    turn: Turn = SAME
    parts: tuple[Part, ...] = ()
    copies: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether the leaf is a stack of tensors."""
        return isinstance(self.names, tuple) and not self.copies

    @property
    def every_name(self) -> tuple[str, ...]:
        """The names of all tensors of the leaf."""
        return self.names if isinstance(self.names, tuple) else (self.names,)

    @property
    def pieces(self) -> tuple[tuple[str, Part | None], ...]:
        """The names of all tensors of the leaf, each with its part."""
        return tuple(zip(self.every_name, self.parts or (None,) * len(self.every_name), strict=True))


Table = dict[str, Entry]  # by our names below `params/`


class Architecture:
    """One architecture of transformers: its tensors, its fields of config.json, and its facts.

    Each subclass has a module in this package and is registered in `ARCHITECTURES`.

    Attributes:
      title: name for messages.
      family: our model family.
      model_types: the values of `model_type` that it covers.
      classes: valid suffixes of the names in `architectures`; the first is the default.
      fields: fields of config.json that are read or compared, with their types.
      sizes: the fields that must agree with the shapes of the tensors.
      values: other fields that change the function, with the only value that our models support; None: no value is supported.
      inputs: fields that describe the inputs, with our values.
      harmless: other fields that do not change the logits.
      aliases: other names of fields (`attribute_map`).
      depths: fields that count layers, with a pattern of the names of a layer's tensors.
      not_read: tensors that are ignored, and why; transformers ignores them, too.
      defaults: values of fields that the file does not have; a null in the file is a value.
      nullable: the fields with defaults that may be null.
      refuses_unknown_fields: whether a field that is not listed is an error; False: a warning.
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
    defaults: Mapping[str, Any] = {}
    nullable: frozenset[str] = frozenset()
    refuses_unknown_fields: bool = False

    def resolve(self, file: epath.Path, config: dict[str, Any]) -> None:
        """Normalises fields that can be written in several ways, and checks what types cannot express.

        Raises:
          UserError: our models do not support a value.
        """

    def warn(self, file: epath.Path, config: Config) -> None:
        """Warns about fields that versions of transformers treat differently."""

    def check_inputs(self, folder: epath.Path, config: Config) -> None:
        """Warns if other files of the folder describe inputs that our pipelines do not make.

        Raises:
          UserError: a file is damaged.
        """

    def rename(self, name: str) -> str:
        """Returns a tensor's name in the table, for names that differ between versions of transformers."""
        return name

    def left_out(self, stored: Tensors) -> dict[str, str]:
        """Returns the tensors that are not read, and why."""
        return {name: self.not_read[name] for name in stored if name in self.not_read}

    def read(self, folder: epath.Path, config: Config, stored: Tensors) -> tuple[dict[str, views.Lazy], dict[str, Any]]:
        """Returns our arrays by their names below `params/`, mostly with `sources.by_table`, and entries of the metadata.

        The entries are `facts`, or `model`, the description of the whole model, and others that writing needs.

        Raises:
          UserError: configuration and tensors contradict each other, or our models do not support them.
        """
        raise NotImplementedError

    def holds(self, shapes: Shapes) -> bool:
        """Whether our leaves belong to this architecture."""
        raise NotImplementedError

    def choose(
        self, alternatives: Sequence[Architecture], metadata: Mapping[str, Any], layout: str | None
    ) -> Architecture:
        """Returns the one of the architectures that match our leaves, this is the first, in which to store the model.

        Args:
          alternatives: all that match, with this one.
          metadata: of our checkpoint, with `facts` or `model`.
          layout: the `model_type` that the user asked for, of one of the alternatives; None: any.

        Raises:
          UserError: none of them computes the function of the model.
        """
        return self

    def with_equal_experts(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the metadata of a model all of whose layers have experts, and that computes the same.

        Raises:
          UserError: it would not compute the same.
        """
        raise UserError(
            f'--dense_layers=experts is for models with experts of decoder-only layouts, not for {self.title}.'
        )

    def sizes_for(self, shapes: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what `table` needs to know of a model; raises as `config_sizes`."""
        return self.config_sizes(shapes)

    def constants(self, sizes: Config) -> dict[str, tuple[tuple[int, ...], float]]:
        """Returns leaves that `table` has in addition to the model's, by their names below `params/`: shapes and values.

        The architecture needs them although they do not change the function, such as biases of zeros.
        """
        return {}

    def notes(self, sizes: Config) -> dict[str, str]:
        """Returns entries for the headers of the files, which `read` finds in `config` under `NOTES`."""
        return {}

    def config_sizes(self, shapes: Shapes) -> dict[str, Any]:
        """Returns the fields of config.json that follow from shapes, for writing.

        Raises:
          KeyError, IndexError, ValueError, ZeroDivisionError: a leaf is missing.
        """
        raise NotImplementedError

    def compared_sizes(self, shapes: Shapes) -> dict[str, Any]:
        """Returns the fields of config.json that follow from shapes, for comparing; raises as `config_sizes`."""
        return self.config_sizes(shapes)

    def table(self, sizes: Config, shapes: Shapes) -> Table:
        """Returns the tensors of a model of these sizes, for writing."""
        raise NotImplementedError

    def validate(self, shapes: Shapes) -> None:
        """Raises UserError if the architecture lacks our combination of leaves although it has each of them."""

    def config(self, sizes: Config, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the complete config.json.

        Args:
          sizes: see `config_sizes`.
          metadata: of our checkpoint, with `facts`.

        Raises:
          UserError: the format cannot express a fact.
        """
        raise NotImplementedError
