"""`python -m codetr.train`, and nothing else: in Python `codetr.train` is a function of `codetr.training`."""

if __name__ == "codetr.train":  # imported, which would put this module in the function's place
    raise ImportError("codetr.train is a function: `import codetr` is enough; its module is codetr.training")

from codetr.training import main

if __name__ == "__main__":
    main()
