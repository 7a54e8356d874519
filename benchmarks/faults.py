"""What is slower because something of ours failed is no result: a fault is an error, from the import of this module on.

A module of its own, because the processes that run libraries of others need no PyTorch.
"""

import contextlib
import warnings

# Revisions to compare with may not know the warning yet.
with contextlib.suppress(ImportError):
    from fastebm.compiler.faults import FaultWarning

    warnings.filterwarnings("error", category=FaultWarning)
