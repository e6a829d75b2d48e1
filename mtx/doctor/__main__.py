"""python -m mtx.doctor: the verb by itself."""

import argparse
import sys

from mtx.doctor import add_flags, run

parser = argparse.ArgumentParser("python -m mtx.doctor", description=run.__doc__)
add_flags(parser)
sys.exit(run(parser.parse_args()))
