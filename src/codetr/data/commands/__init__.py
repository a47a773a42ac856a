"""The commands of `python -m codetr.data`: one module each, with `main(overrides: list[str]) -> int`, the exit status.

A module's docstring is its help text; the first line of it says what the command does. Modules import what is heavy
inside their functions, so that help answers at once.
"""
