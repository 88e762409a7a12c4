"""Attention over segments: kernels agree with the formula in PyTorch, and that with autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith import ops
from tunesmith.errors import OpError
from tunesmith.ops import attention as op

# row, start, stop, first key, last key, causal
SEGMENTS = [
    [[0, 0, 7, 0, 6, 1], [0, 7, 20, 7, 19, 1], [1, 0, 17, 0, 16, 1], [1, 17, 20, 0, 16, 0]],
    [[0, 0, 20, 0, 19, 1], [1, 0, 20, 0, 19, 0]],
    [[1, 5, 9, 2, 8, 1]],
]
SHAPES = [(2, 20, 4, 2, 8), (2, 20, 3, 3, 5), (2, 20, 6, 1, 64)]
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    rows, tokens, heads, key_heads, size = shape
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, tokens, h, size, generator=generator).to(dtype)
        for h in (heads, key_heads, key_heads, heads)
    ]


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def under_a_mask(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> Tensor:
    """The same by torch's own attention, whose derivative autograd knows."""
    seen = torch.zeros(q.shape[0], 1, q.shape[1], q.shape[1], dtype=torch.bool)
    for row, start, stop, first, last, causal in segments.tolist():
        for at in range(start, stop):
            seen[row, 0, at, first : (at if causal else last) + 1] = True
    shared = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(shared, 2) for t in (k, v))
    out = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=seen, scale=scale
    )
    return out.transpose(1, 2).masked_fill(~seen.any(-1)[:, 0, :, None, None], 0.0)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("segments", SEGMENTS, ids=len)
@pytest.mark.parametrize("way", ["op", "reference"])
def test_output_and_gradients_are_those_under_a_mask(
    way: str, segments: list[list[int]], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v, grad = tensors(shape, dtype)
    given = torch.tensor(segments)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    out = under_a_mask(*exact, given, 0.3)
    expected = [out, *torch.autograd.grad(out, exact, grad.double())]
    if way == "op":
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        ours = op.attention(*inputs, given, 0.3)
        found = [ours, *torch.autograd.grad(ours, inputs, grad)]
    else:
        ours, lse = op.reference(q, k, v, given, 0.3)
        found = [ours, *op.reference_backward(grad, q, k, v, ours, lse, given, 0.3)]
    for got, right in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert error(got, right) <= LIMITS[dtype]


@pytest.mark.skipif(not ops.native_status().loaded, reason="the kernels are not built")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("size", [16, 64, 96])
def test_every_instruction_set_does_blocks_of_all_sizes(size: int, dtype: torch.dtype) -> None:
    from tunesmith import _native

    kept = _native.isa()
    segments = torch.tensor(
        [[0, 0, 129, 0, 128, 1], [0, 150, 500, 129, 499, 1], [0, 500, 530, 129, 499, 0]]
    )
    q, k, v, grad = tensors((1, 530, 2, 1, size), dtype)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    out = under_a_mask(*exact, segments, 0.25)
    expected = torch.autograd.grad(out, exact, grad.double())
    try:
        for isa in _native.isas():
            _native.set_isa(isa)
            inputs = [t.clone().requires_grad_() for t in (q, k, v)]
            found = torch.autograd.grad(op.attention(*inputs, segments, 0.25), inputs, grad)
            for got, right in zip(found, expected, strict=True):
                assert error(got, right) <= LIMITS[dtype], isa
    finally:
        _native.set_isa(kept)


@pytest.mark.parametrize(("size", "dtype"), [(8, torch.float32), (64, torch.bfloat16)], ids=str)
def test_a_nan_is_not_lost(size: int, dtype: torch.dtype) -> None:
    q, k, v, grad = (t.requires_grad_() for t in tensors((2, 20, 4, 2, size), dtype))
    with torch.no_grad():
        q[0, 3, 0, 0] = torch.nan
    out = op.attention(q, k, v, torch.tensor(SEGMENTS[0]), 0.3)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    assert out[0, 3, 0].isnan().all()
    assert grads[0][0, 3, 0].isnan().all()
    assert grads[1][0, :4, 0].isnan().all()
    assert not grads[1][0, 7:].isnan().any()


@pytest.mark.parametrize(
    ("segments", "says"),
    [
        ([[0, 0, 21, 0, 20, 1]], "lies within its row"),
        ([[2, 0, 20, 0, 19, 1]], "lies within its row"),
        ([[0, 0, 20, 0, 18, 1]], "ends with its last key"),
        ([[0, 0, 5, 0, 4, 1], [0, 4, 9, 5, 8, 0]], "twice"),
        ([[0, 0, 5, 0, 4, 1], [0, 5, 9, 4, 8, 1]], "two stretches"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments: list[list[int]], says: str) -> None:
    q, k, v, _ = tensors((2, 20, 4, 2, 8), torch.float32)
    with pytest.raises(OpError, match=says):
        op.attention(q, k, v, torch.tensor(segments), 0.3)


def test_tensors_that_do_not_fit_are_refused() -> None:
    q, k, v, _ = tensors((2, 20, 4, 2, 8), torch.float32)
    segments = torch.tensor(SEGMENTS[1])
    with pytest.raises(OpError, match="divides"):
        op.attention(q[:, :, :3], k, v, segments, 0.3)
    with pytest.raises(OpError, match="one dtype"):
        op.attention(q, k.bfloat16(), v, segments, 0.3)
    with pytest.raises(OpError, match=r"segments, 6"):
        op.attention(q, k, v, segments[:, :5], 0.3)


def test_it_can_be_traced() -> None:
    q, k, v, _ = tensors((2, 20, 4, 2, 8), torch.float32)
    args = (*(t.requires_grad_() for t in (q, k, v)), torch.tensor(SEGMENTS[1]), 0.3)
    torch.library.opcheck(torch.ops.tunesmith.attention.default, args)


def one_query(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, length: int) -> Tensor:
    """The same by torch's own attention under a mask."""
    shared = q.shape[1] // keys.shape[1]
    keys, values = (t[:, :, :length].repeat_interleave(shared, 1) for t in (keys, values))
    seen = torch.arange(length) >= first[:, None]
    mask = seen[:, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, mask, scale=0.3)[:, :, 0]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("way", ["op", "reference"])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "length"),
    [(4, 2, 8, 1), (3, 3, 5, 17), (9, 3, 64, 63), (6, 1, 33, 64), (4, 2, 16, 65), (2, 2, 512, 200)],
)
def test_one_query_a_row_is_attention_under_a_mask(
    way: str, heads: int, key_heads: int, size: int, length: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, heads, size, generator=generator).to(dtype) * 2
    keys, values = (
        torch.randn(3, key_heads, 210, size, generator=generator).to(dtype) for _ in range(2)
    )
    # what lies behind the length is not to be seen, nor what lies before the first
    keys[:, :, length:], values[:, :, length:] = 100.0, torch.nan
    first = torch.tensor([0, length // 2, length - 1])
    keys[2, :, : length - 1] = 100.0
    call = op.attention_decode if way == "op" else op.reference_decode
    got = call(q, keys, values, first, length, 0.3)
    assert got.dtype == dtype
    assert (
        error(got, one_query(*(t.double() for t in (q, keys, values)), first, length))
        <= (LIMITS[dtype])
    )


def test_a_row_that_sees_no_key_gets_zeros_and_nan_is_kept() -> None:
    q, keys, values = torch.ones(2, 2, 8), torch.ones(2, 1, 4, 8), torch.ones(2, 1, 4, 8)
    keys[1, 0, 1, 3] = torch.nan
    first = torch.tensor([3, 0])
    for call in (op.attention_decode, op.reference_decode):
        out = call(q, keys, values, first, 3, 1.0)
        assert not out[0].any()
        assert out[1].isnan().all()


@pytest.mark.parametrize("keys", [5, 0])
def test_before_the_first_key_there_are_zeros(keys: int) -> None:
    q, cache = torch.ones(2, 4, 8), torch.ones(2, 2, keys, 8)
    out = op.attention_decode(q, cache, cache, torch.zeros(2, dtype=torch.int64), 0, 1.0)
    assert torch.equal(out, torch.zeros(2, 4, 8))


def test_what_does_not_fit_one_query_is_refused() -> None:
    q, keys, first = torch.zeros(2, 4, 8), torch.zeros(2, 2, 5, 8), torch.tensor([0, 0])
    for arguments in [
        (q, keys, keys, first, 6),
        (q, keys, keys[..., :4], first, 5),
        (q[:, :3], keys, keys, first, 5),
        (q, keys, keys, first.int(), 5),
        (q, keys.half(), keys.half(), first, 5),
        (q, keys, keys, first[:1], 5),
    ]:
        with pytest.raises(OpError, match="attention_decode: got"):
            op.attention_decode(*arguments, 1.0)


def test_decoding_keeps_the_contract_of_torch_library() -> None:
    q, keys, values = torch.randn(2, 4, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    arguments = (q, keys, values, torch.tensor([0, 2]), 4, 0.5)
    torch.library.opcheck(torch.ops.tunesmith.attention_decode.default, arguments)
