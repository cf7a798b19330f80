"""What autocast does where code settles the precision by itself."""

from __future__ import annotations

import torch


def product_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """The type that products are computed in here: autocast's, or `otherwise` where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise
