import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # the presets name folders relative to the repository
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each of the two workers
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for the hub fails at once


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem != "test_learning")  # the longest first: two workers end together
