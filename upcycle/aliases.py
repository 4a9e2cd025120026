"""Names that modules and classes had in earlier versions: stored and users' gin files may hold them."""

import re

# Former modules and classes, and what they are called now.
FORMER = {
    'upcycle.train': 'upcycle.training',
    'upcycle.moe.config.AdaptiveBalance': 'upcycle.moe.conventions.AdaptiveBalance',
}
_FORMER = re.compile(rf'^((?:\w+/)*)({"|".join(map(re.escape, FORMER))})(?=\.|$)')
_REFERENCE = re.compile(r'(?<=@)[\w./]+')


def current(name: str) -> str:
    """The full name of a module, a class or a parameter, perhaps in scopes, as this version has it."""
    return _FORMER.sub(lambda found: found[1] + FORMER[found[2]], name)


def current_value(text: str) -> str:
    """A value in a gin file with its references, such as `@upcycle.train.run.Run()`, as this version has them."""
    return _REFERENCE.sub(lambda found: current(found[0]), text)
