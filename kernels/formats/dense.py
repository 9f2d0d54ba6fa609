"""Names of the dense formats: one number an element, as it is."""

from __future__ import annotations

import torch

# As safetensors and GGUF name them.
DENSE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DENSE_FORMATS = {dtype: name for name, dtype in DENSE_DTYPES.items()}
