"""The papers' figures, a module for each: what `codetr analyse` computes of detectors and a fixed set of images.

A figure is a dataclass, whose fields are the choices that a paper leaves open, and which is called with runs.
"""
