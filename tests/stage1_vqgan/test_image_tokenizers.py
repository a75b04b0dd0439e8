"""What every image tokenizer promises, whatever its quantizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from checkpoint_io import config_to_mapping, write_safetensors
from stage1_vqgan import (
    RQVAE,
    STAGE1,
    VQGAN,
    ConvNetConfig,
    ImageTokenizer,
    PyramidVAE,
    ResidualQuantizerConfig,
    RQVAEConfig,
    VectorQuantizerConfig,
    VQGANConfig,
    load_tokenizer,
)
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.convnet import Decoder, Encoder

KEYS = Path(__file__).with_name("state_dict_keys.txt")


@pytest.fixture(params=STAGE1)
def tokenizer(request: pytest.FixtureRequest) -> QuantizedAutoencoder:
    """Every entry of STAGE1 has a tiny one in the conftest."""
    model: QuantizedAutoencoder = request.getfixturevalue(f"tiny_{request.param}")
    assert type(model) is STAGE1[request.param][0]
    return model


def draw_images(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TestContract:
    def test_is_an_image_tokenizer(self, tokenizer: QuantizedAutoencoder) -> None:
        assert isinstance(tokenizer, ImageTokenizer)
        assert tokenizer.codebook_size == 24
        assert tokenizer.code_shape[:2] == ((25,) if isinstance(tokenizer, PyramidVAE) else (4, 4))
        assert tokenizer.downsampling == 4

    def test_depths(self, tokenizer: QuantizedAutoencoder) -> None:
        """A codebook size and ever finer codes for each depth or scale; codes without depth have one."""
        depth = {1: 4, 2: 1, 3: 3}[len(tokenizer.code_shape)]
        assert len(tokenizer.codebook_sizes) == depth
        assert max(tokenizer.codebook_sizes) == tokenizer.codebook_size
        codes = tokenizer.encode(draw_images(2, 3, 16, 16))
        kept = tokenizer.coarse_to_fine(codes)
        assert torch.equal(kept[-1], codes)
        assert len(kept) == depth
        assert all(torch.equal(part, codes[..., : part.shape[-1]]) for part in kept[:-1])
        images = [tokenizer.decode(part) for part in kept]
        assert len({tuple(image.flatten().tolist()) for image in images}) == depth
        by_depth = tokenizer.by_depth(codes)
        assert len(by_depth) == depth
        assert sum(part.numel() for part in by_depth) == codes.numel()
        for part, size in zip(by_depth, tokenizer.codebook_sizes, strict=True):
            assert int(part.max()) < size

    def test_encode(self, tokenizer: QuantizedAutoencoder) -> None:
        codes = tokenizer.encode(draw_images(3, 3, 16, 16))
        assert codes.shape == (3, *tokenizer.code_shape)
        assert codes.dtype == torch.int64
        assert codes.min() >= 0
        assert codes.max() < tokenizer.codebook_size
        assert codes.unique().numel() > 6  # else the other tests would show nothing

    def test_decode(self, tokenizer: QuantizedAutoencoder) -> None:
        images = tokenizer.decode(tokenizer.encode(draw_images(2, 3, 16, 16)))
        assert images.shape == (2, 3, 16, 16)
        assert images.dtype == torch.float32
        assert images.isfinite().all()

    @pytest.mark.parametrize(("height", "width"), [(16, 32), (24, 8), (8, 8), (32, 32), (4, 4)])
    def test_any_size(self, tokenizer: QuantizedAutoencoder, height: int, width: int) -> None:
        if isinstance(tokenizer, PyramidVAE):
            with pytest.raises(ValueError, match=r"latents must be \(B, 8, 4, 4\), .* of one size"):
                tokenizer.encode(draw_images(2, 3, height, width))
            return
        codes = tokenizer.encode(draw_images(2, 3, height, width))
        assert codes.shape == (2, height // 4, width // 4, *tokenizer.code_shape[2:])
        assert tokenizer.decode(codes).shape == (2, 3, height, width)

    def test_an_image_does_not_depend_on_its_batch(self, tokenizer: QuantizedAutoencoder) -> None:
        images = draw_images(3, 3, 16, 16)
        codes = tokenizer.encode(images)
        assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), codes)
        alone = torch.cat([tokenizer.decode(code[None]) for code in codes])
        torch.testing.assert_close(alone, tokenizer.decode(codes), atol=1e-5, rtol=1e-5)

    def test_arguments_and_random_state_stay_as_they_are(self, tokenizer: QuantizedAutoencoder) -> None:
        images, state = draw_images(2, 3, 16, 16), torch.random.get_rng_state()
        codes = tokenizer.encode(images)
        before = codes.clone()
        tokenizer.decode(codes)
        assert torch.equal(images, draw_images(2, 3, 16, 16))
        assert torch.equal(codes, before)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_forward_is_decode_of_encode_with_gradients(self, tokenizer: QuantizedAutoencoder) -> None:
        images = draw_images(2, 3, 16, 16)
        reconstructions, quantized = tokenizer.train()(images)
        codes = tokenizer.encode(images)
        assert torch.equal(quantized.codes, codes)
        torch.testing.assert_close(reconstructions, tokenizer.decode(codes), atol=1e-4, rtol=1e-4)
        assert quantized.commitment_loss.shape == quantized.codebook_loss.shape == ()
        (reconstructions.square().mean() + quantized.commitment_loss).backward()
        for name, parameter in tokenizer.encoder.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert tokenizer.encoder.conv_in.weight.grad.abs().max() > 0

    def test_dtype_is_that_of_the_parameters(self, tokenizer: QuantizedAutoencoder) -> None:
        tokenizer = tokenizer.to(torch.bfloat16)
        codes = tokenizer.encode(draw_images(1, 3, 16, 16).to(torch.bfloat16))
        assert codes.dtype == torch.int64
        assert tokenizer.decode(codes).dtype == torch.bfloat16

    def test_codebook(self, tokenizer: QuantizedAutoencoder) -> None:
        depth = len(tokenizer.codebook_sizes)
        codebook = tokenizer.codebook()
        assert codebook.shape == (depth, 24, 8)
        if isinstance(tokenizer, PyramidVAE):  # its sums are tested with the quantizer
            return
        # the sum of the entries that the codes name is what gets decoded
        codes = tokenizer.encode(draw_images(1, 3, 16, 16)).view(1, 4, 4, depth)
        entries = torch.stack([codebook[d][codes[..., d]] for d in range(depth)]).sum(dim=0)  # (1, 4, 4, C)
        decoded = tokenizer.decode_latents(entries.permute(0, 3, 1, 2))
        expected = tokenizer.decode(codes if depth > 1 else codes[..., 0])
        torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)

    def test_native_checkpoint(self, tokenizer: QuantizedAutoencoder, tmp_path: Path) -> None:
        kind = next(name for name, (cls, _) in STAGE1.items() if type(tokenizer) is cls)
        config = {"image_tokenizer": {"type": kind, **config_to_mapping(tokenizer.config)}}
        OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
        write_safetensors(tmp_path / "image_tokenizer.safetensors", tokenizer.state_dict())
        loaded = load_tokenizer(tmp_path)
        assert type(loaded) is type(tokenizer)
        assert loaded.config == tokenizer.config
        assert not loaded.training
        images = draw_images(2, 3, 16, 16)
        codes = loaded.encode(images)
        assert torch.equal(codes, tokenizer.encode(images))
        assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def test_state_dict_keys_are_pinned(request: pytest.FixtureRequest) -> None:
    """Another name or shape, and no checkpoint that anybody has saved loads any more."""
    lines = [
        f"{kind} {name} {'x'.join(map(str, tensor.shape))}"
        for kind in STAGE1
        for name, tensor in request.getfixturevalue(f"tiny_{kind}").state_dict().items()
    ]
    assert sorted(lines) == sorted(KEYS.read_text().splitlines())


class TestErrors:
    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"floating point \(B, 3, H, W\).*got torch.uint8"),
            (torch.zeros(3, 16, 16), r"images must be .* got torch.float32 \(3, 16, 16\): convert with"),
            (torch.zeros(1, 1, 16, 16), r"got torch.float32 \(1, 1, 16, 16\)"),
            (torch.zeros(0, 3, 16, 16), r"not empty, got torch.float32 \(0, 3, 16, 16\)"),
            (torch.zeros(1, 3, 16, 0), r"not empty, got torch.float32 \(1, 3, 16, 0\)"),
            (torch.zeros(1, 3, 18, 16), "sides must be multiples of 4, got 18x16: resize or crop"),
            (torch.zeros(1, 3, 16, 15), "sides must be multiples of 4, got 16x15"),
        ],
    )
    def test_images(self, tokenizer: QuantizedAutoencoder, images: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(images)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda codes: codes.float(), "codes must be int64 .* got torch.float32"),
            (lambda codes: codes[0], "codes must be int64 with [234] dimensions"),
            (lambda codes: codes[:0], r"not empty, got torch.int64 \(0, "),
            (
                lambda codes: codes - 1,
                r"codes must be in \[0, 24\), got -1: do they come from a tokenizer with",
            ),
            (lambda codes: codes + 24, r"codes must be in \[0, 24\), got 24"),
        ],
    )
    def test_codes(self, tokenizer: QuantizedAutoencoder, change: Any, message: str) -> None:
        codes = torch.zeros(1, *tokenizer.code_shape, dtype=torch.int64)
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(change(codes))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"channel_multipliers": ()}, r"channel_multipliers must be positive, got \(\)"),
            ({"channel_multipliers": (1, 0)}, r"channel_multipliers must be positive, got \(1, 0\)"),
            ({"channels": 48}, r"channels must be a multiple of 32 \(group norm\), got 48"),
            ({"channels": 0}, "channels must be a multiple of 32"),
            ({"image_size": 24}, "image_size must be a multiple of 16, got 24"),
            ({"image_size": 0}, "image_size must be a multiple of 16, got 0"),
            ({"num_res_blocks": 0}, "num_res_blocks and latent_channels must be at least 1, got 0 and 256"),
            ({"latent_channels": 0}, "must be at least 1, got 2 and 0"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
            ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ],
    )
    def test_convnet_config(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ConvNetConfig(**settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"codebook_size": 0}, "codebook_size and width must be at least 1, got 0 and 256"),
            ({"width": 0}, "must be at least 1, got 16384 and 0"),
            ({"commitment_weight": -1.0}, "commitment_weight must not be negative, got -1.0"),
        ],
    )
    def test_vector_quantizer_config(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            VectorQuantizerConfig(**settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"codebook_sizes": ()}, r"codebook_sizes and width must be at least 1, got \(\) and 256"),
            ({"codebook_sizes": (8, 0)}, r"must be at least 1, got \(8, 0\)"),
            ({"width": 0}, "must be at least 1, got .* and 0"),
            ({"codebook_sizes": (8, 4)}, r"a shared codebook has one size, got \(8, 4\): make them equal"),
            ({"commitment_weight": -0.5}, "commitment_weight must not be negative, got -0.5"),
        ],
    )
    def test_residual_quantizer_config(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ResidualQuantizerConfig(**settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"patch": (1, 3)}, r"patch must divide the latent grid of 16, got \(1, 3\)"),
            ({"patch": (0, 1)}, "patch must divide the latent grid"),
            ({"patch": (2, 2, 2)}, "patch must divide the latent grid"),
            ({"patch": (2, 2)}, "width must be latent_width x patch = 1024, got 256"),
            ({"latent_width": 64}, "width must be latent_width x patch = 64, got 256"),
        ],
    )
    def test_rqvae_config(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RQVAEConfig(**settings)


class TestConvNet:
    def test_attention_is_where_the_training_resolution_says(self) -> None:
        """minDALL-E read the code grid from `attn_resolutions[0]`; here the two are apart."""
        config = ConvNetConfig(
            image_size=32,
            channels=32,
            channel_multipliers=(1, 1, 2),
            num_res_blocks=2,
            attention_resolutions=(16,),
        )
        encoder, decoder = Encoder(config), Decoder(config)
        assert [len(level.attentions) for level in encoder.levels] == [0, 2, 0]
        assert [len(level.attentions) for level in decoder.levels] == [0, 3, 0]
        assert config.latent_size == 8

    def test_dropout_is_off_in_evaluation(self, tiny_vqgan: VQGAN) -> None:
        convnet = ConvNetConfig(**{**config_to_mapping(tiny_vqgan.config.convnet), "dropout": 0.5})
        model = VQGAN(VQGANConfig(convnet=convnet, quantizer=tiny_vqgan.config.quantizer))
        model.load_state_dict(tiny_vqgan.state_dict())
        images = draw_images(1, 3, 16, 16)
        expected = tiny_vqgan.encode_latents(images)
        assert torch.equal(model.eval().encode_latents(images), expected)
        assert not torch.equal(model.train().encode_latents(images), expected)

    def test_downsampling_pads_right_and_bottom(self, tiny_vqgan: VQGAN) -> None:
        """Padding on all sides, the usual choice, would shift every picture by half a cell."""
        down = tiny_vqgan.encoder.levels[0].resample
        x = torch.zeros(1, 32, 8, 8)
        changed = x.clone()
        changed[..., 4, 4] = 1
        moved = (down(changed) - down(x)).abs().sum(dim=1)[0] > 0  # (4, 4)
        # output cell i sees inputs 2i, 2i + 1, 2i + 2
        assert moved.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


class TestPatches:
    """A code grid coarser than the latent grid: neighbouring latents share one position."""

    @pytest.fixture
    def build(self, tiny_rqvae: RQVAE) -> Any:
        def build(patch: tuple[int, int], image_size: int = 16) -> RQVAE:
            quantizer = ResidualQuantizerConfig(codebook_sizes=(24, 24), width=8 * patch[0] * patch[1])
            convnet = replace(tiny_rqvae.config.convnet, image_size=image_size)
            config = RQVAEConfig(convnet=convnet, quantizer=quantizer, latent_width=8, patch=patch)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return RQVAE(config).eval()

        return build

    @pytest.mark.parametrize(
        ("patch", "code_shape", "downsampling"),
        [((2, 2), (2, 2, 2), 8), ((1, 2), (4, 2, 2), 8), ((4, 1), (1, 4, 2), 16)],
    )
    def test_shapes(self, build: Any, patch: Any, code_shape: Any, downsampling: int) -> None:
        model = build(patch)
        assert (model.code_shape, model.downsampling) == (code_shape, downsampling)
        codes = model.encode(draw_images(2, 3, 16, 16))
        assert codes.shape == (2, *code_shape)
        assert model.decode(codes).shape == (2, 3, 16, 16)
        assert model.codebook().shape == (2, 24, 8 * patch[0] * patch[1])

    def test_a_position_holds_its_latents_row_by_row(self, build: Any) -> None:
        model, images = build((2, 2)), draw_images(1, 3, 16, 16)
        latents = model.quant_conv(model.encoder(images))  # (1, 8, 4, 4)
        joined = model.encode_latents(images)  # (1, 32, 2, 2)
        for row, column in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            cell = latents[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # (8, 2, 2)
            expected = torch.cat([cell[:, 0, 0], cell[:, 0, 1], cell[:, 1, 0], cell[:, 1, 1]])
            assert torch.equal(joined[0, :, row, column], expected)

    @pytest.mark.parametrize("patch", [(2, 2), (1, 2), (2, 1)])
    def test_decoding_takes_them_apart_again(self, build: Any, patch: tuple[int, int]) -> None:
        model, images = build(patch), draw_images(1, 3, 16, 16)
        latents = model.quant_conv(model.encoder(images))
        expected = model.decoder(model.post_quant_conv(latents))
        torch.testing.assert_close(model.decode_latents(model.encode_latents(images)), expected)

    def test_images_must_fill_the_positions(self, build: Any) -> None:
        with pytest.raises(ValueError, match="multiples of 8, got 20x16"):
            build((2, 2)).encode(draw_images(1, 3, 20, 16))

    def test_images_must_fill_positions_that_are_not_square(self, build: Any) -> None:
        """A picture of 3x3 latents was let through, of which no whole number of 2x3 patches can be made."""
        model = build((2, 3), image_size=24)
        assert model.encode(draw_images(1, 3, 24, 48)).shape == (1, 3, 4, 2)
        with pytest.raises(ValueError, match="multiples of 24, got 12x12"):
            model.encode(draw_images(1, 3, 12, 12))
