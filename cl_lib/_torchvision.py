"""torchvision, importable beside a torch of another build.

Its CUDA wheel refuses to import beside a CPU-only torch, because its compiled operators are missing
("operator torchvision::nms does not exist"). Only its Python half is needed here, so the two operators are
declared, when and only when that import fails.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    _library = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision import datasets, models, transforms

__all__ = ["datasets", "models", "transforms"]
