"""Only the modules of a family name it: what a new family touches is what docs/contributing.md says."""

import pathlib
import re

import pytest

from upcycle.models.registry import FAMILIES

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / 'upcycle'
WORDS = (*FAMILIES, 'encoder', 'decoder', 'image', 'num_classes', 'pos_embedding')
# A family's own folders, and the evaluators that declare their family.
OWN = ('models/', 'checkpoints/', 'data/', 'evaluate/few_shot.py', 'evaluate/tasks.py')
# A class of Pillow, containers of a cluster, and the name of a format on the command line.
ALLOWED = re.compile(r'\bPIL\.Image\b|\bdocker-image\b|\bvit_npz\b')
_TOKEN = re.compile(r'[A-Za-z0-9_]+')
# Of a token in CamelCase; T5X is a code base, and no family.
_PART = re.compile(r'T5X|T5|ViT|[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[0-9]+')
_FAMILY = re.compile(rf'(?:^|_)(?:{"|".join(WORDS)})s?(?:_|$)')


def named_in(text):
    """Tokens of a text with one of `WORDS` as whole parts, whether of snake_case or of CamelCase."""
    tokens = dict.fromkeys(_TOKEN.findall(ALLOWED.sub('', text)))
    return [token for token in tokens if _FAMILY.search('_'.join(_PART.findall(token)).lower())]


def offenders():
    """What each module outside `OWN` names, by its path in the package."""
    names = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob('*.py'))}
    found = {name: named_in(f'{name} {path.read_text("utf-8")}') for name, path in names.items()}
    return {name: tokens for name, tokens in found.items() if tokens and not name.startswith(OWN)}


@pytest.mark.parametrize(
    'token',
    [
        *('t5', 'T5', 'T5Config', 'mT5', 't5_1_1_mini', 'moe/t5.gin', 'ViT', 'vit_b16', 'VIT', 'ViTs', 'images'),
        *('num_encoder_layers', 'NUM_DECODER_LAYERS', 'EncoderDecoder', 'encoder-only', 'decoders', "'decoder'"),
        *('ImageClassifier', 'image_size', 'NUM_CLASSES', 'num_classes', 'NumClasses', 'pos_embedding', 'PosEmbedding'),
    ],
)
def test_what_names_a_family(token):
    assert named_in(f'a {token} b')


@pytest.mark.parametrize(
    'text',
    [
        *('invite', 'vitality', 'imagenet2012', 'encoderblock_7', 'T5X', 't5x', 'classes', 'num', 'embedding', 'pos'),
        *('PIL.Image.open', '<img src="a">', '--docker-image=x', 'recoded', 'vmoe', 'UTF8', 'num classes'),
    ],
)
def test_what_does_not(text):
    assert not named_in(text)


def test_only_its_own_modules_name_a_family():
    assert not offenders()
