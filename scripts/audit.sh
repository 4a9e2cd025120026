#!/usr/bin/env bash
# Checks the installed dependencies for known vulnerabilities.
#
#   scripts/audit.sh [...]     # arguments are passed to pip-audit, such as --ignore-vuln=ID for an irrelevant one
#
# Needs the network, and pip-audit in the environment that runs upcycle (`pip install pip-audit`). Exits with 1 if a package has a
# known vulnerability, with 2 if the check failed or was incomplete.
set -euo pipefail

if ! command -v pip-audit > /dev/null; then
  echo "audit.sh needs pip-audit: pip install pip-audit" >&2
  exit 2
fi
# upcycle itself is not in a package index. Any other package that cannot be checked is a failure.
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
    sys.exit('audit.sh: pip-audit has not written a report.')
packages = [package for package in packages if package['name'] != 'upcycle']
skipped = [package for package in packages if 'skip_reason' in package]
for package in packages:
    for known in package.get('vulns', ()):
        fixed = ', '.join(known['fix_versions']) or 'no version'
        print(f'{package["name"]} {package["version"]}: {known["id"]}, fixed in {fixed}')
for package in skipped:
    print(f'{package["name"]}: not checked ({package["skip_reason"]})', file=sys.stderr)
print(f'{len(packages) - len(skipped)} packages checked, {sum(bool(p.get("vulns")) for p in packages)} with known vulnerabilities')
sys.exit(bool(skipped))
PYTHON
exit "$code"
