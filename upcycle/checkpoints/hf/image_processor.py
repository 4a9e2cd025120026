"""What the image processor of a Hugging Face folder makes of an image, compared with what our pipelines make of it.

Matched: image_processing_vit.py of transformers 4.57 and 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle import schema, warning
from upcycle.checkpoints import json_files
from upcycle.errors import UserError

# Where a processor is described; the first counts, if it holds `image_processor`.
_PROCESSOR_FILES = ('processor_config.json', 'preprocessor_config.json')
# What transformers' ViTImageProcessor takes where the file says nothing.
_DEFAULTS = {
    'do_resize': True,
    'size': 224,
    'resample': 2,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': 0.5,
    'image_std': 0.5,
    'do_center_crop': False,
    'crop_size': None,
    'do_flip_channel_order': False,
    'do_pad': False,
}
_PROCESSORS = ('ViTImageProcessor', 'ViTImageProcessorFast', 'ViTFeatureExtractor', 'ViTImageProcessorPil')
_PROCESSORS += ('DeiTImageProcessor', 'DeiTImageProcessorFast', 'DeiTFeatureExtractor', 'DeiTImageProcessorPil')
_HARMLESS = {
    *('image_processor_type', 'feature_extractor_type', 'processor_class', '_valid_processor_keys'),
    *('return_tensors', 'device', 'data_format', 'input_data_format'),
    *('default_to_square', 'do_convert_rgb', 'disable_grouping', '_name_or_path'),
    *('transformers_version', 'pad_size', 'image_seq_length', 'auto_map'),
}
_RESAMPLING = {0: 'nearest', 1: 'Lanczos', 2: 'bilinear', 3: 'bicubic', 4: 'box', 5: 'Hamming'}


def check(folder: epath.Path, image_size: Any) -> None:
    """Warns where the configuration of the image processor asks for other images than those that our pipelines make.

    Args:
        folder: of the model.
        image_size: of the model's configuration.

    Raises:
        UserError: the file is damaged.
    """
    for name in _PROCESSOR_FILES:
        file = folder / name
        processor = json_files.read_json(file) if file.exists() else {}
        processor = processor.get('image_processor', processor if name == _PROCESSOR_FILES[-1] else {})
        if not isinstance(processor, Mapping):
            raise UserError(
                f'{file} is damaged (its image_processor is {schema.shown(processor)}): copy the checkpoint again.'
            )
        if processor:
            break
    else:
        return
    processor = {name: value for name, value in processor.items() if value is not None}
    differences = _range_differences(processor) + _shape_differences(processor, image_size)
    kind = processor.get('image_processor_type', processor.get('feature_extractor_type', _PROCESSORS[0]))
    if kind not in _PROCESSORS:
        differences.append(f'{schema.shown(kind)} is a processor that is not known here')
    if unknown := sorted(processor.keys() - _DEFAULTS.keys() - _HARMLESS):
        differences.append(f'{", ".join(unknown)} {"is" if len(unknown) == 1 else "are"} not known here')
    if differences:
        warning.once(f'{file} asks for other images than our pipelines make: {"; ".join(differences)}.')


def _range_differences(processor: Mapping[str, Any]) -> list[str]:
    """Where black and white become something else than -1 and 1 in every channel."""
    settings = {**_DEFAULTS, **processor}
    try:
        factor = float(settings['rescale_factor']) if settings['do_rescale'] else 1.0
        mean, std = (
            [float(x) for x in settings[name]] if isinstance(settings[name], list) else [float(settings[name])]
            for name in ('image_mean', 'image_std')
        )
        if not settings['do_normalize']:
            mean, std = [0.0], [1.0]
        channels = max(len(mean), len(std))
        mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
        ranges = [((0 - m) / s, (255 * factor - m) / s) for m, s in zip(mean, std, strict=True)]
    except (TypeError, ValueError, ZeroDivisionError):
        return ['image_mean, image_std or rescale_factor are no numbers, or not one for each channel']
    fields = ', '.join(
        f'{name} = {schema.shown(settings[name])}'
        for name in ('do_rescale', 'rescale_factor', 'do_normalize', 'image_mean', 'image_std')
        if name in processor
    )
    if all(abs(low + 1) + abs(high - 1) < 1e-3 for low, high in ranges):
        return []
    low, high = ranges[0]
    if all(abs(a - low) + abs(b - high) < 1e-3 for a, b in ranges):
        return [
            f'black and white become {low:.4g} and {high:.4g} ({fields}), which VALUE_RANGE = ({low:.6g}, {high:.6g}) does'
        ]
    return [f'each channel has a range of its own ({fields}), and VALUE_RANGE is one for all']


def _shape_differences(processor: Mapping[str, Any], image_size: Any) -> list[str]:
    settings = {**_DEFAULTS, **processor}
    switches = [name for name in processor if name in _DEFAULTS and name.startswith('do_')]
    differences = [
        f'{name} = {schema.shown(processor[name])} is neither True nor False'
        for name in switches
        if not isinstance(processor[name], bool)
    ]
    if not settings['do_resize'] and not settings['do_center_crop']:
        differences.append('do_resize = False, and ours resize every image')
    name = 'crop_size' if settings['do_center_crop'] and settings['crop_size'] is not None else 'size'
    size = settings[name] if name in processor else image_size
    sides = [size.get(side) for side in ('height', 'width')] if isinstance(size, Mapping) else size
    sides = sides if isinstance(sides, list) else [sides]
    if (
        (not sides or sides != [image_size] * len(sides))
        and None not in (size, image_size)
        and not _within_crop(settings, name)
    ):
        differences.append(
            f'{name} = {schema.shown(size)}, and image_size of config.json is {schema.shown(image_size)}'
        )
    if 'resample' in processor and processor['resample'] != _DEFAULTS['resample']:
        resample = processor['resample']
        how = _RESAMPLING.get(resample, 'not known') if isinstance(resample, int) else 'not known'
        differences.append(f'resample = {schema.shown(resample)} ({how}), and ours is bilinear')
    differences += [f'{name} = True' for name in ('do_flip_channel_order', 'do_pad') if settings[name]]
    return differences


def _within_crop(settings: Mapping[str, Any], name: str) -> bool:
    """Whether a size is what a crop is taken from, whose own size nothing says."""
    return bool(settings['do_center_crop']) and name == 'size'
