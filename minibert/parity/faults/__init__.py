"""The faults that ports of BERT really have.

Each is a class that replaces one of the methods of `Steps`. Two faults together are a class that inherits from both.
title, remedy and source are what `diagnose` prints. owner/name#number is an issue or pull request on GitHub in which
the fault happened; modeling.py and run_pretraining.py are google-research/bert's.
"""

from minibert.parity.faults import attention, embeddings, head, norms
from minibert.parity.steps import Steps

CATALOGUE: tuple[type[Steps], ...] = (*embeddings.FAULTS, *norms.FAULTS, *attention.FAULTS, *head.FAULTS)
