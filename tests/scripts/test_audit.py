"""scripts/audit.sh with a fake pip-audit."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'audit.sh'
SOUND = {'name': 'numpy', 'version': '2.0', 'vulns': []}
KNOWN = {'name': 'pillow', 'version': '9.0', 'vulns': [{'id': 'CVE-1', 'fix_versions': ['9.1']}]}
OURS = {'name': 'upcycle', 'skip_reason': 'distribution marked as editable'}
UNKNOWN = {'name': 'seqio', 'skip_reason': 'not found on the index'}


def audit(folder, packages, code, *arguments):
    """Runs the script with a pip-audit that reports these packages (None: nothing) and exits with that status."""
    program = folder / 'pip-audit'
    report = '' if packages is None else f'echo \'{json.dumps({"dependencies": packages})}\' > "${{a#--output=}}"'
    body = f'for a in "$@"; do [[ $a == --output=* ]] && {report or ":"}; done'
    program.write_text(f'#!/usr/bin/env bash\necho "$@" > {folder}/arguments\n{body}\nexit {code}\n')
    program.chmod(0o755)
    environment = {**os.environ, 'PATH': f'{folder}{os.pathsep}{os.environ["PATH"]}'}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ('packages', 'pip_audit', 'code', 'words'),
    [
        ([SOUND, OURS], 0, 0, '1 packages checked, 0 with'),
        ([SOUND, KNOWN, OURS], 1, 1, 'pillow 9.0: CVE-1, fixed in 9.1'),
        ([SOUND, UNKNOWN], 0, 2, 'seqio: not checked (not found on the index)'),
        (None, 1, 2, 'not written a report'),
    ],
)
def test_what_is_known_and_what_is_not(packages, pip_audit, code, words, tmp_path):
    result = audit(tmp_path, packages, pip_audit, '--ignore-vuln=CVE-7')
    assert result.returncode == code
    assert words in result.stdout + result.stderr
    assert '--ignore-vuln=CVE-7' in (tmp_path / 'arguments').read_text()


def test_it_is_clean_and_says_what_to_install(tmp_path):
    if shutil.which('shellcheck') is not None:
        subprocess.run(['shellcheck', SCRIPT], check=True)
    (tmp_path / 'bash').symlink_to(shutil.which('bash'))
    result = subprocess.run([shutil.which('bash'), SCRIPT], env={'PATH': str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 2 and 'pip install pip-audit' in result.stderr
