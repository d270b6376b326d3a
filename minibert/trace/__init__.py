"""Traces: every named tensor of one pass through BERT. table.py says what a trace holds, recorder.py makes one from a
model, tracefile.py writes and reads it (stores.py). Comparing two is parity's business.
"""

from minibert.trace.recorder import trace
from minibert.trace.table import standard_inputs
from minibert.trace.tracefile import Trace, TraceFile

__all__ = ["Trace", "TraceFile", "standard_inputs", "trace"]
