#!/usr/bin/env bash
# Looks the installed dependencies up in the databases of known vulnerabilities.
#
#   scripts/audit.sh [...]     # arguments go to pip-audit, such as --ignore-vuln=ID for one that does not concern us
#
# Needs pip-audit in the environment that runs upcycle (`pip install pip-audit`) and the network. Exits with 1 where something is known
# against a package, with 2 where it could not look.
set -euo pipefail

if ! command -v pip-audit > /dev/null; then
  echo "audit.sh needs pip-audit: pip install pip-audit" >&2
  exit 2
fi
# upcycle itself is no package of an index, and a package that cannot be looked up must not pass for a sound one.
code=0
report=$(mktemp)
trap 'rm -f "$report"' EXIT
pip-audit --progress-spinner=off --skip-editable --format=json "--output=$report" "$@" || code=$?
python3 - "$report" << 'PYTHON' || code=2
import json
import sys

try:
    packages = json.load(open(sys.argv[1], encoding='utf-8'))['dependencies']
except (OSError, ValueError, KeyError):
    sys.exit('audit.sh: pip-audit has left no report.')
packages = [package for package in packages if package['name'] != 'upcycle']
skipped = [package for package in packages if 'skip_reason' in package]
for package in packages:
    for known in package.get('vulns', ()):
        fixed = ', '.join(known['fix_versions']) or 'no version'
        print(f'{package["name"]} {package["version"]}: {known["id"]}, fixed in {fixed}')
for package in skipped:
    print(f'{package["name"]}: not looked up ({package["skip_reason"]})', file=sys.stderr)
print(f'{len(packages) - len(skipped)} packages looked up, {sum(bool(p.get("vulns")) for p in packages)} with something against them')
sys.exit(bool(skipped))
PYTHON
exit "$code"
