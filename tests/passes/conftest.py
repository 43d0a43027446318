import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `from quantized import ...` in the tests of this folder
