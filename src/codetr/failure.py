"""What a command says about an exception that nobody foresaw: a few lines, and where the full trace lies."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

from codetr.errors import UserError

FULL = "HYDRA_FULL_ERROR"  # =1: the whole trace on the terminal, as of Hydra itself
_WORKER = "Original Traceback (most recent call last):\n"
_MEMORY = (
    "The device's memory is full. Smaller: data.batch_size (with trainer.accumulate_grad_batches), "
    "data.eval_batch_size, trainer.precision=bf16-mixed, smaller images (augment@data=...); or recompute activations: "
    "model.detector.encoder.checkpointed_layers=6 model.detector.decoder.checkpointed_layers=6"
)


def message(error: BaseException) -> str:
    """Of an exception, without the trace that a process of the data loader puts into it."""
    text = str(error)
    if _WORKER not in text:
        return text
    # Behind the frames, which are indented: "package.Kind: message", then notes.
    lines = text.partition(_WORKER)[2].splitlines()
    last = max((i for i, line in enumerate(lines) if line.startswith(" ")), default=-1)
    kind, colon, rest = "\n".join(lines[last + 1 :]).strip().partition(": ")
    return rest if colon and kind.rpartition(".")[2] == type(error).__name__ else f"{kind}{colon}{rest}"


def refusal(error: BaseException) -> UserError | None:
    """What the user can mend, in an exception of Hydra's: what a constructor said, or a key that it does not know."""
    cause = error.__cause__
    if isinstance(cause, UserError):
        return cause
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(cause))
    if isinstance(cause, TypeError) and unknown and _key(error):
        return UserError(
            f"{_key(error)}: {unknown[1]} knows no {unknown[2]}; the key is wrong, or left of another choice of this "
            f"part (take it away: ~{_key(error)}.{unknown[2]})"
        )
    return None


def _key(error: BaseException) -> str:
    return str(error).partition("full_key: ")[2].strip()


def tell(error: BaseException, command: str, directory: Path | None) -> None:
    """Print to stderr what happened in `command`, and write the trace into `directory`, or a temporary file without.

    Its notes (PEP 678) say what was being done: the step, its images, the file.
    """
    # Hydra wraps what a constructor raises, and names the key in its own message.
    cause = error.__cause__ if type(error).__name__ == "InstantiationException" and error.__cause__ else error
    lines = [f"error: {command} stopped at an unexpected {type(cause).__name__}: {message(cause).strip()}"]
    if cause is not error and _key(error):
        lines.append(f"  while building {_key(error)}")
    notes = [*getattr(cause, "__notes__", []), *([] if cause is error else getattr(error, "__notes__", []))]
    lines += [f"  {note}" for note in notes]
    if type(cause).__name__ == "OutOfMemoryError":
        lines.append(f"  {_MEMORY}")
    lines.append(f"  The whole trace: {_write(error, command, directory)} ({FULL}=1 shows it here)")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _write(error: BaseException, command: str, directory: Path | None) -> str:
    text = f"{command}\n\n{''.join(traceback.format_exception(error))}"
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))
    try:
        if directory is not None and directory.is_dir():
            path = directory / (f"error_{rank}.txt" if rank else "error.txt")
            path.write_text(text)
            return str(path)
        with tempfile.NamedTemporaryFile("w", prefix="codetr_", suffix=".txt", delete=False) as file:
            file.write(text)
            return file.name
    except OSError as problem:  # a full disk
        print(text, file=sys.stderr)
        return f"above, since it could not be written ({problem})"
