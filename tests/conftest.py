"""Settings for the whole suite: torch threads that sleep while they wait, and no downloads.

They are set before torch is imported anywhere.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
