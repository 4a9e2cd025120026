"""Evaluates a folder on tasks of lm-eval on eight devices, in a process that refuses TensorFlow, seqio and TFDS.

python -m tests.evaluate.harness_on_a_mesh OPTIONS...
"""

import os
import sys

from tests.data.without_tensorflow import Refuse, imported


def main(options):
    os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
    sys.meta_path.insert(0, Refuse())
    from upcycle import cli

    cli.run(['eval', *options, '--gin.MESH_SHAPE=(2, 2, 2)'])
    assert imported == [], imported


if __name__ == '__main__':
    main(sys.argv[1:])
