"""The program: picks the verb, turns errors into messages and exit codes. Each verb is a file beside this one.

A verb's module offers `HELP` (text), `OWN` (its own `key=value` pairs -> meaning) and `run(arguments) -> exit code`.
Nothing heavy is imported here: `distllm --help` answers before torch could be loaded.

Exit codes: 0 done; 2 the user's mistake; 3 stopped by a signal after a clean save; 1 anything else. Under a launcher a
clean stop is 0, and `stopped.json` in the run directory tells: launchers take other codes for failures and start anew.
"""

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from distllm.cli import environment
from distllm.errors import ConfigError, LostRankError, OtherRankError, UserError
from distllm.registry import unknown_name
from distllm.train import supervision

VERBS = {
    "train": "run one stage, from pretrain to grpo: `distllm list stage` names them",
    "pipeline": "run stages chained into rounds; go on where it stopped",
    "data": "look at a data source: samples, counts",
    "tokenizer": "train a tokenizer on a data source",
    "generate": "print samples of a model",
    "chat": "talk to a model in the terminal",
    "evaluate": "measure a model on held-out data; JSON out",
    "export": "write a model directory in Hugging Face layout",
    "import": "check a Hugging Face directory and write it as one of ours",
    "plan": "print batch arithmetic, parameters, memory and FLOPs of a run; start nothing",
    "explain": "tell a setting's value, where it comes from and what it means",
    "list": "show what there is to choose",
    "doctor": "show what this machine can run and what is missing",
    "report": "write one HTML file with the plots of one or several runs",
}

EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_STOPPED = range(4)

_HELP = """usage: distllm VERB [key=value ...]

{verbs}

Settings are written key=value, for example: distllm train stage=pretrain train.max_steps=50 run.dir=runs/first
`distllm VERB --help` tells more about a verb, `distllm explain KEY` about a setting, `distllm list` what to choose.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    environment.set_defaults()
    words = _without_local_rank(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            width = max(map(len, VERBS))
            print(_HELP.format(verbs="\n".join(f"  {v:<{width}}  {s}" for v, s in VERBS.items())))
            return EXIT_DONE if words else EXIT_USER
        if words[0] == "--version":
            print(_version())
            return EXIT_DONE
        verb, rest = words[0], words[1:]
        if verb not in VERBS:
            raise ConfigError(unknown_name("verb", verb, VERBS))
        module = importlib.import_module(f"distllm.cli.{_FILES.get(verb, verb)}")
        if "-h" in rest or "--help" in rest:
            print(_verb_help(verb, module))
            return EXIT_DONE
        with _collector_paused(verb in ("train", "pipeline")):
            return module.run(rest)
    except UserError as error:
        supervision.report_failure(error, EXIT_USER, message=str(error))
        print(f"distllm: {error}", file=sys.stderr)
        return EXIT_USER
    except OtherRankError as error:
        code = EXIT_USER if error.is_users else EXIT_FAILED
        supervision.report_failure(error, code, message=str(error), is_cause=False)
        return code
    except LostRankError as error:
        supervision.report_failure(error, EXIT_FAILED, message=str(error), is_cause=False)
        print(f"distllm: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        # Before a run is under way, or where there is none: nothing to save.
        print("distllm: interrupted", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain once more when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        supervision.report_failure(error, EXIT_FAILED)
        raise


@contextlib.contextmanager
def _collector_paused(paused: bool) -> Iterator[None]:
    """Hold back the cyclic collector: it walks what imports make over and over (1.5 s of 9). The stage starts it again."""
    enabled = gc.isenabled()
    if paused:
        gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stopped_exit_code() -> int:
    """Return what a process exits with after a signal and a clean save."""
    from distllm.engines.processes import launched

    return EXIT_DONE if launched() else EXIT_STOPPED


_FILES = {"import": "import_", "list": "list_"}  # a keyword, and a name that would hide the builtin


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("distllm")
    except PackageNotFoundError:
        return "not installed: run from a checkout"


def _verb_help(verb: str, module: ModuleType) -> str:
    lines = [f"distllm {verb}: {VERBS[verb]}", "", module.HELP.strip()]
    if module.OWN:
        width = max(map(len, module.OWN))
        lines += ["", "Keys of this verb:"]
        lines += [f"  {key + '=':<{width + 1}}  {text}" for key, text in module.OWN.items()]
    return "\n".join(lines)


def _without_local_rank(words: Sequence[str]) -> list[str]:
    """Drop the `--local_rank=N` that DeepSpeed's launcher inserts; keep its value in the environment."""
    kept = []
    for word in words:
        if word.startswith(("--local_rank=", "--local-rank=")):
            os.environ.setdefault("LOCAL_RANK", word.partition("=")[2])
        else:
            kept.append(word)
    return kept
