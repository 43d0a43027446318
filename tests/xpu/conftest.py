import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `from sample_checks import ...` in the tests of this folder
