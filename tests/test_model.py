"""The networks, against formulas and independent re-implementations."""

import argparse
import math
import pickle
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from model import (
    NORMALISATION,
    SIZES,
    build_dmae,
    build_vit,
    decays,
    interpolate_positions,
    load_encoder,
    patchify,
    random_masking,
    read_checkpoint,
    sincos_positions,
    standardise_patches,
    unpatchify,
)

BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
DMAE_SIZE = dict(dim=16, heads=2, depth=2, patch=2, side=8, channels=1)     # of tiny_dmae


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------
# An independent ViT: plain loops and matrix products over a state dict
# --------------------------------------------------------------------------------------------------


def plain_norm(x, state, name, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def plain_attention(x, state, name, heads):
    width = x.shape[-1]
    qkv, size, outputs = plain_linear(x, state, f"{name}.qkv"), width // heads, []
    for head in range(heads):
        starts = [part * width + head * size for part in range(3)]
        q, k, v = (qkv[..., start:start + size] for start in starts)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(size)).exp()
        outputs.append(scores / scores.sum(-1, keepdim=True) @ v)
    return plain_linear(torch.cat(outputs, -1), state, f"{name}.proj")


def plain_block(x, state, name, heads):
    x = x + plain_attention(plain_norm(x, state, f"{name}.norm1"), state, f"{name}.attn", heads)
    hidden = plain_linear(plain_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + plain_linear(hidden, state, f"{name}.mlp.fc2")


def plain_embed(image, state, patch):
    """One normalised image (C, H, W) -> patch tokens with positions (N, D)."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    tokens = []
    for y in range(0, image.shape[1], patch):
        for x in range(0, image.shape[2], patch):
            tokens.append((image[:, y:y + patch, x:x + patch] * weight).sum((1, 2, 3)) + bias)
    return torch.stack(tokens) + state["pos_embed"][0, 1:]


def plain_encoder(tokens, state, depth, heads):
    x = torch.cat([state["cls_token"][0] + state["pos_embed"][0, :1], tokens])
    for layer in range(depth):
        x = plain_block(x, state, f"blocks.{layer}", heads)
    return x


# --------------------------------------------------------------------------------------------------
# Patches, positions, masks
# --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(*(st.integers(1, most) for most in (3, 4, 4, 4, 3)))
def test_unpatchify_inverts_patchify(b, h, w, p, c):
    images = torch.randn(b, c, h * p, w * p)
    patches = patchify(images, p)
    assert patches.shape == (b, h * w, p * p * c)
    assert torch.equal(unpatchify(patches, p, (h, w)), images)


def test_pixels_of_a_patch_run_row_column_channel():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    for b in range(2):
        for n in range(6):
            row, column = n // 3 * 2, n % 3 * 2
            by_hand = [images[b, c, row + y, column + x]
                       for y in range(2) for x in range(2) for c in range(3)]
            assert patches[b, n].tolist() == by_hand


@pytest.mark.parametrize("dim, grid", [(8, (2, 3)), (16, (4, 4)), (512, (14, 14))])
def test_positions_are_the_sincos_formula_column_first(dim, grid):
    quarter = dim // 4
    rows = [[0.0] * dim]
    for y in range(grid[0]):
        for x in range(grid[1]):
            row = []
            for place in (x, y):
                angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
                row += [*map(math.sin, angles), *map(math.cos, angles)]
            rows.append(row)
    table = sincos_positions(dim, grid)
    assert table.shape == (1, 1 + grid[0] * grid[1], dim)
    assert table.dtype == torch.float32
    close(table[0], torch.tensor(rows), 1e-6)


@pytest.mark.parametrize("patches, ratio, kept", [
    (196, 0.75, 49), (16, 0.5, 8), (64, 0.75, 16), (9, 0, 9), (7, 0.5, 3)])
def test_masking_keeps_the_patches_of_least_noise_and_each_exactly_once(patches, ratio, kept):
    noise = torch.rand(5, patches)
    keep, restore, mask = random_masking(noise, ratio)
    assert keep.shape == (5, kept) and restore.shape == mask.shape == (5, patches)
    for b in range(5):
        order = sorted(range(patches), key=lambda i, b=b: noise[b, i])
        assert keep[b].tolist() == order[:kept]
        assert mask[b].tolist() == [float(i not in order[:kept]) for i in range(patches)]
        assert [order[place] for place in restore[b]] == list(range(patches))


def test_norm_pix_uses_mean_and_unbiased_variance_of_each_patch():
    patches = torch.rand(3, 5, 12, dtype=torch.float64)
    patches[0, 0] = 0.3
    array = patches.numpy()
    variance = array.var(-1, ddof=1, keepdims=True)
    by_numpy = (array - array.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    close(standardise_patches(patches), torch.from_numpy(by_numpy))


def test_interpolated_positions_keep_class_row_constants_and_orientation():
    table = torch.randn(1, 17, 8)
    close(interpolate_positions(table, (4, 4)), table, 1e-5)
    table[0, 1:, 0] = 0.7
    table[0, 1:, 1] = torch.arange(16) % 4           # the column
    table[0, 1:, 2] = torch.arange(16) // 4          # the row
    new = interpolate_positions(table, (6, 8))
    assert new.shape == (1, 49, 8)
    assert torch.equal(new[:, 0], table[:, 0])
    new = new[0, 1:].view(6, 8, 8)
    close(new[..., 0], torch.full((6, 8), 0.7), 1e-5)
    close(new[..., 1], new[:1, :, 1].expand(6, 8), 1e-5)
    close(new[..., 2], new[:, :1, 2].expand(6, 8), 1e-5)
    assert (new[0, 1:, 1] > new[0, :-1, 1]).all() and (new[1:, 0, 2] > new[:-1, 0, 2]).all()


def test_positions_of_no_square_grid_are_refused():
    with pytest.raises(ValueError, match="15"):
        interpolate_positions(torch.zeros(1, 16, 8), (4, 4))


# --------------------------------------------------------------------------------------------------
# The classifier
# --------------------------------------------------------------------------------------------------


def test_attention_is_softmax_of_scaled_products(tiny_vit):
    attention = tiny_vit(dim=24, heads=3).double().blocks[0].attn
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    state = {f"attn.{key}": value for key, value in attention.state_dict().items()}
    close(attention(x), plain_attention(x, state, "attn", 3))


@pytest.mark.parametrize("pool, probe", [("mean", False), ("cls", False), ("cls", True)])
def test_classifier_is_the_formula(tiny_vit, pool, probe):
    vit = tiny_vit(channels=3, pool=pool, probe=probe, **NORMALISATION["cifar10"]).double()
    vit.pos_embed.data += 0.1 * torch.randn_like(vit.pos_embed)
    if probe:
        vit.head[0].running_mean.normal_()
        vit.head[0].running_var.uniform_(0.5, 2)
    state, images, logits = vit.state_dict(), torch.rand(3, 3, 8, 8, dtype=torch.float64), []
    mean, std = (torch.tensor(value)[:, None, None] for value in NORMALISATION["cifar10"].values())
    for image in (images - mean) / std:
        x = plain_encoder(plain_embed(image, state, 2), state, depth=2, heads=2)
        if pool == "mean":
            x = plain_norm(x[1:].mean(0), state, "fc_norm")
        else:
            x = plain_norm(x, state, "norm")[0]
        if probe:
            x = (x - state["head.0.running_mean"]) / (state["head.0.running_var"] + 1e-6).sqrt()
        logits.append(plain_linear(x, state, "head.1" if probe else "head"))
    with torch.no_grad():
        assert vit(images).shape == (3, 5)
        close(vit(images), torch.stack(logits), 1e-6)      # the buffers are float32


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("to_timm", [True, False])
def test_timm_gives_the_same_logits_from_the_same_weights(tiny_vit, tmp_path, pool, to_timm):
    timm = pytest.importorskip("timm")
    vit = tiny_vit(channels=3, mlp_ratio=4.0, pool=pool)
    other = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=5,
        global_pool={"mean": "avg", "cls": "token"}[pool], class_token=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)).eval()
    if to_timm:
        other.load_state_dict(vit.state_dict())
    else:
        torch.save(randomise(other).state_dict(), tmp_path / "timm.pt")
        assert load_encoder(vit, tmp_path / "timm.pt") == ([], [])
    images = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        logits = other((images - vit.mean) / vit.std)
        assert logits.std() > 0.01
        close(vit(images), logits, 1e-5)


def test_stochastic_depth_keeps_rows_scaled_or_drops_them_and_is_off_in_evaluation(tiny_vit):
    vit = tiny_vit(depth=3, drop_path=0.5)
    rows = 4000
    x = torch.randn(1, 5, 16).expand(rows, -1, -1)
    for block, rate in zip(vit.blocks, (0, 0.25, 0.5), strict=True):
        torch.nn.init.zeros_(block.mlp.fc2.weight)
        torch.nn.init.zeros_(block.mlp.fc2.bias)
        block.requires_grad_(False)
        branch = block.eval()(x[:1]) - x[:1]
        close(branch, block.attn(block.norm1(x[:1])), 1e-5)
        change = block.train()(x) - x
        kept = (change - branch / (1 - rate)).abs().amax((1, 2)) < 1e-4
        dropped = change.abs().amax((1, 2)) == 0
        assert (kept | dropped).all() and not (kept & dropped).any()
        assert abs(dropped.sum() - rows * rate) <= 5 * math.sqrt(rows * rate * (1 - rate))


# --------------------------------------------------------------------------------------------------
# The autoencoder
# --------------------------------------------------------------------------------------------------


def test_autoencoder_is_the_formula(tiny_dmae):
    dmae = randomise(tiny_dmae(loss_on="all")).double()
    state, images = dmae.state_dict(), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    noise, mask_noise = torch.randn_like(images), torch.rand(3, 16, dtype=torch.float64)
    loss, prediction, mask = dmae(images, 0.3, 0.6, noise, mask_noise)
    mean, std = 0.3054, 0.3755
    for b in range(3):
        keep = sorted(range(16), key=lambda i, b=b: mask_noise[b, i])[:6]     # int(16 * 0.4)
        tokens = plain_embed((images[b] + 0.3 * noise[b] - mean) / std, state, 2)
        x = plain_norm(plain_encoder(tokens[keep], state, depth=2, heads=2), state, "norm")
        x = plain_linear(x, state, "decoder_embed")
        token = state["mask_token"][0, 0]
        patches = [x[1 + keep.index(i)] if i in keep else token for i in range(16)]
        full = torch.stack([x[0], *patches])
        full = plain_block(full + state["decoder_pos_embed"][0], state, "decoder_blocks.0", heads=2)
        full = plain_linear(plain_norm(full, state, "decoder_norm"), state, "decoder_pred")[1:]
        close(prediction[b].detach(), full, 1e-6)
        assert mask[b].tolist() == [float(i not in keep) for i in range(16)]
    assert loss.ndim == 0 and prediction.shape == (3, 16, 4)


@pytest.mark.parametrize("loss_on", ["all", "dropped"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_is_the_mean_over_all_or_dropped_patches_of_the_clean_image(
    tiny_dmae, loss_on, norm_pix
):
    dmae, images = tiny_dmae(loss_on=loss_on, norm_pix=norm_pix), torch.rand(4, 1, 8, 8)
    loss, prediction, mask = dmae(images, 0.5, 0.75)
    errors = []
    for b in range(4):
        for n in range(16):
            y, x = n // 4 * 2, n % 4 * 2
            patch = (images[b, 0, y:y + 2, x:x + 2].flatten().double().numpy() - 0.3054) / 0.3755
            if norm_pix:
                patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            if mask[b, n] == 1 or loss_on == "all":
                errors.append(np.mean((prediction[b, n].detach().double().numpy() - patch) ** 2))
    assert len(errors) == (64 if loss_on == "all" else 48)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_without_noise_and_on_dropped_patches_it_is_the_plain_masked_autoencoder(tiny_dmae):
    dmae = tiny_dmae(loss_on="dropped")
    images, mask_noise = torch.rand(4, 1, 8, 8), torch.rand(4, 16)

    def loss(sigma):
        return dmae(images, sigma, 0.75, torch.randn(4, 1, 8, 8), mask_noise)[0]

    assert torch.equal(loss(0.0), loss(0.0))
    assert loss(0.0) != loss(0.25)


def test_prediction_sees_kept_patches_and_no_dropped_one(tiny_dmae):
    dmae = randomise(tiny_dmae())
    images, mask_noise, noise = torch.rand(2, 1, 8, 8), torch.rand(2, 16), torch.zeros(2, 1, 8, 8)
    with torch.no_grad():
        _, before, mask = dmae(images, 0.0, 0.5, noise, mask_noise)
        for value, same in ((1, True), (0, False)):
            chosen = unpatchify((mask == value)[..., None].float().expand(-1, -1, 4), 2, (4, 4))
            after = dmae(images + chosen, 0.0, 0.5, noise, mask_noise)[1]
            assert torch.equal(after, before) == same


def test_noise_is_drawn_before_the_mask_from_the_global_generator(tiny_dmae):
    dmae, images = tiny_dmae(), torch.rand(3, 1, 8, 8)
    torch.manual_seed(5)
    drawn = dmae(images, 0.25, 0.5)
    torch.manual_seed(5)
    noise, mask_noise = torch.randn_like(images), torch.rand(3, 16)
    given = dmae(images, 0.25, 0.5, noise=noise, mask_noise=mask_noise)
    for a, b in zip(drawn, given, strict=True):
        assert torch.equal(a, b)


def test_a_small_model_learns_eight_images_by_heart():
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:8], dtype=torch.float32)[:, None] / 16
    dmae = build_dmae("vit_digits", decoder_dim=64)
    optimizer = torch.optim.AdamW(dmae.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=600)
    for _ in range(600):
        loss = dmae(images, 0.0, 0.0)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if loss < 1e-3:
            return
    pytest.fail(f"loss {loss.item()} after 600 steps")


def test_gradient_reaches_every_parameter_of_the_autoencoder_but_its_position_tables(tiny_dmae):
    dmae = tiny_dmae()
    dmae(torch.rand(4, 1, 8, 8), 0.25, 0.5)[0].backward()
    parameters = dict(dmae.named_parameters())
    without = {name for name, p in parameters.items() if p.grad is None or not p.grad.any()}
    fixed = {name for name, p in parameters.items() if not p.requires_grad}
    assert without == fixed == {"pos_embed", "decoder_pos_embed"}


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_gradient_reaches_every_parameter_of_the_classifier(pool):
    vit = build_vit("vit_digits", 10, pool=pool)
    F.cross_entropy(vit(torch.rand(4, 1, 8, 8)), torch.arange(4)).backward()
    assert all(p.requires_grad and p.grad is not None and p.grad.any() for p in vit.parameters())


# --------------------------------------------------------------------------------------------------
# Pixels
# --------------------------------------------------------------------------------------------------


def test_normalisation_is_inside_the_model_and_not_among_its_weights(tiny_vit):
    given, plain = (tiny_vit(mean=(mean,), std=(std,)) for mean, std in ((0.3, 0.7), (0.0, 1.0)))
    plain.load_state_dict(given.state_dict())
    images = torch.rand(3, 1, 8, 8)
    close(given(images), plain((images - 0.3) / 0.7), 1e-5)


def test_noise_belongs_to_the_small_image_and_is_resized_with_it(tiny_dmae, tiny_vit):
    """As cifar10-transfer does it at 32 -> 224: noise, then bicubic, then normalisation."""
    dmae, vit = tiny_dmae(image_size=16), tiny_vit(image_size=16)
    small, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    large = partial(F.interpolate, size=(16, 16), mode="bicubic", align_corners=False)
    mask_noise = torch.rand(2, 64)
    loss, prediction, _ = dmae(small, 0.25, 0.5, noise, mask_noise)
    difference = large(small + 0.25 * noise) - large(small)
    loss_large, prediction_large, _ = dmae(large(small), 1.0, 0.5, difference, mask_noise)
    close(prediction, prediction_large, 1e-4)
    close(loss, loss_large, 1e-4)
    close(vit(small + 0.25 * noise), vit(large(small + 0.25 * noise)), 1e-5)


# --------------------------------------------------------------------------------------------------
# Named sizes and their parameters
# --------------------------------------------------------------------------------------------------


def expected_block(name, dim, hidden):
    matrices = [(dim,), (3 * dim, dim), (dim, dim), (dim,), (hidden, dim), (dim, hidden)]
    shapes = {}
    for part, shape in zip(BLOCK, matrices, strict=True):
        shapes |= expected_linear(f"{name}.{part}", *shape)
    return shapes


def expected_linear(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def expected_encoder(dim, depth, patch, side, channels=3, ratio=4):
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + (side // patch) ** 2, dim)}
    shapes |= expected_linear("patch_embed.proj", dim, channels, patch, patch)
    for layer in range(depth):
        shapes |= expected_block(f"blocks.{layer}", dim, ratio * dim)
    return shapes


def expected_dmae(dim, depth, patch, side):
    shapes = expected_encoder(dim, depth, patch, side) | expected_linear("norm", dim)
    shapes |= expected_linear("decoder_embed", 512, dim)
    shapes |= {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, 1 + (side // patch) ** 2, 512)}
    for layer in range(8):
        shapes |= expected_block(f"decoder_blocks.{layer}", 512, 2048)
    shapes |= expected_linear("decoder_norm", 512)
    return shapes | expected_linear("decoder_pred", patch * patch * 3, 512)


@pytest.fixture
def uninitialised(monkeypatch):
    """Large models in no time: their memory is never touched."""
    for name in [name for name in vars(torch.nn.init) if re.fullmatch("[a-z].*_", name)]:
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)


LARGE = [("vit_base_patch16", 768, 12, 12, 16, 86.6, 111.9),
         ("vit_large_patch16", 1024, 24, 16, 16, 304.3, 329.5),
         ("vit_huge_patch14", 1280, 32, 16, 14, 632.0, 657.1)]


@pytest.mark.parametrize("name, dim, depth, heads, patch, vit_millions, dmae_millions", LARGE)
def test_large_models_have_the_published_names_shapes_and_counts(
    uninitialised, name, dim, depth, heads, patch, vit_millions, dmae_millions
):
    def shapes(model):
        return {key: tuple(value.shape) for key, value in model.state_dict().items()}

    def millions(model):
        return round(sum(p.numel() for p in model.parameters()) / 1e6, 1)

    encoder = expected_encoder(dim, depth, patch, 224)
    for pool, final in (("mean", "fc_norm"), ("cls", "norm")):
        vit = build_vit(name, 1000, pool=pool)
        head = expected_linear(final, dim) | expected_linear("head", 1000, dim)
        assert shapes(vit) == encoder | head
        assert millions(vit) == vit_millions
        assert vit.blocks[0].attn.heads == heads
    dmae = build_dmae(name)
    assert shapes(dmae) == expected_dmae(dim, depth, patch, 224)
    assert millions(dmae) == dmae_millions


def test_vit_base_has_the_names_of_timms(uninitialised):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        other = timm.create_model("vit_base_patch16_224")
    shapes = []
    for vit in (build_vit("vit_base_patch16", 1000, pool="cls"), other):
        shapes.append({name: value.shape for name, value in vit.state_dict().items()})
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", SIZES)
def test_a_config_rebuilds_its_model(uninitialised, name):
    for model in (build_dmae(name), build_vit(name, 7)):
        again = type(model)(**model.config)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(again.mean, model.mean) and torch.equal(again.std, model.std)


def test_weights_start_as_xavier_maps_small_tokens_and_a_tiny_head():
    torch.manual_seed(0)
    for model in (build_dmae("vit_digits"), build_vit("vit_digits", 10)):
        for name, value in model.state_dict().items():
            if name.endswith("token"):
                assert value.std() == pytest.approx(0.02, rel=0.5) and value.any()
            elif name == "head.weight":
                assert value.std() == pytest.approx(2e-5, rel=0.1)
            elif "norm" in name:
                assert (value == name.endswith("weight")).all()
            elif name.endswith("bias"):
                assert not value.any()
            elif not name.endswith("pos_embed"):
                bound = math.sqrt(6 / (value[0].numel() + value.shape[0]))
                assert 0.9 * bound < value.abs().max() <= bound * 1.0001, name
        assert torch.equal(model.pos_embed, sincos_positions(64, (4, 4)))
    probe = build_vit("vit_digits", 10, pool="cls", probe=True).state_dict()
    assert probe["head.1.weight"].std() == pytest.approx(0.01, rel=0.1)
    assert not probe["head.1.bias"].any()
    assert "head.0.weight" not in probe


def test_only_matrices_decay():
    for model in (build_dmae("vit_digits"), build_vit("vit_digits", 10)):
        spared = {name for name, p in model.named_parameters() if not decays(name, p)}
        assert spared == {name for name, p in model.named_parameters()
                          if name.endswith(("bias", "token", "pos_embed")) or "norm" in name}


def test_tensors_have_the_shapes_that_comments_claim(tiny_dmae, tiny_vit):
    b, c, side, n, k, d, p, width = 3, 1, 8, 16, 8, 16, 2, 8
    dmae, vit, images = tiny_dmae(), tiny_vit(), torch.rand(b, c, side, side)
    assert vit.embed(images).shape == dmae.embed(images).shape == (b, n, d)
    assert vit.with_cls(torch.rand(b, k, d)).shape == (b, 1 + k, d)
    assert vit.features(images).shape == (b, d)
    latent, restore, mask = dmae.encode(images, 0.5, torch.rand(b, n))
    assert (latent.shape, restore.shape, mask.shape) == ((b, 1 + k, d), (b, n), (b, n))
    assert dmae.decode(latent, restore).shape == dmae.target(images).shape == (b, n, p * p * c)
    assert dmae.decoder_embed(latent).shape == (b, 1 + k, width)


@pytest.mark.parametrize("build", [build_dmae, partial(build_vit, num_classes=10)])
@pytest.mark.parametrize("size", [9, 0, -2])
def test_an_image_size_that_patches_do_not_fill_is_refused(build, size):
    with pytest.raises(ValueError, match=f"{size}.*multiple.*2"):
        build("vit_digits", image_size=size)


@pytest.mark.parametrize("build", [build_dmae, partial(build_vit, num_classes=10)])
def test_an_unknown_model_is_refused_with_the_names_that_there_are(build):
    with pytest.raises(ValueError, match="'vit_bas_patch16'.*" + ", ".join(SIZES)):
        build("vit_bas_patch16")


def test_a_mean_for_other_channels_is_refused():
    with pytest.raises(ValueError, match="each of 1 channels"):
        build_dmae("vit_digits", **NORMALISATION["cifar10"])


# --------------------------------------------------------------------------------------------------
# Loading weights
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tiny_dmae, tmp_path):
    """save(content of the file around {"model": state}) -> (path, state) of a tiny_dmae."""

    def save(state=None, bare=False, **more):
        state = state or randomise(tiny_dmae()).state_dict()
        torch.save(state if bare else {"model": state, **more}, tmp_path / "weights.pt")
        return tmp_path / "weights.pt", state

    return save


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("file", [
    dict(kind="pretrain", config={}, epoch=3),
    dict(bare=True),
    dict(args=argparse.Namespace(lr=1e-3, output_dir="x"), epoch=1099, optimizer={"state": {}})])
def test_encoder_is_loaded_from_our_files_bare_ones_and_those_with_a_namespace(
    published, tiny_vit, pool, file
):
    path, state = published(**file)
    vit = tiny_vit(pool=pool)
    fresh = {key: value.clone() for key, value in vit.state_dict().items()}
    missing, left = load_encoder(vit, path)
    new = {"head.weight", "head.bias"}
    if pool == "mean":
        new |= {"fc_norm.weight", "fc_norm.bias"}
    assert set(missing) == new
    assert set(left) == {key for key in state if key.startswith(("decoder_", "mask_token"))
                         or (key.startswith("norm.") and pool == "mean")}
    for key, value in vit.state_dict().items():
        assert torch.equal(value, fresh[key] if key in new else state[key]), key


def test_positions_of_another_grid_are_interpolated_and_constant_ones_stay_constant(
    published, tiny_vit, tiny_dmae
):
    state = tiny_dmae().state_dict()
    state["pos_embed"] = torch.full((1, 17, 16), 0.25)
    path, _ = published(state)
    vit = tiny_vit(image_size=16)
    load_encoder(vit, path)
    close(vit.pos_embed.detach(), torch.full((1, 65, 16), 0.25), 1e-6)


def test_a_head_for_other_classes_is_left_out(published, tiny_vit):
    path, state = published(tiny_vit(num_classes=7).state_dict())
    vit = tiny_vit()
    before = vit.head.weight.clone()
    missing, left = load_encoder(vit, path)
    assert set(missing) == {"head.weight", "head.bias"}
    assert {key.removesuffix(".of_other_classes") for key in left} == {"head.weight", "head.bias"}
    assert torch.equal(vit.head.weight, before)
    assert torch.equal(vit.fc_norm.weight, state["fc_norm.weight"])


BREAK = {                                                # what a file has in place of its own
    "unexpected": ({"blocks.2.norm1.weight": torch.ones(16)}, "blocks.2.norm1.weight"),
    "missing": ({"blocks.1.mlp.fc1.bias": None}, "blocks.1.mlp.fc1.bias"),
    "shape": ({"blocks.0.attn.proj.weight": torch.ones(16, 8)}, "blocks.0.attn.proj.weight"),
    "width": ({"pos_embed": torch.ones(1, 17, 8)}, "pos_embed"),
    "rank": ({"pos_embed": torch.ones(16)}, "pos_embed"),
    "infinite": ({"cls_token": torch.full((1, 1, 16), math.inf)}, "cls_token"),
    "whole numbers": ({"cls_token": torch.ones(1, 1, 16).long()}, "cls_token is torch.int64"),
    "oblong": ({"pos_embed": torch.ones(1, 18, 16)}, "17 positions"),
}


@pytest.mark.parametrize("change, named", BREAK.values(), ids=BREAK)
def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(
    published, tiny_vit, tiny_dmae, change, named
):
    state = tiny_dmae().state_dict() | change
    path, _ = published({key: value for key, value in state.items() if value is not None})
    vit = tiny_vit()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(ValueError, match=named) as error:
        load_encoder(vit, path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("plain", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, tiny_vit, tiny_dmae, plain):
    content = {"model": tiny_dmae().state_dict(), "args": Payload(tmp_path / "ran")}
    if plain:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps(content | {"model": {}}))
    else:
        torch.save(content, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt"):
        load_encoder(tiny_vit(), tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(content["args"]))
    assert (tmp_path / "ran").exists()                   # the payload is a live one


@pytest.mark.parametrize("content", [
    b"", b"not a checkpoint", b"PK\x03\x04torn", None, [1, 2], {"model": 3}, {"model": {}},
    {"model": {"a": "text"}}, {"step": 3}])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match="file.pt"):
        read_checkpoint(path)


def test_a_truncated_checkpoint_is_refused(published):
    path, _ = published()
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            read_checkpoint(path)
