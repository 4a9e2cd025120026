"""The names of the checkpoint formats, in a module that is cheap to import for the command line."""

import dataclasses

from upcycle.errors import UserError

FORMATS = ('upcycle', 't5x_legacy', 't5x_orbax', 'huggingface', 'vit_npz')  # read and written
READ = (*FORMATS, 'gguf')
# Programs that load folders of Hugging Face.
ENGINES = ('transformers', 'vllm', 'llama.cpp')


@dataclasses.dataclass(frozen=True)
class FolderRequest:
    """What a user asks for of a folder of Hugging Face.

    Attributes:
      layout: its `model_type`; None for the one that fits the model best.
      engines: of `ENGINES`, which must compute the model exactly; transformers always must.
      equal_experts: whether dense layers of a model with experts are written as experts that are all equal.
    """

    layout: str | None = None
    engines: tuple[str, ...] = ENGINES[:1]
    equal_experts: bool = False


ANY_FOLDER = FolderRequest()


def folder_request(
    format: str, layout: str | None, engines: str | None, dense_layers: str | None = None
) -> FolderRequest:
    """Parses `--layout`, `--for` and `--dense_layers`.

    Raises:
      UserError: an engine is unknown, or the format is not a folder of Hugging Face.
    """
    for option, value in (('--layout', layout), ('--for', engines), ('--dense_layers', dense_layers)):
        if value is not None and format != 'huggingface':
            raise UserError(f'{option}={value} needs --format=huggingface.')
    named = ENGINES[:1] if engines is None else tuple(engines.split(','))
    if unknown := [name for name in named if name not in ENGINES]:
        raise UserError(f'--for={engines}: {unknown[0] or "an empty name"} is not one of {", ".join(ENGINES)}.')
    return FolderRequest(layout, named, dense_layers == 'experts')
