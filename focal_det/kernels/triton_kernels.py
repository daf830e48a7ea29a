"""The operations as one Triton kernel, for CUDA: each logit read once, its gradient written once.

No value comes back to the host, so nothing waits for the device. With ``TRITON_INTERPRET=1`` set
before the first use, the same kernels run in Triton's interpreter on a CPU, slowly.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .terms import Terms
from .translate import device_function

TILE_TERMS = 2048
"""Terms that one program holds at a time: 16 a thread, as 4 warps share them."""

MOST_FUNCTIONS = 256
"""Losses that are compiled in a process, each setting of a loss being one."""

_functions: dict[Hashable, Any] = {}


def prepare(terms: Terms, logits: Tensor) -> None:
    """Make the device function of a loss, once; raise where these logits or this loss have none.

    Raises:
        RuntimeError: it says why.
    """
    if not (logits.is_cuda or _is_interpreted()):
        raise RuntimeError(f"Triton needs a CUDA device, the logits are on {logits.device}")
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"the Triton kernels have no {logits.dtype}")
    if terms.key is None:
        raise RuntimeError(
            "the loss cannot be compiled for Triton: it holds tensors, or attributes that are not "
            "plain numbers or strings"
        )
    if terms.key not in _functions:
        if int(triton.__version__.split(".")[0]) < 3:  # it lacks what formulas are translated to
            raise RuntimeError(f"Triton 3.0 or newer is needed, this is {triton.__version__}")
        if len(_functions) >= MOST_FUNCTIONS:
            raise RuntimeError(
                f"{MOST_FUNCTIONS} settings of losses were compiled already: does a loss change "
                "its own all the time?"
            )
        try:
            _functions[terms.key] = device_function(terms)
            _try(terms, logits)
        except Exception as error:  # whatever a formula, or a compiler, may raise
            # Kept, so that it is not tried again at every step.
            _functions[terms.key] = RuntimeError(f"Triton cannot compute the loss: {error}")
    if isinstance(_functions[terms.key], RuntimeError):
        raise _functions[terms.key]


def _try(terms: Terms, logits: Tensor) -> None:
    """Compute one term, to see whether there is a compiler that can build the kernel."""
    if logits.is_cuda and not torch.cuda.is_current_stream_capturing():
        one = logits.new_zeros(1, 1, 1)
        sum_terms(terms, one, one[..., 0].long(), one[0, 0].float(), torch.empty_like(one))


def _is_interpreted() -> bool:
    return not isinstance(_sum_kernel, triton.runtime.JITFunction)


def sum_terms(
    terms: Terms, logits: Tensor, labels: Tensor, weights: Tensor, grad: Tensor | None
) -> Tensor:
    """See :func:`focal_det.kernels.blocks.sum_terms`."""
    if grad is not None and not _Anchors.can_read(logits, labels, grad):
        logits, labels, target = logits.contiguous(), labels.contiguous(), grad
        grad = torch.empty_like(logits)
        sums = sum_terms(terms, logits, labels, weights, grad)
        target.copy_(grad)
        return sums
    partial = _launch(terms, logits, labels, weights, grad, None)
    # The programs' sums are added up in one order, so that equal inputs give equal sums.
    return (partial.sum(-1, dtype=torch.float64) * weights).float()


def sum_terms_per_anchor(terms: Terms, logits: Tensor, labels: Tensor) -> Tensor:
    """See :func:`focal_det.kernels.blocks.sum_terms_per_anchor`."""
    labels = labels.contiguous()
    sums = torch.zeros_like(labels, dtype=torch.float32)
    _launch(terms, logits, labels, None, None, sums)
    return sums


def scale(grad: Tensor, factors: Tensor, in_place: bool) -> Tensor:
    """See :func:`focal_det.kernels.blocks.scale`; factors of 1 are found out on the device."""
    if not in_place:
        grad = grad.clone()
    size = grad[0].numel() if len(grad) > 0 else 0
    span = 1 + sum(
        (n - 1) * stride for n, stride in zip(grad.shape[1:], grad.stride()[1:], strict=True)
    )
    if size == 0:
        return grad
    if span != size or (len(grad) > 1 and grad.stride(0) != size):  # images that interleave
        return grad.mul_(factors.view(-1, *[1] * (grad.dim() - 1)))
    blocks = triton.cdiv(size, TILE_TERMS)
    with torch.cuda.device_of(grad):
        _scale_kernel[(len(grad) * blocks,)](
            grad, factors.contiguous(), size, blocks, BLOCK=TILE_TERMS
        )
    return grad


class _Anchors(NamedTuple):
    """The anchor dimensions of logits and labels, merged into at most three.

    Attributes:
        sizes: three, the last one being the closest together in memory.
        logit_strides, label_strides: of those dimensions.
    """

    sizes: list[int]
    logit_strides: list[int]
    label_strides: list[int]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "_Anchors":
        """Dimensions that both tensors step through evenly become one.

        Raises:
            ValueError: more than three are left.
        """
        dims = [
            (labels.shape[d], logits.stride(d), labels.stride(d))
            for d in range(1, labels.dim())
            if labels.shape[d] != 1
        ]
        dims.sort(key=lambda dim: -dim[1])
        merged: list[tuple[int, int, int]] = []
        for size, x, y in dims:
            if merged and merged[-1][1:] == (x * size, y * size):
                merged[-1] = (merged[-1][0] * size, x, y)
            else:
                merged.append((size, x, y))
        if len(merged) > 3:
            raise ValueError(f"anchors in {len(merged)} dimensions that do not merge")
        merged = [(1, 0, 0)] * (3 - len(merged)) + merged
        return cls(*(list(column) for column in zip(*merged, strict=True)))

    @classmethod
    def can_read(cls, logits: Tensor, labels: Tensor, grad: Tensor) -> bool:
        """Whether the kernel can read the logits in place and write the gradient at their side."""
        try:
            cls.of(logits, labels)
        except ValueError:
            return False
        return grad.stride() == logits.stride()


def _launch(
    terms: Terms,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    grad: Tensor | None,
    per_anchor: Tensor | None,
) -> Tensor:
    """Run the kernel; returns the programs' sums, (2, N, programs an image)."""
    images, num_classes = len(logits), logits.shape[-1]
    if logits.numel() == 0:
        return torch.zeros(2, images, 1, device=logits.device)
    try:
        anchors = _Anchors.of(logits, labels)
    except ValueError:
        logits, labels = logits.contiguous(), labels.contiguous()
        anchors = _Anchors.of(logits, labels)
    block_anchors, block_classes = _tile(num_classes, logits.stride(-1), anchors.logit_strides[-1])
    outer = anchors.sizes[0] * anchors.sizes[1]
    blocks = triton.cdiv(anchors.sizes[2], block_anchors)
    partial = torch.empty(2, images, outer * blocks, device=logits.device)
    with torch.cuda.device_of(logits):
        _sum_kernel[(images * outer * blocks,)](
            logits,
            labels,
            None if weights is None else weights.contiguous(),
            grad,
            per_anchor,
            partial,
            images * outer * blocks,
            num_classes,
            terms.background,
            terms.foreground,
            *anchors.sizes,
            logits.stride(0),
            *anchors.logit_strides,
            logits.stride(-1),
            labels.stride(0),
            *anchors.label_strides,
            TERMS=_functions[terms.key],
            HAS_GRAD=grad is not None,
            PER_ANCHOR=per_anchor is not None,
            BLOCK_ANCHORS=block_anchors,
            BLOCK_CLASSES=block_classes,
        )
    return partial


def _tile(num_classes: int, class_stride: int, anchor_stride: int) -> tuple[int, int]:
    """Anchors and classes of a tile, both powers of 2: few lanes idle, neighbours in memory."""
    if class_stride > anchor_stride:  # a head's own (N, A K, H, W): anchors are neighbours
        classes = min(8, triton.next_power_of_2(num_classes))
    else:
        fitting = [b for b in (64, 32, 16) if triton.cdiv(num_classes, b) * b <= 1.1 * num_classes]
        classes = fitting[0] if fitting else min(16, triton.next_power_of_2(num_classes))
    return TILE_TERMS // classes, classes


@triton.jit
def _sum_kernel(
    logit_ptr,
    label_ptr,
    weight_ptr,
    grad_ptr,
    anchor_ptr,
    partial_ptr,
    num_programs,
    num_classes,
    background,
    foreground,
    size_0,
    size_1,
    size_2,
    logit_stride_n,
    logit_stride_0,
    logit_stride_1,
    logit_stride_2,
    logit_stride_k,
    label_stride_n,
    label_stride_0,
    label_stride_1,
    label_stride_2,
    TERMS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    PER_ANCHOR: tl.constexpr,
    BLOCK_ANCHORS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """One program: BLOCK_ANCHORS neighbouring anchors of one image, all their classes.

    Anchors of an image have three dimensions; the program's own are a run of the last one.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(size_2, BLOCK_ANCHORS)
    run = program // blocks  # (image, first, second dimension)
    first = run // size_1 % size_0
    second = run % size_1
    image = run // size_1 // size_0
    third = program % blocks * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    inside = third < size_2

    label_offset = image * label_stride_n + first * label_stride_0 + second * label_stride_1
    label_offsets = label_offset + third * label_stride_2
    label = tl.load(label_ptr + label_offsets, mask=inside, other=-1).to(tl.int64)
    counts = label >= 0
    is_foreground = counts & (label < num_classes)

    logit_offset = image * logit_stride_n + first * logit_stride_0 + second * logit_stride_1
    logit_offsets = logit_offset + third * logit_stride_2
    # The one term of each anchor with y = +1.
    own_offsets = logit_offsets + label * logit_stride_k
    own_logit = tl.load(logit_ptr + own_offsets, mask=is_foreground, other=0.0).to(tl.float32)
    own_value, own_slope = TERMS(-own_logit, True)
    own_value = tl.where(is_foreground, own_value * foreground, 0.0)
    if HAS_GRAD:
        weight = tl.load(weight_ptr + image)
        own_slope = own_slope * (-foreground * weight)

    # All others. Summed over classes at the end, since threads share a sum.
    sums = tl.zeros((BLOCK_ANCHORS, BLOCK_CLASSES), dtype=tl.float32)
    for start in range(0, num_classes, BLOCK_CLASSES):
        k = start + tl.arange(0, BLOCK_CLASSES)
        mask = inside[:, None] & (k < num_classes)[None, :]
        offsets = logit_offsets[:, None] + k[None, :].to(tl.int64) * logit_stride_k
        logit = tl.load(logit_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        value, slope = TERMS(logit, False)
        is_own = label[:, None] == k[None, :]
        taken = mask & counts[:, None]
        sums += tl.where(taken & (is_own == 0), value * background, 0.0)
        if HAS_GRAD:
            slope = tl.where(is_own, own_slope[:, None], slope * (background * weight))
            slope = tl.where(taken, slope, 0.0)
            tl.store(grad_ptr + offsets, slope.to(grad_ptr.dtype.element_ty), mask=mask)

    anchor_sums = tl.sum(sums, axis=1) + own_value
    if PER_ANCHOR:
        tl.store(anchor_ptr + label_offsets, anchor_sums, mask=inside)
    tl.store(partial_ptr + program, tl.sum(anchor_sums, axis=0))
    tl.store(partial_ptr + num_programs + program, tl.sum(own_value, axis=0))


@triton.jit
def _scale_kernel(grad_ptr, factor_ptr, size, blocks, BLOCK: tl.constexpr):
    """Multiply each image's gradient by its factor; a factor of 1 costs nothing but the launch."""
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    factor = tl.load(factor_ptr + image)
    if factor != 1.0:
        offsets = program % blocks * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        pointers = grad_ptr + image * size + offsets
        grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * factor
        tl.store(pointers, grad.to(grad_ptr.dtype.element_ty), mask=mask)
