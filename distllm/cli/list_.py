"""`distllm list [GROUP]`: the options that can be chosen, each with the first line of its YAML file."""

from collections.abc import Sequence

from distllm.cli.arguments import split

HELP = """
usage: distllm list [GROUP | matrix]

Shows the options of every group, or of one: arch, stage, engine, data, optim, schedule, tracking, hardware,
adapter, pipeline, experiment. Choose with GROUP=OPTION, for example: distllm train stage=sft data=skills
`distllm list matrix` shows which architecture has learned a toy of which stage, and how well.
"""
OWN: dict[str, str] = {}


def run(arguments: Sequence[str]) -> int:
    """Print the options."""
    given = split("list", arguments, OWN, names="a group", max_names=1)

    from distllm.config.files import CHOOSABLE, first_line, options_in
    from distllm.errors import ConfigError
    from distllm.registry import unknown_name

    if given.names == ["matrix"]:
        _print_matrix()
        return 0
    for group in given.names or CHOOSABLE:
        if group not in CHOOSABLE:
            raise ConfigError(unknown_name("group", group, CHOOSABLE))
        print(group)
        options = options_in(group)
        width = max(map(len, options), default=0)
        for option in options:
            print(f"  {option:<{width}}  {first_line(group, option)}")
    return 0


def _print_matrix() -> None:
    """Print architecture x stage as a Markdown table: what was learned, and the figure before and after."""
    import json

    from distllm.config.files import matrix_file
    from distllm.errors import ConfigError

    columns = ("pretrain", "SFT", "reward", "RL")
    path = matrix_file()
    if not path.is_file():
        raise ConfigError(
            f"{path}, the record of what was learned, is not there. python -m distllm.testing.matrix runs every cell and "
            "writes it."
        )
    rows = json.loads(path.read_text(encoding="utf-8"))
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for arch in dict.fromkeys(row["arch"] for row in rows):
        cells = []
        for column in columns:
            found = [r for r in rows if (r["arch"], r["column"]) == (arch, column)]
            words = [
                f"{r['what']}: {r['metric']} {r['before']:.2f} to {r['after']:.2f}"
                + ("" if r["learned"] else " (not learned)")
                for r in found
            ]
            cells.append("<br>".join(words) or "-")
        print(f"| {arch} | " + " | ".join(cells) + " |")
