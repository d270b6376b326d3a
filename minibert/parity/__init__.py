"""The parity instrument: write what a model computes (trace), find the first tensor that differs (diff), and name the
fault (diagnose). `assert_parity` is for pytest."""

from minibert.parity.check import assert_parity
from minibert.parity.diagnose import Diagnosis, diagnose
from minibert.parity.diff import Report, diff
from minibert.parity.record import trace
from minibert.parity.trace import Trace, TraceFile

__all__ = ["Diagnosis", "Report", "Trace", "TraceFile", "assert_parity", "diagnose", "diff", "trace"]
