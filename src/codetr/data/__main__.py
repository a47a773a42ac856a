"""python -m codetr.data COMMAND key=value ..."""

from functools import partial

from codetr import commands
from codetr.data import commands as own

NAME = "codetr.data"
run = partial(commands.run, own, NAME)

if __name__ == "__main__":
    commands.main(own, NAME)
