# Declared by the C++ half of torchvision, whose wheel on PyPI needs CUDA. Importing torchvision
# registers shapes for these two, and fails if they are unknown. Nothing here calls them.
import torch as _torch

_operators = _torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
