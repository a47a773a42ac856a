"""The command `codetr`: `codetr NAME ...` is `python -m codetr.NAME ...`, and nothing is imported but what runs."""

from __future__ import annotations

import difflib
import runpy
import sys

COMMANDS = {
    "train": "train a detector, or go on with a training",
    "eval": "COCO's and LVIS' numbers of a checkpoint",
    "predict": "objects in images: pictures and predictions.json",
    "serve": "a detector behind HTTP, with a page for browsers",
    "export": "one file for ONNX Runtime, OpenVINO, TensorRT, Triton or PyTorch without codetr",
    "analyse": "the papers' figures of your own runs: features, matching, heads, queries, groups",
    "report": "a page on what a run learned and where it fails, or on which of several runs is better",
    "data": "check, show and convert data sets",
    "convert": "official Co-DETR, transformers, timm and torchvision weights into ours, and back",
    "papers": "every row of the papers' tables, and the command that trains it",
    "benchmark": "what a training step costs, part by part, and beside other libraries",
    "estimate": "parameters, arithmetic, memory, and the batch that fits a card, before anything is built",
    "doctor": "versions, devices and what is missing, for a report of a fault",
}
_HELP = ("-h", "--help", "help")
_EXAMPLES = """\
  codetr train experiment=demo
  codetr eval checkpoint=best.ckpt
  codetr predict checkpoint=best.ckpt images=photos score_threshold=0.4
  codetr data check data=custom data.root=mine data.train_annotations=train.json data.val_annotations=val.json"""


def main() -> None:
    """Run the command that `sys.argv` names; its exit status is that of the module."""
    name, *rest = sys.argv[1:] or [""]
    if not name or name in _HELP:
        print(_overview())
        raise SystemExit(0 if name else 2)
    if name == "--version":
        from importlib.metadata import version

        print(version("codetr"))
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"give one of {', '.join(COMMANDS)}"
        print(f"error: codetr has no command {name!a}: {meant}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [sys.argv[0], *rest]
    # As `python -m` does: then processes that Lightning starts run the same module.
    runpy.run_module(f"codetr.{name}", run_name="__main__", alter_sys=True)


def _overview() -> str:
    lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "Co-DETR and Group DETR: detection transformers, trained, evaluated and used.",
            "",
            "  codetr COMMAND key=value ...",
            "",
            *lines,
            "",
            _EXAMPLES,
            "",
            "codetr COMMAND --help tells more, and codetr --version which this is. `codetr COMMAND` and",
            "`python -m codetr.COMMAND` are the same. In Python: codetr.load and codetr.train.",
        ]
    )


if __name__ == "__main__":
    main()
