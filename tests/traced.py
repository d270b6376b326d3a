"""A trace of each of the two models, and safetensors files written byte by byte."""

import json
import math
from copy import deepcopy
from functools import cache

from safetensors.torch import save_file
from twins import CONFIGS, SIZES, make_batch, twins

from minibert.parity import Trace, TraceFile, trace

NAME = "3 heads, gelu_new"


def traced(mask="right", grad=True):
    """(our trace, theirs, our model), the test's own to change."""
    a, b, ours = _traced(mask, grad)
    return *(Trace(dict(each.tensors), each.config, dict(each.metadata)) for each in (a, b)), deepcopy(ours)


@cache
def _traced(mask, grad):
    ours, theirs = twins(CONFIGS[NAME], "sdpa")
    batch = make_batch(CONFIGS[NAME], mask, SIZES[NAME], two_segments=True)
    return trace(ours, **batch, grad=grad), trace(theirs, **batch, grad=grad), ours


def stored(path, given, changes=None, without=(), **metadata):
    """The trace in a file, with some tensors and metadata changed, or taken out (metadata that are None)."""
    tensors = {name: x for name, x in {**given.tensors, **(changes or {})}.items() if name not in without}
    said = {key: value for key, value in {**given.metadata, **metadata}.items() if value is not None}
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata=said)
    return TraceFile(path)


def write_raw(path, header, size=0, metadata=None):
    """A safetensors file byte by byte, with `size` bytes of zeros behind the header that take no room on the disk."""
    text = header if isinstance(header, bytes) else json.dumps({"__metadata__": metadata, **header}).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def entry(shape, start=0, dtype="F32"):
    size = math.prod(shape) * {"F32": 4, "I64": 8}[dtype]
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
