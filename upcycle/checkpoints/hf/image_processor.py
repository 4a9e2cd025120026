"""Compares the image processor of a Hugging Face folder with our image pipelines.

Matched: image_processing_vit.py of transformers 4.57 and 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle import files, schema, warning
from upcycle.checkpoints import json_files

# The first file counts if it holds `image_processor`; the second is the processor itself, or holds one.
_PROCESSOR_FILES = ('processor_config.json', 'preprocessor_config.json')
# Defaults of transformers' ViTImageProcessor.
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
    """Warns if the configuration of the image processor describes images that our pipelines do not make.

    Args:
      folder: of the model.
      image_size: of the model's configuration.

    Raises:
      UserError: the file is damaged.
    """
    for name in _PROCESSOR_FILES:
        file = folder / name
        content = json_files.read_json(file) if file.exists() else {}
        processor = content.get('image_processor', content if name == _PROCESSOR_FILES[-1] else {})
        if not isinstance(processor, Mapping):
            raise files.damaged(file, f'image_processor is {schema.shown(processor)}')
        if processor:
            break
    else:
        return
    processor = {name: value for name, value in processor.items() if value is not None}
    differences = _range_differences(processor) + _shape_differences(processor, image_size)
    kind = processor.get('image_processor_type', processor.get('feature_extractor_type', _PROCESSORS[0]))
    if kind not in _PROCESSORS:
        differences.append(f'{schema.shown(kind)} is an unknown processor')
    if unknown := sorted(processor.keys() - _DEFAULTS.keys() - _HARMLESS):
        differences.append(f'unknown fields: {", ".join(unknown)}')
    if differences:
        warning.once(f'{file} describes other images than our pipelines make: {"; ".join(differences)}.')


def _range_differences(processor: Mapping[str, Any]) -> list[str]:
    """Reports if black and white do not become -1 and 1 in every channel."""
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
        return ['image_mean, image_std and rescale_factor must be numbers, or one number for each channel']
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
            f'black and white become {low:.4g} and {high:.4g} ({fields}): set VALUE_RANGE = ({low:.6g}, {high:.6g})'
        ]
    return [f'channels have different ranges ({fields}), but VALUE_RANGE applies to all']


def _shape_differences(processor: Mapping[str, Any], image_size: Any) -> list[str]:
    settings = {**_DEFAULTS, **processor}
    differences = [
        f'{name} = {schema.shown(value)} must be True or False'
        for name, value in processor.items()
        if name in _DEFAULTS and name.startswith('do_') and not isinstance(value, bool)
    ]
    if not settings['do_resize'] and not settings['do_center_crop']:
        differences.append('do_resize = False, but ours resize every image')
    is_cropped = settings['do_center_crop']
    name = 'crop_size' if is_cropped and settings['crop_size'] is not None else 'size'
    size = settings[name] if name in processor else image_size
    sides = [size.get(side) for side in ('height', 'width')] if isinstance(size, Mapping) else size
    sides = sides if isinstance(sides, list) else [sides]
    # `size` of a crop without `crop_size` is not the size of the result.
    is_known = None not in (size, image_size) and not (is_cropped and name == 'size')
    if is_known and (not sides or sides != [image_size] * len(sides)):
        differences.append(
            f'{name} = {schema.shown(size)}, but image_size of config.json is {schema.shown(image_size)}'
        )
    resample = processor.get('resample', _DEFAULTS['resample'])
    if resample != _DEFAULTS['resample']:
        kind = _RESAMPLING.get(resample, 'unknown') if isinstance(resample, int) else 'unknown'
        differences.append(f'resample = {schema.shown(resample)} ({kind}), but ours is bilinear')
    differences += [f'{name} = True' for name in ('do_flip_channel_order', 'do_pad') if settings[name]]
    return differences
