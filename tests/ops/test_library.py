"""Importing `normpass.ops` registers every op that one of its files declares."""

import re
import subprocess
import sys
from pathlib import Path

import normpass.ops

DECLARED = re.compile(r'declare\(\s*"(\w+)\(')


def test_every_op_is_registered():
    sources = [path.read_text() for path in Path(normpass.ops.__file__).parent.glob("*.py")]
    names = {name for source in sources for name in DECLARED.findall(source)}
    assert len(names) > 10
    code = f"import torch, normpass.ops; print([n for n in {sorted(names)} if not hasattr(torch.ops.normpass, n)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
