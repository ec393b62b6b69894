"""What tests/test_fuzz.py draws: one table, one class that draws from it, the dense statements, derivatives."""

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ard_kernels.block_causal_attention.cuda import HEAD_DIMS

NAN, INF = float("nan"), float("inf")
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
MOST_TOKENS = 80  # about; twice that for ragged segments
DRAWS = {
    "dtype": [FP32, FP32, BF16, FP16, FP64],
    "autocast": [None, None, BF16, FP16],
    "batch": [0, 1, 1, 2, 3],
    "heads": [0, 1, 2, 2, 3],
    "head_dim": [8, 8, 8, 16, 16, 24, 64, 72, *range(8, 257, 8)],
    "channels": [0, 7, 8, 16, 24, 33, 72, 130],
    "segments": [1, 2, 3, 4, 5, 9, 17],
    "length": [1, 1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 32, 33, 40],
    "ragged": [False, True],
    "window": [None, 1, 1, 2, 3, 7, 2**31],
    "sink": [0, 0, 1, 2, 5],
    "scale": [None, None, 0.3, 0.0, -0.5, -1.0],  # times 1 / sqrt(D): large scores magnify the matmul's own error
    "layout": ["bhtd", "bthd"],
    "packed": [False, False, True],
    "memory": ["contiguous", "offset", "strided", "transposed", "expanded", "overlapping", "chunk"],
    "cotangent": ["contiguous", "offset", "transposed", "expanded"],
    "derivative": ["backward", "backward", "func.grad", "vmap", "vmap of grad", "batched cotangents"],
    "forward mode": [False, False, True],
    "forward derivative": ["func.jvp", "dual", "jvp of vmap", "vmap of jvp"],
    "poison": [None, None, None, NAN, INF, -INF],
    "adaln": ["adaln_modulate", "gate_residual", "gate_residual_adaln"],
    "rows": ["segment", "segment", "token"],
    "other dtype": [None, None, FP32, BF16, FP16],  # of the rows, of the branch; None: that of x
    "layers": [1, 2, 3],
    "tries": [0, 0, 1, 2],
    "spare": [0, 1, 5],
}
CUDA_CHANNELS = (8, 16, 24, 72)


class Case:
    """One seed: what it draws, and what that was."""

    def __init__(self, seed: int, backend: str, device: str = "cpu"):
        self.random, self.drawn = random.Random(seed), {"seed": seed}
        self.device = torch.device(device)
        self.backend = None if backend == "automatic" else backend
        # They promise nothing beside a NaN; automatic choice takes them on a GPU.
        self.tiles = backend in ("triton", "cuda") or (backend == "automatic" and device != "cpu")
        torch.manual_seed(seed)

    def __call__(self, kind: str, allowed=lambda value: True):
        self.drawn[kind] = self.random.choice([value for value in DRAWS[kind] if allowed(value)])
        return self.drawn[kind]

    def dtype(self, *refused):
        refused = refused if self.backend in (None, "torch") else (FP64, *refused)
        return self("dtype", lambda dtype: dtype not in refused)

    def autocast(self, *dtypes):
        """PyTorch's own ops refuse fp16 in a bf16 region of the CPU, and the reverse."""
        return self("autocast", lambda cast: cast is None or not ({BF16, FP16} - {cast}) & {*dtypes})

    def scale(self, D: int):
        factor = self("scale")
        return factor and factor * D**-0.5

    def head_dim(self):
        most = 72 if self.backend == "triton" else 256
        return self("head_dim", lambda d: d in HEAD_DIMS if self.backend == "cuda" else d <= most)

    def mask(self):
        """(segment of each token, what a public function takes, (T, T) bool written token by token)."""
        segments, length, ragged = self("segments"), self("length"), self("ragged")
        length = min(length, MOST_TOKENS // segments)
        lengths = [self.random.randint(1, 2 * length - 1) if ragged else length for _ in range(segments)]
        window, sink = self("window"), self("sink")
        segment_T = [s for s, tokens in enumerate(lengths) for _ in range(tokens)]
        sees = [
            [own >= other and (window is None or own - other < window or other < sink) for other in segment_T]
            for own in segment_T
        ]
        arguments = {"window": window, "sink": sink}
        segment_T, sees = (torch.tensor(table, device=self.device) for table in (segment_T, sees))
        return lengths, lengths if ragged else length, arguments, segment_T, sees

    def randn(self, *shape):
        return torch.randn(*shape, device=self.device)

    def tensor(self, shape, dtype, memory: str | None = None):
        """Random numbers of `shape`, held by memory in one of the ways a user may bring."""
        memory, (*lead, T, D) = memory or self("memory"), shape
        if memory == "offset":
            return self.randn(*lead, T + 1, D + 3).to(dtype)[..., 1:, 3:]
        if memory == "strided":
            return self.randn(*(2 * n for n in lead), 2 * T, D).to(dtype)[(slice(None, None, 2),) * len(shape[:-1])]
        if memory == "transposed":
            return self.randn(*lead, D, T).to(dtype).transpose(-1, -2)
        if memory == "expanded":
            dim = self.random.randrange(len(lead) + 1)  # not the last: a LayerNorm of equal numbers has no digits
            return self.randn([1 if i == dim else n for i, n in enumerate(shape)]).to(dtype).expand(shape)
        if memory == "overlapping" and D > 0 and T > 0:
            step = self.random.randint(1, D)
            return self.randn(*lead, D + step * (T - 1)).to(dtype).unfold(-1, D, step)
        if memory == "chunk":
            return self.randn(*lead, T, 6, D).to(dtype).select(-2, self.random.randrange(6))
        return self.randn(shape).to(dtype)


def attention_by_lse(q, k, v, sees, scale):
    """plain.attention as kernels do it: weights by log-sum-exp, dscores = weights * (dout v^T - sum(dout * out))."""
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~sees, -INF)
    lse = scores.logsumexp(-1).detach()
    weights = (scores - lse[..., None]).exp()
    out, total = weights @ v, weights.sum(-1, keepdim=True)
    return out - out.detach() * (total - total.detach()), lse.to(FP64 if q.dtype == FP64 else FP32)


def reversed_attention(q, k, v, sees, scale):
    """Another draw of its rounding errors: sums in reverse. One draw is too few for what has few scores."""
    return attention_by_lse(q.flip(-1), k.flip(-1, -2), v.flip(-2), sees.flip(-1), scale)


def layer_norm(x, eps: float):
    """(x - mean) / sqrt(variance + eps) over the last dim."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()


def plain_parts(eps: float, spread_TR):
    """PyTorch's LayerNorm and (B, R, C) rows for tokens; then both with their sums, also of gradients, in reverse."""

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=eps)

    return [
        (norm, lambda x: spread_TR.to(x.dtype) @ x),
        (lambda x: norm(x.flip(-1)).flip(-1), lambda x: (spread_TR.flip(0).to(x.dtype) @ x).flip(1)),
    ]


def derive(kind: str, function: Callable, inputs, tangents, cotangents) -> Sequence[torch.Tensor]:
    """One derivative of `function`, along the inputs whose tangent is not None."""
    along = [i for i, tangent in enumerate(tangents) if tangent is not None]
    chosen, changes = [inputs[i] for i in along], tuple(tangents[i] for i in along)

    def of_chosen(*values):
        return function(*[values[along.index(i)] if i in along else x for i, x in enumerate(inputs)])

    def loss(*values):
        return sum((y * g).sum() for y, g in zip(of_chosen(*values), cotangents, strict=True))

    def pair(tensors, dim=0):
        return tuple(torch.stack([x, x / 2], dim) for x in tensors)

    gradient, every = torch.func.grad(loss, tuple(range(len(along)))), tuple(chosen)
    contiguous = tuple(x.contiguous() for x in chosen)  # make_dual refuses what overlaps
    if kind in ("backward", "batched cotangents"):
        leaves = [x.detach().requires_grad_() for x in chosen]
        reached = [(y, g) for y, g in zip(of_chosen(*leaves), cotangents, strict=True) if y.requires_grad]
        outputs, grads = zip(*reached, strict=True)
        if kind == "backward":
            return torch.autograd.grad(outputs, leaves, grads)
        return torch.autograd.grad(outputs, leaves, pair(grads), is_grads_batched=True)
    if kind == "func.grad":
        return gradient(*every)
    if kind == "vmap":
        return torch.func.vmap(of_chosen, in_dims=-1)(*pair(every, -1))
    if kind == "vmap of grad":
        return torch.func.vmap(gradient, in_dims=1)(*pair(every, 1))
    if kind == "func.jvp":
        return torch.func.jvp(of_chosen, contiguous, changes)[1]
    if kind == "jvp of vmap":
        return torch.func.jvp(torch.func.vmap(of_chosen), pair(contiguous), pair(changes))[1]
    if kind == "vmap of jvp":
        return torch.func.vmap(lambda x, dx: torch.func.jvp(of_chosen, x, dx)[1])(pair(contiguous), pair(changes))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, dx) for x, dx in zip(contiguous, changes, strict=True)]
        outputs = [forward_ad.unpack_dual(y) for y in of_chosen(*duals)]
    return [torch.zeros_like(y) if dy is None else dy for y, dy in outputs]
