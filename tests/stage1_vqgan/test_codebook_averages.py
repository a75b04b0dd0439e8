"""Codebooks by moving averages: arithmetic by hand, k-means, restarts, and no leak into the codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from averages_in_processes import NUM_BATCHES, draw_batches, state_after
from torch import Tensor

from stage1_vqgan import ResidualQuantizerConfig, VectorQuantizerConfig
from stage1_vqgan.quantize import (
    CodebookAverages,
    CodebookTrainingConfig,
    Quantizer,
    ResidualQuantizer,
    VectorQuantizer,
)

WIDTH, SIZE = 5, 11
SIZES = {"shared": ((SIZE,) * 3, True), "separate": ((SIZE, 5, 8), False)}


def build(kind: str, size: int = SIZE, **settings: Any) -> tuple[Any, CodebookAverages]:
    """A quantizer with a drawn codebook, and its averages."""
    quantizer: Quantizer
    if kind == "vector":
        quantizer = VectorQuantizer(VectorQuantizerConfig(codebook_size=size, width=WIDTH))
    else:
        sizes, is_shared = SIZES[kind]
        quantizer = ResidualQuantizer(
            ResidualQuantizerConfig(codebook_sizes=sizes, is_shared=is_shared, width=WIDTH)
        )
    generator = torch.Generator().manual_seed(0)
    for table in quantizer.parameters():
        torch.nn.init.normal_(table, generator=generator)
    return quantizer, CodebookAverages(quantizer, CodebookTrainingConfig(**settings))


def draw_latents(seed: int = 1, batch: int = 4) -> Tensor:
    return torch.randn(batch, WIDTH, 3, 4, generator=torch.Generator().manual_seed(seed))


def vectors_of(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C)."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def error_of(quantizer: Quantizer, latents: Tensor) -> float:
    """Squared error of the quantised latents, relative to the latents' own square."""
    difference = quantizer.decode(quantizer.encode(latents)) - latents
    return float(difference.square().mean() / latents.square().mean())


def is_among(vector: Tensor, vectors: Tensor) -> bool:
    return bool(((vectors - vector).abs().amax(dim=1) < 1e-4).any())  # the smoothing moves it by as little


@pytest.mark.parametrize("kind", ["vector", *SIZES])
class TestUpdate:
    def test_by_hand(self, kind: str) -> None:
        """Loops over every vector and depth in float64."""
        quantizer, averages = build(kind, decay=0.9, restart_after=0)
        latents = draw_latents()
        codes = quantizer.encode(latents)
        tables = [table.detach().double().clone() for table in quantizer.parameters()]
        counts = [torch.zeros(len(table), dtype=torch.float64) for table in tables]
        sums = [torch.zeros_like(table) for table in tables]
        by_vector = codes.reshape(len(vectors_of(latents)), -1).tolist()
        for vector, its_codes in zip(vectors_of(latents).double(), by_vector, strict=True):
            residual = vector.clone()
            for depth, code in enumerate(its_codes):
                i = depth if kind == "separate" else 0
                counts[i][code] += 1
                sums[i][code] += residual
                residual = residual - tables[i][code]
        averages.update(latents, codes)
        for i, table in enumerate(quantizer.parameters()):
            count = 0.9 * 1 + 0.1 * counts[i]  # they start at one
            total = 0.9 * tables[i] + 0.1 * sums[i]  # and these at the codebook
            smoothed = (count + 1e-5) / (count.sum() + len(table) * 1e-5) * count.sum()
            torch.testing.assert_close(averages.get_buffer(f"counts_{i}"), count.float())
            torch.testing.assert_close(averages.get_buffer(f"sums_{i}"), total.float())
            torch.testing.assert_close(table.detach(), (total / smoothed[:, None]).float())
            assert not torch.equal(table.detach(), tables[i].float())

    def test_the_codebook_stays_during_a_forward(self, kind: str) -> None:
        quantizer, averages = build(kind)
        averages.train(), quantizer.train()
        before = [table.clone() for table in quantizer.state_dict().values()]
        quantizer(draw_latents())
        for table, old in zip(quantizer.state_dict().values(), before, strict=True):
            assert torch.equal(table, old)

    def test_gradients_do_not_reach_the_codebook(self, kind: str) -> None:
        quantizer, averages = build(kind)
        latents = draw_latents().requires_grad_()
        output = quantizer(latents)
        assert output.codebook_loss.item() == 0
        (output.latents.sum() + output.commitment_loss + output.codebook_loss).backward()
        averages.update(latents, output.codes)
        assert latents.grad is not None
        assert all(table.grad is None and not table.requires_grad for table in quantizer.parameters())
        assert not list(averages.parameters())  # else an optimiser, or a checkpoint, would see them twice

    def test_an_entry_that_is_never_chosen_stays_finite(self, kind: str) -> None:
        """Its count goes to zero; the smoothing keeps the division sound."""
        quantizer, averages = build(kind, decay=0.01, restart_after=0)
        for seed in range(60):  # 0.01^60 is zero in float32
            latents = draw_latents(seed)
            averages.update(latents, torch.zeros_like(quantizer.encode(latents)))
        assert float(averages.get_buffer("counts_0").min()) == 0
        assert all(bool(table.isfinite().all()) for table in quantizer.parameters())

    def test_half_precision_of_the_model(self, kind: str) -> None:
        """In bfloat16 an average that moves by 1% of a difference mostly rounded to where it was."""
        quantizer, averages = build(kind)
        other, others_averages = build(kind)
        torch.nn.ModuleList([other, others_averages]).to(torch.bfloat16)
        for seed in range(3):
            codes = quantizer.encode(draw_latents(seed))
            averages.update(draw_latents(seed), codes)
            others_averages.update(draw_latents(seed).bfloat16(), codes)
        for name, buffer in averages.named_buffers():
            assert others_averages.get_buffer(name).dtype == buffer.dtype
            if not name.startswith("sums"):  # these see rounded latents
                assert torch.equal(others_averages.get_buffer(name), buffer)
        assert next(other.parameters()).dtype == torch.bfloat16

    def test_it_goes_on_from_a_state_dict(self, kind: str) -> None:
        """Restarts, ages and the draws of restarts included."""
        quantizer, averages = build(kind, restart_after=2)
        other, others_averages = build(kind, restart_after=2)
        batches = [draw_latents(seed, batch=1) for seed in range(6)]
        for latents in batches[:3]:
            averages.start(latents)
            averages.update(latents, quantizer.encode(latents))
        other.load_state_dict(quantizer.state_dict())
        others_averages.load_state_dict(averages.state_dict())
        for latents in batches[3:]:
            for one, its_averages in ((quantizer, averages), (other, others_averages)):
                its_averages.start(latents)
                its_averages.update(latents, one.encode(latents))
        for mine, theirs in ((quantizer, other), (averages, others_averages)):
            for name, tensor in mine.state_dict().items():
                assert torch.equal(tensor, theirs.state_dict()[name]), name


class TestRestarts:
    """With the codes that a test says were chosen."""

    def codes(self, *chosen: int) -> Tensor:
        """Codes (4, 3, 4) of which each of these occurs."""
        return torch.tensor(chosen).repeat(48)[:48].view(4, 3, 4)

    def test_after_so_many_batches_and_no_sooner(self) -> None:
        quantizer, averages = build("vector", restart_after=3)
        for seed in range(3):
            latents = draw_latents(seed)
            assert not any(is_among(entry, vectors_of(latents)) for entry in quantizer.codebook)
            # entry 10 is chosen until the last batch but one: its count of batches begins anew
            averages.update(latents, self.codes(*range(7), 10) if seed < 2 else self.codes(*range(7)))
        moved = [entry for entry in range(SIZE) if is_among(quantizer.codebook[entry], vectors_of(latents))]
        assert moved == [7, 8, 9]

    def test_others_stay_and_what_moved_is_not_averaged_with_what_it_was(self) -> None:
        latents = draw_latents()
        tables = []
        for restart_after in (0, 1):
            quantizer, averages = build("vector", restart_after=restart_after)
            averages.update(latents, self.codes(*range(8)))
            tables.append(quantizer.codebook.detach())
        torch.testing.assert_close(tables[1][:8], tables[0][:8], rtol=1e-5, atol=1e-6)
        assert len({int((vectors_of(latents) - entry).abs().sum(1).argmin()) for entry in tables[1][8:]}) == 3
        assert averages.get_buffer("counts_0")[8:].tolist() == [1, 1, 1]

    def test_an_entry_that_stays_unchosen_moves_again_after_as_long(self) -> None:
        """In rq-vae-transformer a moved entry that one batch missed moved again with every batch."""
        quantizer, averages = build("vector", restart_after=3)
        moves = []
        for seed in range(9):
            latents = draw_latents(seed)
            averages.update(latents, self.codes(*range(10)))
            moves.append(is_among(quantizer.codebook[10], vectors_of(latents)))
        assert moves == [False, False, True] * 3

    def test_a_separate_codebook_moves_to_residuals_of_its_depth(self) -> None:
        quantizer, averages = build("separate", restart_after=1)
        latents = draw_latents()
        tables = [table.detach().clone() for table in quantizer.tables]
        codes = torch.zeros(4, 3, 4, 3, dtype=torch.int64)
        averages.update(latents, codes)
        residual = vectors_of(latents)
        for table, old in zip(quantizer.tables, tables, strict=True):
            assert all(is_among(entry, residual) for entry in table[1:])
            assert not is_among(table[0], residual)
            residual = residual - old[0]

    def test_more_entries_than_vectors(self) -> None:
        """The copies differ, or they would be chosen together for ever."""
        quantizer, averages = build("vector", size=80, restart_after=1)
        latents = draw_latents()
        averages.update(latents, torch.zeros(4, 3, 4, dtype=torch.int64))
        moved = quantizer.codebook[1:]
        nearest = torch.cdist(moved, vectors_of(latents)).amin(dim=1)
        assert float(nearest.max()) < 0.1
        assert len(moved.unique(dim=0)) == 79

    def test_usage(self) -> None:
        """Entries that were moved counted as used: with restarts on, usage was one whatever happened."""
        _, averages = build("vector", restart_after=2)
        shares = []
        for batch, chosen in enumerate([range(11), range(11), range(5), range(5), range(5), range(8)]):
            averages.update(draw_latents(batch), self.codes(*chosen))
            shares.append(float(averages.usage()))
        assert shares == pytest.approx([1, 1, 1, 5 / 11, 5 / 11, 8 / 11])

    def test_usage_without_restarts(self) -> None:
        _, averages = build("vector", restart_after=0)
        for _ in range(99):
            averages.update(draw_latents(), self.codes(0))
        assert float(averages.usage()) == 1
        averages.update(draw_latents(), self.codes(0))
        assert float(averages.usage()) == pytest.approx(1 / 11)


@pytest.mark.parametrize("kind", ["vector", *SIZES])
class TestStart:
    def test_entries_are_near_the_data(self, kind: str) -> None:
        latents = 3 + 0.5 * draw_latents(batch=32)
        errors = {}
        for iterations in (0, 10):
            quantizer, averages = build(kind, kmeans_iterations=iterations)
            random = error_of(quantizer, latents)
            averages.start(latents)
            errors[iterations] = error_of(quantizer, latents)
            for i, table in enumerate(quantizer.parameters()):
                assert torch.equal(averages.get_buffer(f"sums_{i}"), table)
        assert errors[0] < 0.2 * random
        assert errors[10] < 0.95 * errors[0]

    def test_no_iterations_means_vectors_of_the_batch(self, kind: str) -> None:
        quantizer, averages = build(kind, kmeans_iterations=0)
        latents = draw_latents()
        averages.start(latents)
        first = next(iter(quantizer.parameters()))
        assert all(is_among(entry, vectors_of(latents)) for entry in first[: 3 if kind == "shared" else SIZE])

    def test_fewer_vectors_than_entries(self, kind: str) -> None:
        quantizer, averages = build(kind)
        latents = draw_latents(batch=1)[..., :2, :1]  # 2 vectors
        averages.start(latents)
        assert error_of(quantizer, latents) < 1e-2
        assert all(len(table.unique(dim=0)) == len(table) for table in quantizer.parameters())

    @pytest.mark.parametrize("before", ["a start", "an update", "loading"])
    def test_it_happens_once(self, kind: str, before: str) -> None:
        quantizer, averages = build(kind)
        if before == "an update":
            averages.update(draw_latents(), quantizer.encode(draw_latents()))
        else:
            averages.start(draw_latents())
        if before == "loading":
            state, tables = averages.state_dict(), quantizer.state_dict()
            quantizer, averages = build(kind)
            averages.load_state_dict(state)
            quantizer.load_state_dict(tables)
        state = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
        averages.start(draw_latents(2))
        for name, tensor in quantizer.state_dict().items():
            assert torch.equal(tensor, state[name])


def test_lloyd_never_makes_it_worse() -> None:
    """Each iteration, of the vectors that it clusters."""
    latents = draw_latents(batch=16)
    errors = []
    for iterations in range(8):
        quantizer, averages = build("vector", kmeans_iterations=iterations)
        averages.start(latents)
        errors.append(error_of(quantizer, latents))
    assert all(after <= before + 1e-6 for before, after in pairwise(errors))
    assert errors[-1] < errors[1] < errors[0]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \(0, 1\), got 1.0"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\), got 0.0"),
        ({"restart_after": -1}, "restart_after and kmeans_iterations must be at least 0, got -1 and 10"),
        ({"kmeans_iterations": -1}, "must be at least 0, got 100 and -1"),
    ],
)
def test_ranges(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodebookTrainingConfig(**numbers)


class TestLeak:
    """Are pictures as well quantised in evaluation as they were in training?

    rq-vae-transformer updated and restarted the codebook that the depths share between them: the later
    depths found this very batch's residuals in it. Training showed an error of .02 where evaluation had .3.
    """

    DEPTH, SIZE, WIDTH, NUM_BATCHES = 4, 2048, 32, 16

    @torch.no_grad()
    def test_our_rule(self) -> None:
        config = ResidualQuantizerConfig(codebook_sizes=(self.SIZE,) * self.DEPTH, width=self.WIDTH)
        quantizer = ResidualQuantizer(config)
        averages = CodebookAverages(quantizer, CodebookTrainingConfig(restart_after=2))
        for seed in range(self.NUM_BATCHES):
            latents = self.latents(seed)
            averages.start(latents)
            output = quantizer.train()(latents)
            averages.update(latents, output.codes)
        training = float((output.latents - latents).square().mean() / latents.square().mean())
        evaluation = error_of(quantizer.eval(), self.latents(self.NUM_BATCHES))
        assert evaluation == pytest.approx(training, rel=0.05)

    @torch.no_grad()
    def test_the_original_s_rule(self) -> None:
        """So the test above is not true whatever one does."""
        table = torch.randn(self.SIZE, self.WIDTH, generator=torch.Generator().manual_seed(0))
        counts, sums = torch.zeros(self.SIZE), table.clone()
        for seed in range(self.NUM_BATCHES):
            training = self.original_forward(vectors_of(self.latents(seed)), table, counts, sums)
        evaluation = self.frozen_error(vectors_of(self.latents(self.NUM_BATCHES)), table)
        assert training < 0.05
        assert evaluation > 5 * training

    def latents(self, seed: int) -> Tensor:
        """256 vectors of one distribution."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(16, self.WIDTH, 4, 4, generator=generator)

    def original_forward(self, vectors: Tensor, table: Tensor, counts: Tensor, sums: Tensor) -> float:
        """rqvae/models/rqvae/quantizations.py: each depth updates the table, restarts, then looks up."""
        residual, draws = vectors, torch.Generator().manual_seed(0)
        for _ in range(self.DEPTH):
            codes = torch.cdist(residual, table).argmin(dim=1)
            chosen = codes.bincount(minlength=len(table)).float()
            counts.lerp_(chosen, 0.01)
            sums.lerp_(torch.zeros_like(sums).index_add_(0, codes, residual), 0.01)
            dead = counts < 1
            restarts = residual.repeat(len(table) // len(residual), 1)[
                torch.randperm(len(table), generator=draws)
            ]
            sums[dead], counts[dead] = restarts[dead], 1.0
            total = counts.sum()
            table.copy_(sums / ((counts + 1e-5) * total / (total + len(table) * 1e-5))[:, None])
            residual = residual - table[codes]
        return float(residual.square().mean() / vectors.square().mean())

    def frozen_error(self, vectors: Tensor, table: Tensor) -> float:
        residual = vectors
        for _ in range(self.DEPTH):
            residual = residual - table[torch.cdist(residual, table).argmin(dim=1)]
        return float(residual.square().mean() / vectors.square().mean())


@pytest.mark.slow  # two processes that import torch
@pytest.mark.parametrize("kind", ["vector", "shared", "separate"])
def test_two_processes_are_one_with_the_joint_batch(
    two_processes: Callable[[str], list[dict[str, Tensor]]], kind: str
) -> None:
    """Start, averages, restarts and their draws: as if one device had seen all of the batch."""
    ranks = two_processes(kind)
    alone = state_after(kind, draw_batches())
    assert int(alone["num_updates"]) == NUM_BATCHES + 1
    assert any(int(tensor.max()) >= 2 for name, tensor in alone.items() if name.startswith("ages"))
    assert set(ranks[0]) == set(ranks[1]) == set(alone)
    for name, tensor in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Tensor]]]:
    """States of both processes by kind of quantizer."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("averages_in_processes.py")
    command = [sys.executable, str(script), str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE) for rank in range(2)]
    for process in processes:
        assert process.communicate(timeout=60)[1] is not None
        assert process.returncode == 0
    states = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return lambda kind: [state[kind] for state in states]
