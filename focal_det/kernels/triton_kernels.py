"""The operations as one Triton kernel, for CUDA: each logit read once, its gradient written once.

No value comes back to the host, so nothing waits for the device. With ``TRITON_INTERPRET=1`` set
before the first use, the same kernels run in Triton's interpreter on a CPU, slowly.
"""

import math
from collections.abc import Hashable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .terms import Terms
from .translate import device_function

TILE_TERMS, WARPS = 512, 4
"""Terms that one program holds at a time, and the warps that share them: 4 terms a thread, so that
registers for 40 warps fit a multiprocessor, and one waits for memory while another computes."""

SCALE_TILES = 16
"""Tiles that one program scales: few programs, since a factor of 1 leaves them nothing to do."""

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
        sum_levels(terms, [one], [one[..., 0].long()], one[0, 0].float(), True)


def _is_interpreted() -> bool:
    return not isinstance(_sum_kernel, triton.runtime.JITFunction)


def sum_levels(
    terms: Terms,
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    weights: Tensor,
    with_grads: bool,
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`focal_det.kernels.blocks.sum_levels`: a launch for each level, one sum of all."""
    grads = [torch.empty_like(x) for x in logits] if with_grads else []
    return sum_into(terms, logits, labels, weights, grads), grads


def sum_into(
    terms: Terms,
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    weights: Tensor,
    grads: Sequence[Tensor],
) -> Tensor:
    """:func:`sum_levels` with gradients that are there already; none in an empty list."""
    levels = [_Level.of(*level) for level in zip_longest(logits, labels, grads)]
    # The programs' sums are added up in one order, so that equal inputs give equal sums.
    programs = sum(level.programs for level in levels)
    partial = logits[0].new_empty(2, len(weights), programs, dtype=torch.float32)
    start = 0
    for level in levels:
        level.launch(terms, weights, None, partial[..., start : start + level.programs])
        start += level.programs
    for level, grad in zip(levels, grads, strict=False):
        if level.grad is not None and level.grad is not grad:
            grad.copy_(level.grad)
    return (partial.sum(-1, dtype=torch.float64) * weights).float()


def sum_terms_per_anchor(terms: Terms, logits: Tensor, labels: Tensor) -> Tensor:
    """See :func:`focal_det.kernels.blocks.sum_terms_per_anchor`."""
    labels = labels.contiguous()
    sums = torch.zeros_like(labels, dtype=torch.float32)
    level = _Level.of(logits, labels, None)
    partial = torch.empty(2, len(logits), level.programs, device=logits.device)
    level.launch(terms, None, sums, partial)
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
    blocks = triton.cdiv(size, SCALE_TILES * TILE_TERMS)
    with torch.cuda.device_of(grad):
        _scale_kernel[(len(grad) * blocks,)](
            grad, factors.contiguous(), size, blocks, BLOCK=TILE_TERMS, TILES=SCALE_TILES
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


class _Level(NamedTuple):
    """Logits and labels of a level as a kernel reads them, and the gradient that it writes.

    Attributes:
        logits, labels, grad: (N, ..., K), (N, ...), (N, ..., K) or None; the caller's, or copies
            of another order in memory.
        anchors: their dimensions.
        block_anchors, block_classes: see :func:`_tile`.
        programs: of each image.
    """

    logits: Tensor
    labels: Tensor
    grad: Tensor | None
    anchors: _Anchors
    block_anchors: int
    block_classes: int
    programs: int

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, grad: Tensor | None) -> "_Level":
        """Copies what the kernel cannot read in place, or write at the side of the logits."""
        try:
            anchors = _Anchors.of(logits, labels)
        except ValueError:
            anchors = None
        if anchors is None or (grad is not None and grad.stride() != logits.stride()):
            logits, labels = logits.contiguous(), labels.contiguous()
            grad = None if grad is None else torch.empty_like(logits)
            anchors = _Anchors.of(logits, labels)
        tile = _tile(logits.shape[-1], logits.stride(-1), anchors.logit_strides[-1])
        blocks = triton.cdiv(anchors.sizes[2], tile[0])
        programs = anchors.sizes[0] * anchors.sizes[1] * blocks if logits.numel() else 0
        return cls(logits, labels, grad, anchors, *tile, programs)

    def launch(
        self, terms: Terms, weights: Tensor | None, per_anchor: Tensor | None, partial: Tensor
    ) -> None:
        """Run the kernel; the programs' sums go to `partial` (2, N, programs)."""
        if self.programs == 0:
            return
        logits, labels, grad, anchors = self[:4]
        with torch.cuda.device_of(logits):
            _sum_kernel[(len(logits) * self.programs,)](
                logits,
                labels,
                None if weights is None else weights.contiguous(),
                grad,
                per_anchor,
                partial,
                *partial.stride()[:2],
                logits.shape[-1],
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
                BLOCK_ANCHORS=self.block_anchors,
                BLOCK_CLASSES=self.block_classes,
                WHOLE_BLOCKS=logits.shape[-1] % self.block_classes == 0,
                CLASSES_LAST=logits.stride(-1) == 1,
                ALIGNED=_alignment(logits, grad, anchors),
                OFFSETS=tl.int32 if _span(logits) < 2**31 else tl.int64,
                num_warps=WARPS,
            )


def _span(logits: Tensor) -> int:
    """Elements from the first to the last term of an image in memory."""
    pairs = zip(logits.shape[1:], logits.stride()[1:], strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)


def _alignment(logits: Tensor, grad: Tensor | None, anchors: _Anchors) -> int:
    """8, 4 or 1: a number at whose multiples all runs of neighbours in memory begin and end.

    The neighbours are an anchor's classes where those are closest together, else anchors.
    """
    *outer, inner = [logits.stride(0), *anchors.logit_strides]
    run, stride = anchors.sizes[2], logits.stride(-1)
    if stride == 1:
        run, stride, inner = logits.shape[-1], inner, 1
    if inner != 1:
        return 1
    starts = [x.data_ptr() // x.element_size() for x in (logits, grad) if x is not None]
    common = math.gcd(8, run, stride, *outer, *starts)
    return common if common >= 4 else 1  # less would be one more kernel and little faster


def _tile(num_classes: int, class_stride: int, anchor_stride: int) -> tuple[int, int]:
    """Anchors and classes of a tile, both powers of 2: few lanes idle, neighbours in memory."""
    if class_stride > anchor_stride:  # a head's own (N, A K, H, W): anchors are neighbours
        classes = min(4, triton.next_power_of_2(num_classes))
    else:
        fitting = [b for b in (64, 32, 16) if triton.cdiv(num_classes, b) * b <= 1.1 * num_classes]
        classes = fitting[0] if fitting else min(16, triton.next_power_of_2(num_classes))
    return TILE_TERMS // classes, classes


# Triton compiles anew for each alignment of what it is told of, and images have many sizes.
@triton.jit(
    do_not_specialize=[
        *("partial_stride", "partial_stride_n", "num_classes", "background", "foreground"),
        *("size_0", "size_1", "size_2", "logit_stride_n", "logit_stride_0", "logit_stride_1"),
        *("label_stride_n", "label_stride_0", "label_stride_1", "label_stride_2"),
    ]
)
def _sum_kernel(
    logit_ptr,
    label_ptr,
    weight_ptr,
    grad_ptr,
    anchor_ptr,
    partial_ptr,
    partial_stride,
    partial_stride_n,
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
    WHOLE_BLOCKS: tl.constexpr,
    CLASSES_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """One program: BLOCK_ANCHORS neighbouring anchors of one image, all their classes.

    Anchors of an image have three dimensions; the program's own are a run of the last one.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(size_2, BLOCK_ANCHORS)
    run = program // blocks  # (image, first, second dimension)
    first = (run // size_1 % size_0).to(tl.int64)
    second = (run % size_1).to(tl.int64)
    image = (run // size_1 // size_0).to(tl.int64)
    third = program % blocks * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    logit_offset = image * logit_stride_n + first * logit_stride_0 + second * logit_stride_1
    if ALIGNED > 1:
        # The same numbers, but the compiler sees multiples: several neighbours move at once.
        logit_offset = logit_offset // ALIGNED * ALIGNED
        if CLASSES_LAST:
            num_classes = num_classes // ALIGNED * ALIGNED
            logit_stride_2 = logit_stride_2 // ALIGNED * ALIGNED
        else:
            size_2 = size_2 // ALIGNED * ALIGNED
            logit_stride_k = logit_stride_k // ALIGNED * ALIGNED
    inside = third < size_2

    label_offset = image * label_stride_n + first * label_stride_0 + second * label_stride_1
    label_offsets = label_offset + third.to(tl.int64) * label_stride_2
    label = tl.load(label_ptr + label_offsets, mask=inside, other=-1).to(tl.int32)
    counts = label >= 0  # so not outside
    is_foreground = counts & (label < num_classes)

    logit_ptr += logit_offset
    logit_offsets = third.to(OFFSETS) * logit_stride_2
    # The one term of each anchor with y = +1.
    own_offsets = logit_offsets + label.to(OFFSETS) * logit_stride_k
    own_logit = tl.load(logit_ptr + own_offsets, mask=is_foreground, other=0.0).to(tl.float32)
    own_value, own_slope = TERMS(-own_logit, True)
    own_value = tl.where(is_foreground, own_value * foreground, 0.0)
    if HAS_GRAD:
        grad_ptr += logit_offset
        weight = tl.load(weight_ptr + image)
        # 0 for ignored anchors: what is not background takes it.
        own_slope = tl.where(is_foreground, own_slope * (-foreground * weight), 0.0)
        background_weight = background * weight

    # All others. Summed over classes at the end, since threads share a sum.
    sums = tl.zeros((BLOCK_ANCHORS, BLOCK_CLASSES), dtype=tl.float32)
    for start in range(0, num_classes, BLOCK_CLASSES):
        k = start + tl.arange(0, BLOCK_CLASSES)
        mask = inside[:, None]
        is_background = counts[:, None] & (label[:, None] != k[None, :])
        if not WHOLE_BLOCKS:
            mask = mask & (k < num_classes)[None, :]
            is_background = is_background & (k < num_classes)[None, :]
        offsets = logit_offsets[:, None] + k[None, :].to(OFFSETS) * logit_stride_k
        logit = tl.load(logit_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        value, slope = TERMS(logit, False)
        sums += tl.where(is_background, value, 0.0)
        if HAS_GRAD:
            slope = tl.where(is_background, slope * background_weight, own_slope[:, None])
            tl.store(grad_ptr + offsets, slope.to(grad_ptr.dtype.element_ty), mask=mask)

    anchor_sums = tl.sum(sums, axis=1) * background + own_value
    if PER_ANCHOR:
        tl.store(anchor_ptr + label_offsets, anchor_sums, mask=inside)
    partial_ptr += image * partial_stride_n + program % (size_0 * size_1 * blocks)
    tl.store(partial_ptr, tl.sum(anchor_sums, axis=0))
    tl.store(partial_ptr + partial_stride, tl.sum(own_value, axis=0))


@triton.jit(do_not_specialize=["size", "blocks"])
def _scale_kernel(grad_ptr, factor_ptr, size, blocks, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Multiply each image's gradient by its factor; a factor of 1 costs nothing but the launch."""
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    factor = tl.load(factor_ptr + image)
    if factor != 1.0:
        begin = program % blocks * (BLOCK * TILES)
        for tile in range(TILES):
            offsets = begin + tile * BLOCK + tl.arange(0, BLOCK)
            mask = offsets < size
            pointers = grad_ptr + image * size + offsets
            grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * factor
            tl.store(pointers, grad.to(grad_ptr.dtype.element_ty), mask=mask)
