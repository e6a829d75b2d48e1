"""python main.py [verb] [RUN | --config FILE] [flags] [path=value ...]: parse, load, run a verb. No logic."""

import argparse
import importlib
import sys

from mtx.command import VERBS, parser, refuse_strangers, simulate, take_verb
from mtx.errors import ConfigError, Stopped, UserError


def main(argv: list[str]) -> int:
    try:
        flags, words = (p := parser()).parse_known_args(argv[1:])
        verb = take_verb(words)
        refuse_strangers(verb, flags)
        if flags.devices is not None:
            simulate(flags.devices)
        # Help for train waits for no import of JAX.
        module = None if flags.help and verb == "train" else importlib.import_module(f"mtx.{VERBS[verb][0]}")
        if hasattr(module, "add_flags"):
            module.add_flags(p)
            flags, words = p.parse_known_args(words, flags)
        if flags.help:
            print(p.format_help(), end="")
            return 0 if flags.config is None else importlib.import_module("mtx.config").print_help(flags.config, words)
        assert module is not None
        return module.main(flags, words, argv)
    except Stopped as end:
        print(end, file=sys.stderr)
        return end.exit_code
    except KeyboardInterrupt:  # train has its own way to stop
        print("stopped.", file=sys.stderr)
        return 130
    except (UserError, argparse.ArgumentError) as error:
        said = str(error).replace("ignored explicit argument", "takes no value, got")  # argparse, of --fresh=true
        print(*(f"error: {line}" for line in said.splitlines()), sep="\n", file=sys.stderr)
        return getattr(error, "exit_code", ConfigError.exit_code)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
