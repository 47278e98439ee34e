"""`distllm list [GROUP]`: the options that can be chosen, each with the first line of its YAML file."""

from collections.abc import Sequence

from distllm.cli.arguments import split

HELP = """
usage: distllm list [GROUP]

Shows the options of every group, or of one: arch, stage, engine, data, optim, schedule, tracking, hardware,
pipeline, experiment. Choose with GROUP=OPTION, for example: distllm train stage=sft data=skills
"""
OWN: dict[str, str] = {}


def run(arguments: Sequence[str]) -> int:
    """Print the options."""
    given = split("list", arguments, OWN, names="a group", max_names=1)

    from distllm.config.files import CHOOSABLE, first_line, options_in
    from distllm.errors import ConfigError
    from distllm.registry import unknown_name

    for group in given.names or CHOOSABLE:
        if group not in CHOOSABLE:
            raise ConfigError(unknown_name("group", group, CHOOSABLE))
        print(group)
        options = options_in(group)
        width = max(map(len, options), default=0)
        for option in options:
            print(f"  {option:<{width}}  {first_line(group, option)}")
    return 0
