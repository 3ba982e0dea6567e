"""The reference tests need the export extra: without transformers there is nothing to compare with."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("optimum") else ["test_reference_*.py"]
