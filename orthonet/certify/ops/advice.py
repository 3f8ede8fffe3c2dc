"""What to use instead of an operation that has no Lipschitz constant."""

from __future__ import annotations

__all__ = ["ADVICE", "IN_A_BALL"]

IN_A_BALL = "certify(model, x, radius=r) bounds it in balls around samples"

ADVICE = {
    "scaled_dot_product_attention": "Dot-product attention has no global Lipschitz constant: use "
    f"attention by distances; {IN_A_BALL}",
    "pow": f"Powers have no global Lipschitz constant; {IN_A_BALL}",
    "where": "A choice by value may jump: write it with relu, abs, maximum or minimum",
    "normalize": "Normalization jumps at zero: use LayerNorm with an eps, or a fixed scale",
    "einsum": "Use torch.nn.Linear or torch.matmul with a constant matrix",
    "bilinear": "Its product of two tensors that depend on the input has no global Lipschitz "
    f"constant: write it as ((x @ W) * y).sum(-1); {IN_A_BALL}",
    "cosine_similarity": "A cosine jumps at zero: write it as (x * y).sum(-1) / (x.norm(dim=-1) * "
    f"y.norm(dim=-1) + 1e-3); {IN_A_BALL}",
    "cdist": "Write it as torch.linalg.vector_norm(x[..., :, None, :] - y[..., None, :, :], "
    "dim=-1)",
    "var_mean": f"Write it as x.var(dim) and x.mean(dim); {IN_A_BALL}",
    "std_mean": "Write it as x.std(dim) and x.mean(dim)",
    "vmap": "Take torch.vmap out of forward: call the function on the whole batch, whose dim 0 "
    "layers and operations keep",
    "embedding": "A lookup by index has no constant: certify the model behind it",
    "lstm": "Its gates multiply, so it has no global constant: use a vanilla RNN, unrolled",
    "gru": "Its gates multiply: use a vanilla RNN, unrolled",
    "wrap_with_autocast": "Take torch.autocast out of forward and pass certify(..., "
    "autocast=torch.bfloat16): the weights are rounded where it is on",
    "bmm": "The product of two tensors that depend on the input, as in attention, has no "
    f"global Lipschitz constant; {IN_A_BALL}",
}
