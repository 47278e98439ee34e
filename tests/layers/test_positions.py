"""Rotary positions against complex multiplication."""

import torch

from distllm.layers.positions import rotary_tables, rotate


def test_rotation_is_complex_multiplication():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 3, 3, 0, 100]])
    got = rotate(x, rotary_tables(positions, 8, 500.0, torch.float64))
    for b in range(2):
        for t in range(5):
            for j in range(4):
                angle = positions[b, t].double() / 500.0 ** (2 * j / 8)
                turned = torch.complex(x[b, t, :, j], x[b, t, :, j + 4]) * torch.exp(1j * angle)
                torch.testing.assert_close(got[b, t, :, j], turned.real, rtol=0, atol=1e-12)
                torch.testing.assert_close(got[b, t, :, j + 4], turned.imag, rtol=0, atol=1e-12)


def test_dot_products_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def dot(i, j):
        tables = [rotary_tables(torch.tensor([[p]]), 16, 1e4, torch.float64) for p in (i, j)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    torch.testing.assert_close(dot(3, 1), dot(503, 501), rtol=1e-10, atol=0)
    assert abs(dot(3, 1) - dot(3, 2)) > 1e-3


def test_tables_of_float64_are_float64_exact():
    cos, sin = rotary_tables(torch.tensor([[511]]), 64, 1e4, torch.float64)
    assert cos.dtype == torch.float64
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos), rtol=0, atol=1e-15)
    exact = torch.tensor(511 / 1e4 ** (2 / 64), dtype=torch.float64).cos()
    torch.testing.assert_close(cos[0, 0, 1], exact, rtol=0, atol=1e-13)
