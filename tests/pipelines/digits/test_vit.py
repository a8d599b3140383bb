import math

import pytest
import torch

from assay.pipelines.digits.vit import INK_STD, VisionTransformer, record, schedule, train

N_PATCHES = 16


def make_model(seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(
        image_size=16, patch_size=4, d_model=12, n_blocks=3, n_heads=3, n_classes=11
    )


@pytest.fixture
def images():
    return torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(0))


def run_block_slowly(block, x):
    """One pre-norm block for one image, float64 (tokens, d_model), head by head."""
    normed = block.norm1(x)
    query, key, value = block.qkv(normed).chunk(3, dim=-1)
    width = x.shape[1] // block.n_heads
    heads = []
    for head in range(block.n_heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / math.sqrt(width)
        heads.append(scores.softmax(dim=-1) @ value[:, part])
    x = x + block.out(torch.cat(heads, dim=-1))
    return x + block.mlp(block.norm2(x))


def test_recorded_residual_equals_a_run_by_hand(images):
    model = make_model()
    recorded = torch.cat(list(record(model, images, [2, 0], batch_size=2)))
    assert recorded.shape == (5, 2, 1 + N_PATCHES, 12)
    assert recorded.dtype == torch.float32 and not recorded.requires_grad
    model, images = model.double(), images.double()
    for image, example in zip(images, recorded, strict=True):
        patches = image.reshape(4, 4, 4, 4).transpose(1, 2).reshape(N_PATCHES, 16)
        tokens = patches / INK_STD @ model.embed.weight.flatten(1).T + model.embed.bias
        x = torch.cat([model.cls[0], tokens]) + model.positions[0]
        after = []
        for block in model.blocks:
            x = run_block_slowly(block, x)
            after.append(x)
        torch.testing.assert_close(
            example.double(), torch.stack([after[2], after[0]]), atol=1e-5, rtol=1e-5
        )


def test_forward_reads_the_last_residual_of_the_patches(images):
    model = make_model().eval()
    recorded = torch.cat(list(record(model, images, [2], batch_size=5)))
    torch.testing.assert_close(model(images), model.head(model.norm(recorded[:, 0, 1:])))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_batches_only_cut_the_stream(images, batch_size):
    model = make_model()
    batches = list(record(model, images, [0, 1], batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    whole = next(record(model, images, [0, 1], 5))
    torch.testing.assert_close(torch.cat(batches), whole)


def test_record_leaves_gradients_on_outside(images):
    stream = record(make_model().train(), images, [0], 2)
    next(stream)
    assert torch.is_grad_enabled()


def test_training_lowers_the_loss_and_leaves_random_state_alone():
    # A patch's class can be read off its brightness.
    labels = torch.randint(11, (64, N_PATCHES), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    images = (labels / 10).reshape(64, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    model = make_model()
    state = torch.get_rng_state()
    losses = train(model, images, labels, n_steps=60, batch_size=16, learning_rate=1e-2, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(losses) == 60 and sum(losses[-5:]) / 5 < losses[0] / 2
    assert not model.training


def test_void_patches_teach_nothing():
    # All images alike, so that it is no matter which are drawn.
    images = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1)
    labels = torch.zeros(4, N_PATCHES, dtype=torch.uint8)
    labels[:, 3] = 5
    model = make_model()
    expected = -model(images).log_softmax(-1)[0, 3, 5].item()
    (loss,) = train(model, images, labels, n_steps=1, batch_size=4, learning_rate=1e-3, seed=0)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_schedule_warms_up_then_decays_to_nothing():
    shares = [schedule(step, 50) for step in range(50)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[5] == 1.0 and shares[5:] == sorted(set(shares[5:]), reverse=True)
    assert 0 < shares[-1] < 0.01
    assert schedule(0, 1) == 1.0
