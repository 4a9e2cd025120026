"""Former names of modules and classes, which stored gin files and those of users may hold."""

import re

# Former names and present ones.
FORMER = {
    'upcycle.train': 'upcycle.training',
    'upcycle.moe.config.AdaptiveBalance': 'upcycle.moe.conventions.AdaptiveBalance',
}
_FORMER = re.compile(rf'^((?:\w+/)*)({"|".join(map(re.escape, FORMER))})(?=\.|$)')
_REFERENCE = re.compile(r'(?<=@)[\w./]+')


def current(name: str) -> str:
    """Translates the full name of a module, class or parameter, scoped or not, to this version."""
    return _FORMER.sub(lambda match: match[1] + FORMER[match[2]], name)


def current_value(text: str) -> str:
    """Translates the references in a gin value, such as `@upcycle.train.run.Run()`, to this version."""
    return _REFERENCE.sub(lambda match: current(match[0]), text)
