"""The parity instrument: write down what a model computes (trace), find the first tensor that differs (diff), and name
the fault (diagnose). `assert_parity` is for pytest.
"""

from minibert.parity.check import assert_parity
from minibert.parity.comparison import diff
from minibert.parity.diagnosis import Diagnosis, diagnose
from minibert.parity.report import Report
from minibert.trace import Trace, TraceFile, trace

__all__ = ["Diagnosis", "Report", "Trace", "TraceFile", "assert_parity", "diagnose", "diff", "trace"]
