#!/usr/bin/env python3
"""One command to set up, one for the main job, one for the tests; see `python3 tools/dev.py --help`.

This file stays readable for any Python, however old, so that a wrong one meets a sentence and not a syntax error.
"""

import sys

OLDEST = (3, 10)
NEWEST = (3, 13)


def python_problem(version):
    """Say in one sentence why a Python `version` (a tuple such as sys.version_info) cannot be used; None if it can."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return None
    span = ".".join(map(str, OLDEST)) + " to " + ".".join(map(str, NEWEST))
    found = ".".join(map(str, version[:3]))
    return "This is Python " + found + " and Ovi Native needs " + span + ": start it as `python3.12 tools/dev.py ...`."


if __name__ == "__main__":
    problem = python_problem(sys.version_info)
    if problem:
        sys.exit(problem)
    from devlib.cli import main

    sys.exit(main(sys.argv[1:]))
