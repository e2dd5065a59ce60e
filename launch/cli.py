"""The console script: `gatewise COMMAND [field=value ...]`.

A command is a module with `run(arguments) -> exit code` and `usage(arguments) -> text`; it is
imported when it is called, so that help and mistakes are quick and need no torch.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from gatewise.conf.fields import nearest
from gatewise.launch.session import EXIT_CONFIG, EXIT_INTERRUPT, EXIT_OK, one_line, print_error
from gatewise.parallel.errors import ConfigError

__all__ = ["COMMANDS", "main"]

# Name, module, and one line of help; only what works is listed.
COMMANDS = {
    "train": ("gatewise.launch.train", "train a model, or go on with a run that was stopped"),
    "submit": ("gatewise.launch.submit", "train through torchrun or Slurm, or sweep settings"),
    "evaluate": ("gatewise.launch.evaluate", "measure a checkpoint on validation text"),
    "analyze": ("gatewise.launch.analyze", "measure what a checkpoint's routers do"),
    "generate": ("gatewise.launch.generate", "continue a prompt with a checkpoint"),
    "distil": ("gatewise.launch.distil", "train a pre-gate to choose as a checkpoint's routers do"),
    "bench": (
        "gatewise.launch.bench",
        "measure this machine: `bench kernels`, `layer`, `pregate`, `schedule`, `step`",
    ),
    "compress": ("gatewise.launch.compress", "quantise a checkpoint's experts to a few bits"),
    "convert": (
        "gatewise.launch.convert",
        "other programs' models in and out: `convert from_hf`, `from_gguf`, `to_hf`",
    ),
    "export": ("gatewise.launch.export", "write a compressed model for another program"),
    "plan": ("gatewise.launch.plan", "schedules of a step side by side, and the best one's plan"),
    "simulate": ("gatewise.launch.simulate", "step time, memory and layout on a cluster"),
    "report": ("gatewise.launch.report", "one HTML file of a run, or of several side by side"),
    "dashboard": ("gatewise.launch.dashboard", "write or push the W&B workspace of a project"),
    "verify": (
        "gatewise.launch.verify",
        "compare a layout with one rank: gradients, resume, ...",
    ),
    "estimate": ("gatewise.launch.estimate", "memory of a run's fullest rank, before it starts"),
    "drill": ("gatewise.launch.drill", "kill ranks at random moments and compare with a quiet run"),
    "doctor": ("gatewise.launch.doctor", "show what is installed, what is missing, how to get it"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (crash), 2 (mistake) or 85 (start again)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except ConfigError as error:
        print_error(one_line(error))
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print_error("interrupted")
        return EXIT_INTERRUPT
    except BrokenPipeError:  # the reader of our output is gone, as in `gatewise ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return EXIT_OK
    if arguments[0] in ("-V", "--version"):
        print(f"gatewise {importlib.metadata.version('gatewise')}")
        return EXIT_OK
    module = _load(arguments[0])
    rest = [word for word in arguments[1:] if word not in ("-h", "--help")]
    if len(rest) < len(arguments) - 1:
        print(module.usage(rest))
        return EXIT_OK
    return int(module.run(rest))


def _load(name: str) -> ModuleType:
    if name not in COMMANDS:
        raise ConfigError(
            f"unknown command {name!r}{nearest(name, COMMANDS)}; commands: {', '.join(COMMANDS)}"
        )
    return importlib.import_module(COMMANDS[name][0])


def _help() -> str:
    lines = ["usage: gatewise COMMAND [field=value ...]", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "`gatewise COMMAND --help` lists the fields of a command and their defaults."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
