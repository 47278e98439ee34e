"""Splits a verb's arguments into names, the verb's own `key=value` pairs, and settings for `compose`.

Values of a verb's own keys are taken literally (`prompt="a, b = c?"` needs no quoting beyond the shell's).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distllm.errors import ConfigError


@dataclass(slots=True)
class Arguments:
    """What stands behind a verb on the command line."""

    names: list[str] = field(default_factory=list)
    """Arguments without `=`, in order."""
    own: dict[str, str] = field(default_factory=dict)
    """The verb's own keys, values as typed."""
    overrides: list[str] = field(default_factory=list)
    """Everything else: settings of the config."""

    def required(self, verb: str, key: str) -> str:
        """Return the value of the verb's own `key`.

        Raises:
            ConfigError: it was not given.
        """
        if not self.own.get(key):
            raise ConfigError(f"`distllm {verb}` needs {key}=... (see `distllm {verb} --help`).")
        return self.own[key]

    def integer(self, key: str, default: int, least: int = 1) -> int:
        """Return the verb's own `key` as an integer.

        Raises:
            ConfigError: it is not one, or below `least`.
        """
        text = self.own.get(key, str(default))
        try:
            value = int(text)
        except ValueError:
            raise ConfigError(
                f"{key}={text} is not an integer. Example: {key}={default}."
            ) from None
        if value < least:
            raise ConfigError(f"{key}={text} must be at least {least}. Example: {key}={default}.")
        return value


def split(
    verb: str,
    arguments: Sequence[str],
    own: Mapping[str, str],
    *,
    names: str = "",
    max_names: int | None = 0,
) -> Arguments:
    """Sort `arguments` into names, the verb's own keys and config overrides.

    Args:
        verb: the verb, for messages.
        own: the verb's own keys -> their meaning.
        names: what the arguments without `=` stand for, for messages.
        max_names: how many of those the verb takes; None for any number.

    Raises:
        ConfigError: an argument is neither.
    """
    result = Arguments()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in own:
            result.own[key] = value
        elif equals and not key.startswith("-"):
            result.overrides.append(argument)
        elif argument.startswith("-"):
            raise ConfigError(
                f"`{argument}` is not an option of `distllm {verb}`: settings are written key=value, "
                f"without dashes (see `distllm {verb} --help`)."
            )
        elif max_names is not None and len(result.names) == max_names:
            takes = f"takes at most {max_names} ({names})" if max_names else "takes only key=value"
            raise ConfigError(f"`{argument}` is not a setting: `distllm {verb}` {takes}.")
        else:
            result.names.append(argument)
    return result
