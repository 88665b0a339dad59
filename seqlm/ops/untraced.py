"""The ops as torch.compile sees them: calls that it leaves as they are.

Loaded only under torch.compile, because `torch.compiler.disable` loads all of its machinery.
"""

import torch

from seqlm.ops import dispatch

run = torch.compiler.disable(dispatch.Op.run)
fused = torch.compiler.disable(dispatch.fused)
