"""The form of a checklist item: a check that holds, and holds no more with the bug planted into the real code."""

import pytest
from patched import planted

NUMBERS = range(1, 45)


def noticed(check, module, old, new):
    """Assert that `check` fails while `old` reads `new` in `module`."""
    with planted(module, old, new), pytest.raises(AssertionError):
        check()


def holds_and_notices(check, *bugs):
    """Run `check`, then once more under each bug (module, old, new), where it must fail."""
    check()
    for module, old, new in bugs:
        noticed(check, module, old, new)
