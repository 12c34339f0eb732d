#!/usr/bin/env bash
# torch 2.13.0 (CPU): BatchNorm2d in eval mode gives a wrong gradient for one row of
# tokens that is viewed as an image.
#
# Behaviour: x (1, T, C) is permuted to (1, C, T), viewed as (1, C, h, w) and put
# through BatchNorm2d in eval mode, whose running statistics are those of a new
# module, so that y = x / sqrt(1 + eps). The outputs are right. The gradient of x is
# not: its numbers belong to other places, and it is as far from the true one as
# two random tensors are. With two or more rows, or contiguous memory, it is right.
#
# Why one would not guess it: in eval mode the layer is a product by a constant, and
# its output is right for the same memory; nothing warns. It is met where a vision
# transformer with convolutional projections (transformers' CvT) is fine-tuned with
# a batch of one, or row by row: the same row has another gradient than in a batch.
#
# Seen with Python 3.11, largest distance of the gradient from w / sqrt(1 + eps):
#   rows  as viewed  contiguous
#      1     3.1381      0.0000
#      2     0.0000      0.0000
#      3     0.0000      0.0000
set -euo pipefail
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import sys

import torch

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


C, side = 8, 4
norm = torch.nn.BatchNorm2d(C).eval()


def away(rows, contiguous):
    """Largest distance of the outputs, and of the gradient, from what a product by a constant has."""
    draw = torch.Generator().manual_seed(rows)
    tokens = torch.randn(rows, side * side, C, generator=draw).requires_grad_()
    weight = torch.randn(rows, C, side, side, generator=draw)
    image = tokens.permute(0, 2, 1).view(rows, C, side, side)
    out = norm(image.contiguous() if contiguous else image)
    (out * weight).sum().backward()
    factor = (1 + norm.eps) ** -0.5
    expected = (factor * weight).view(rows, C, side * side).permute(0, 2, 1)
    return (out - factor * image).abs().max().item(), (tokens.grad - expected).abs().max().item()


for rows in 1, 2, 3:
    (out, viewed), (out_contiguous, contiguous) = away(rows, False), away(rows, True)
    print(f"{rows} rows: gradient away by {viewed:.4f} as viewed, {contiguous:.4f} contiguous")
    check("the outputs are right", out < 1e-5 and out_contiguous < 1e-5)
    check("the gradient of contiguous memory is right", contiguous < 1e-5)
    check("that of the view is wrong for one row, and right for more", (viewed > 0.1) == (rows == 1))

sys.exit(0 if held and all(held) else 1)
EOF
