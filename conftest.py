"""BLAS has one thread in tests and in what they start: a second one spins, beside a worker for each core, for longer
than the small products take. It is read when numpy is loaded, which `tests/conftest.py` already does.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
