"""Traces: every named tensor of one pass through BERT. table.py says what a trace holds, recorder.py makes one from a
model, files.py writes and reads it. Comparing two is parity's business.
"""

from minibert.trace.files import Trace, TraceFile
from minibert.trace.inputs import standard_inputs
from minibert.trace.recorder import trace

__all__ = ["Trace", "TraceFile", "standard_inputs", "trace"]
