"""examples/drop_in against the same in plain PyTorch, or in diffusers, in float64."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ard_kernels import HistoryCache, SegmentMask

FOLDER = Path(__file__).parents[2] / "examples" / "drop_in"


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rotated(x_BTHD, cos, sin):
    a, b = x_BTHD[..., ::2], x_BTHD[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class PlainCausalAttention:
    """What a Self-Forcing style program writes: the past in lists, joined for every call, the oldest chunk dropped."""

    def __init__(self, module, window, sink):
        self.module, self.window, self.sink, self.past = module, window, sink, []

    def __call__(self, x, rope, commit):
        m = self.module
        q, k, v = m.norm_q(m.q(x)), m.norm_k(m.k(x)), m.v(x)
        q, k, v = (part.unflatten(-1, (m.heads, -1)) for part in (q, k, v))
        q, k = rotated(q, *rope), rotated(k, *rope)
        sunk, recent = self.past[: self.sink], self.past[self.sink :]
        held = [*sunk, *recent[max(0, len(recent) - (self.window - 1)) :], (k, v)]
        q, k_all, v_all = (y.transpose(1, 2) for y in (q, *(torch.cat(part, 1) for part in zip(*held, strict=True))))
        if commit:
            self.past.append((k, v))
        out = F.scaled_dot_product_attention(q, k_all, v_all)
        return m.o(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("window", "sink"), [(3, 1), (4, 0), (1, 2)])
def test_self_forcing_attention(window, sink):
    module = example("self_forcing_attention")
    heads, D, frames, height, width = 3, 24, 2, 2, 3
    length = frames * height * width
    attention = module.CausalAttention(heads * D, heads, layer=0).double()
    torch.nn.init.uniform_(attention.norm_q.weight, 0.5, 1.5)
    torch.nn.init.uniform_(attention.norm_k.weight, 0.5, 1.5)
    plain = PlainCausalAttention(attention, window, sink)
    cache = HistoryCache.rolling(1, 2, heads, D, segment_length=length, window=window, sink=sink, dtype=torch.float64)
    with torch.no_grad():
        for chunk in range(12):
            tables = module.rope_tables(chunk, frames, height, width, pairs=(4, 4, 4))
            rope = tuple(table.double() for table in tables)
            for call in range(3):
                x = torch.randn(2, length, heads * D, dtype=torch.float64)
                commit = call == 2
                torch.testing.assert_close(attention(x, rope, cache, commit), plain(x, rope, commit))


@pytest.fixture
def wan():
    pytest.importorskip("diffusers")
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    ).double()  # fmt: skip


def moved(module):
    """Weights away from where they begin: norms that do nothing would hide a norm that is left out."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def test_diffusers_processor(wan):
    """The whole model under a mask of ones, and one attention under a causal one, against diffusers' own processor."""
    module = example("diffusers_processor")
    frames, per_frame = 4, 6
    video, text = torch.randn(2, 4, frames, 4, 6).double(), torch.randn(2, 5, 16).double()
    call = {"hidden_states": video, "timestep": torch.tensor([700.0, 20.0]), "encoder_hidden_states": text}
    moved(wan)
    with torch.no_grad():
        expected = wan(**call).sample
        everything = SegmentMask([[True] * frames] * frames)
        module.use_segment_mask(wan, everything, per_frame)
        torch.testing.assert_close(wan(**call).sample, expected)

        module.use_segment_mask(wan, SegmentMask.block_causal(frames, window=2, sink=1), per_frame)
        causal = wan(**call).sample
        assert not torch.allclose(causal, expected, atol=1e-3)
        video[:, :, -1] += 1  # what comes later is not seen
        torch.testing.assert_close(wan(**call).sample[:, :, :-1], causal[:, :, :-1])


def test_diffusers_processor_under_a_mask(wan):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    module = example("diffusers_processor")
    frames, per_frame = 5, 6
    mask = SegmentMask.block_causal(frames, window=2, sink=1)
    attention = moved(wan.blocks[0].attn1)
    x = torch.randn(2, frames * per_frame, 48, dtype=torch.float64)
    rope = wan.rope(torch.empty(1, 4, frames, 4, 6))
    with torch.no_grad():
        expected = WanAttnProcessor()(attention, x, None, mask.dense(per_frame), rope)
        torch.testing.assert_close(module.SegmentProcessor(mask, per_frame)(attention, x, None, None, rope), expected)


def plain_dit_block(block, x, condition):
    L = block.segment_length
    per_token = block.rows(condition).repeat_interleave(L, 1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = per_token.chunk(6, -1)
    segments = x.shape[1] // L
    seen = SegmentMask.block_causal(segments, block.window, block.sink).dense(L)

    def norm(y):
        return F.layer_norm(y, y.shape[-1:], eps=1e-6)

    q, k, v = block.qkv(norm(x) * (1 + scale) + shift).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
    x = x + gate * block.proj(out)
    return x + mlp_gate * block.mlp(norm(x) * (1 + mlp_scale) + mlp_shift)


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (2, 1)])
def test_plain_dit(window, sink):
    """Values, and the gradients of everything."""
    block = moved(example("plain_dit").DiTBlock(48, 2, segment_length=6, window=window, sink=sink).double())
    x = torch.randn(2, 24, 48, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(2, 4, 48, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    inputs = [x, condition, *block.parameters()]
    results = []
    for forward in (block, lambda *call: plain_dit_block(block, *call)):
        out = forward(x, condition)
        results.append((out, torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(results[0], results[1])
