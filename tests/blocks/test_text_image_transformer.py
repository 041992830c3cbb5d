from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.blocks.positions import TokenShift, rotary_angles, rotation, turn
from vilmedic.blocks.text_image_transformer import TextImageTransformer, attend_once

TEXT, SIDE = 5, 3
SHAPE: dict[str, Any] = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dim_head": 8,
    "text_len": TEXT,
    "side": SIDE,
}


def shifted_one_by_one(x: Tensor) -> Tensor:
    result = x.clone()
    quarter = x.shape[-1] // 4
    for place in range(x.shape[1]):
        if place < TEXT:
            before = x[:, place - 1] if place else torch.zeros_like(x[:, 0])
            result[:, place, : 2 * quarter] = before[:, : 2 * quarter]
            continue
        row, column = divmod(place - TEXT, SIDE)
        above = x[:, place - SIDE] if row else torch.zeros_like(x[:, 0])
        left = x[:, place - 1] if column else torch.zeros_like(x[:, 0])
        result[:, place, :quarter] = above[:, :quarter]
        result[:, place, quarter : 2 * quarter] = left[:, quarter : 2 * quarter]
    return result


@pytest.mark.parametrize("length", [TEXT, TEXT + 1, TEXT + SIDE + 1, TEXT + SIDE**2])
def test_token_shift_takes_channels_from_earlier_positions(length: int) -> None:
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    shift = TokenShift(TEXT, SIDE)

    torch.testing.assert_close(shift(x), shifted_one_by_one(x))
    weights = torch.randn_like(x)
    [gradient] = torch.autograd.grad((shift(x) * weights).sum(), x)
    [expected] = torch.autograd.grad((shifted_one_by_one(x) * weights).sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dim_head", [8, 9, 64])
def test_rotary_embedding_rotates_channel_pairs(dim_head: int) -> None:
    angles = rotary_angles(TEXT, SIDE, dim_head)[0].double()
    heads = torch.randn(2, len(angles), 3, 2, dim_head, dtype=torch.float64, requires_grad=True)

    query, key, value = turn(heads, rotation(angles, dim_head))

    for which, turned in enumerate((query, key, value)):
        assert turned.shape == (2, 2, len(angles), dim_head)
        for pair in range(dim_head // 2):
            still = torch.zeros(len(angles), dtype=torch.float64)
            angle = angles[:, 2 * pair] if 2 * pair < angles.shape[1] else still
            numbers = torch.view_as_complex(
                heads[:, :, which, :, 2 * pair : 2 * pair + 2].detach().contiguous()
            )
            wanted = numbers * torch.polar(torch.ones_like(angle), angle)[:, None]
            found = torch.view_as_complex(turned[..., 2 * pair : 2 * pair + 2].contiguous())
            torch.testing.assert_close(found.transpose(1, 2), wanted)
    assert torch.autograd.gradcheck(
        lambda x: turn(x, rotation(angles[:2], dim_head)), heads.detach()[:1, :2].requires_grad_()
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_types": ("axial_row", "axial_col")},
        {"shift_tokens": False},
        {"rotary_emb": False},
        {"dim_head": 9},
    ],
)
def test_cached_steps_equal_the_whole_sequence(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = TextImageTransformer(**SHAPE | options).double().eval()
    for parameter in model.parameters():  # branches of the same scale as the residual stream
        parameter.data.mul_(3)
    x = torch.randn(2, model.length, 16, dtype=torch.float64)
    for start in (TEXT, TEXT + 2):
        cache = model.make_cache(2)
        with torch.inference_mode():
            expected = model(x)
            found = [model(x[:, :start], cache)]
            for place in range(start, model.length):
                found.append(model.step(x[:, place : place + 1], torch.tensor([place]), cache))
        torch.testing.assert_close(torch.cat(found, dim=1), expected)


def test_attention_is_causal() -> None:
    torch.manual_seed(0)
    for kinds in (("full",), ("axial_row", "axial_col")):
        model = TextImageTransformer(**SHAPE, attn_types=kinds).double()
        x = torch.randn(1, model.length, 16, dtype=torch.float64, requires_grad=True)
        for place in range(model.length):
            [gradient] = torch.autograd.grad(model(x)[0, place].sum(), x)
            assert not gradient[0, place + 1 :].any()
            assert gradient[0, place].any()


def test_axial_attention_covers_the_text_and_one_line() -> None:
    model = TextImageTransformer(**SHAPE, attn_types=("axial_row", "axial_col"))
    row, column = model.axial_row_mask, model.axial_col_mask
    middle = TEXT + 4  # row 1, column 1
    assert row[middle].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, TEXT + 3, TEXT + 4]
    assert column[middle].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, TEXT + 1, TEXT + 4]
    assert row[2].nonzero().flatten().tolist() == [0, 1, 2]


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = TextImageTransformer(
            **SHAPE, ff_dropout=0.2, activation_checkpointing=checkpointing
        ).double()
        x = torch.randn(2, model.length, 16, dtype=torch.float64)
        torch.manual_seed(1)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("masked", [False, True])
def test_single_query_attention_equals_full_attention(masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    mask = torch.zeros(1, 9).masked_fill(torch.arange(9) > 5, -torch.inf) if masked else None
    expected = functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(attend_once(query, key, value, mask), expected)
    half = [one.bfloat16() for one in (query, key, value)]
    found = attend_once(*half, None if mask is None else mask.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
