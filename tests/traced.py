"""A trace of each of the two models, and safetensors files written byte by byte."""

import json
import math

from twins import CONFIGS, SIZES, make_batch, twins

from minibert.parity import trace

NAME = "3 heads, gelu_new"


def traced(mask="right", grad=True):
    ours, theirs = twins(CONFIGS[NAME], "sdpa")
    batch = make_batch(CONFIGS[NAME], mask, SIZES[NAME], two_segments=True)
    return trace(ours, **batch, grad=grad), trace(theirs, **batch, grad=grad), ours


def write_raw(path, header, size=0, metadata=None):
    """A safetensors file byte by byte, with `size` bytes of zeros behind the header that take no room on the disk."""
    text = header if isinstance(header, bytes) else json.dumps({"__metadata__": metadata, **header}).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def entry(shape, start=0, dtype="F32"):
    size = math.prod(shape) * {"F32": 4, "I64": 8}[dtype]
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
