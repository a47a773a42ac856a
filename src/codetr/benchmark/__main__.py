"""python -m codetr.benchmark COMMAND key=value ..."""

from codetr import commands
from codetr.benchmark import commands as own

if __name__ == "__main__":
    commands.main(own, "codetr.benchmark")
