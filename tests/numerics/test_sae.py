"""Autoencoders of all activations against the definitions, token by token."""

import numpy as np
import pytest
import torch

from assay.architecture import Architecture
from assay.numerics.codes import densify
from assay.numerics.sae import SparseAutoencoder

D, N = 6, 20


def test_the_error_is_that_of_the_codes_that_are_kept():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(D, N, generator=generator),
        "W_dec": torch.randn(N, D, generator=generator),
    }
    sae = SparseAutoencoder(tensors, Architecture("topk", 18, signed=True))
    x = torch.randn(9, D, generator=generator)
    batch = sae.encode(x)
    back = densify(batch, "sparse", N).double() @ tensors["W_dec"].double()
    np.testing.assert_allclose(batch["error"], (x.double() - back).square().sum(1), rtol=1e-6)
    assert (batch["values"] < 0).any()
    assert batch["error"].sum() == pytest.approx(float(sae.residual(x).square().sum()))
