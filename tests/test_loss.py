"""Cross-entropy and Dice equal references written with one-hot targets."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import start_fork_server
from torch import Tensor, nn

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Network, Plan
from nnunet_lite.settings import LossSettings
from nnunet_lite.training.distributed import rank_share, sum_over_ranks
from nnunet_lite.training.launch import Ranks
from nnunet_lite.training.loss import (
    SumByClass,
    alone,
    check_weights,
    class_sums,
    deep_supervision_loss,
    deep_supervision_weights,
    distillation_loss,
    downsample_classes,
    nearest_components,
    pseudo_dice_counts,
    segmentation_loss,
)

BOTH = LossSettings()
CE, DICE = LossSettings(dice=0), LossSettings(cross_entropy=0)
REGIONS = ((1, 2, 3), (2, 3), (3,))


def example(channels: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, channels, 4, 5, 6, generator=generator)
    return logits, torch.randint(0, 4, (3, 4, 5, 6), generator=generator)


def dice_of(p: Tensor, y: Tensor, w: Tensor, batch_dice: bool) -> Tensor:
    """Mean over channels (and samples) of (2 tp + s) / (sum p + sum y + s); w is 1 where a voxel counts."""
    scores = []
    for c in range(p.shape[1]):
        for b in [slice(None)] if batch_dice else [slice(i, i + 1) for i in range(len(p))]:
            q, t, v = p[b, c], y[b, c], w[b]
            scores.append((2 * (q * t * v).sum() + 1e-5) / ((q * v).sum() + (t * v).sum() + 1e-5))
    return torch.stack(scores).mean()


@pytest.mark.parametrize("batch_dice", [False, True])
def test_soft_dice_equals_a_one_hot_reference(batch_dice: bool) -> None:
    logits, classes = example()
    p, y = logits.softmax(1), F.one_hot(classes, 4).movedim(-1, 1).float()
    expected = -dice_of(p[:, 1:], y[:, 1:], torch.ones(classes.shape), batch_dice)
    torch.testing.assert_close(segmentation_loss(logits, classes, DICE, batch_dice=batch_dice), expected)


def test_cross_entropy_is_torchs_and_weights_scale_the_terms() -> None:
    logits, classes = example()
    ce = segmentation_loss(logits, classes, CE, batch_dice=False)
    torch.testing.assert_close(ce, F.cross_entropy(logits, classes))
    dice = -segmentation_loss(logits, classes, DICE, batch_dice=False)
    both = segmentation_loss(logits, classes, LossSettings(cross_entropy=2, dice=3), batch_dice=False)
    torch.testing.assert_close(both, 2 * ce - 3 * dice)


def test_a_class_that_is_neither_there_nor_predicted_has_dice_one() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 0] = 1000
    assert segmentation_loss(logits, torch.zeros(1, 2, 2), DICE, batch_dice=False) == pytest.approx(-1)


@pytest.mark.parametrize("regions", [None, REGIONS])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_ignored_voxels_change_nothing(regions: Any, batch_dice: bool) -> None:
    logits, classes = example(3 if regions else 4)
    classes[torch.rand(classes.shape, generator=torch.Generator().manual_seed(1)) < 0.4] = 4
    terms = LossSettings(component_dice=1)
    options: dict[str, Any] = {"batch_dice": batch_dice, "ignore_class": 4, "regions": regions}
    first = logits.clone().requires_grad_()
    loss = segmentation_loss(first, classes, terms, **options)
    loss.backward()
    assert first.grad is not None
    ignored = (classes == 4)[:, None].expand_as(logits)
    assert (first.grad[ignored] == 0).all()
    assert (first.grad[~ignored] != 0).any()
    other = torch.where(ignored, 50 * torch.randn_like(logits), logits)
    torch.testing.assert_close(segmentation_loss(other, classes, terms, **options), loss.detach())


def test_a_patch_without_an_annotated_voxel_has_a_finite_loss_without_gradient() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 4, 4), 2), BOTH, batch_dice=False, ignore_class=2)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("batch_dice", [False, True])
def test_regions_equal_a_plain_reference(batch_dice: bool) -> None:
    logits, classes = example(3)
    classes[0, 0] = 4
    target = torch.stack([sum((classes == c).float() for c in region) for region in REGIONS], 1)  # type: ignore[misc]
    w = (classes != 4).float()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    expected = bce.movedim(1, -1)[w.bool()].sum(-1).mean() - dice_of(logits.sigmoid(), target, w, batch_dice)
    found = segmentation_loss(logits, classes, BOTH, batch_dice=batch_dice, ignore_class=4, regions=REGIONS)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("regions", [False, True])
def test_a_network_that_predicts_as_its_teacher_stays_as_it_is(regions: bool) -> None:
    logits, _ = example(3)
    teacher = logits.sigmoid() if regions else logits.softmax(1)[:, 1:]
    logits.requires_grad_()
    loss = distillation_loss(logits, teacher, regions)
    loss.backward()
    assert logits.grad is not None
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(logits.grad.abs().max()) < 1e-7
    for rounded in (1 + 2e-7, -1e-8):  # as by interpolation
        assert distillation_loss(logits.detach(), torch.full_like(teacher, rounded), regions).isfinite()
    assert float(distillation_loss(logits.detach() + torch.eye(3)[0].view(1, 3, 1, 1, 1), teacher, regions)) > 0.01


def test_a_certain_teacher_is_a_label(tiny_plan: Plan) -> None:
    """Then the divergence is the cross-entropy, of classes and of regions, at each output of a network."""
    logits, classes = example(4)
    certain = F.one_hot(classes, 4).movedim(-1, 1).float()
    expected = segmentation_loss(logits, classes, CE, batch_dice=False)
    torch.testing.assert_close(distillation_loss(logits, certain[:, 1:]), expected)
    of_regions = torch.stack([sum((classes == c).float() for c in region) for region in REGIONS], 1)  # type: ignore[misc]
    expected = segmentation_loss(logits[:, 1:], classes, CE, batch_dice=False, regions=REGIONS)
    torch.testing.assert_close(distillation_loss(logits[:, 1:], of_regions, regions=True), expected)

    classes = torch.randint(0, 3, (2, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    outputs, teacher = [torch.randn(2, 3, n, n, n) for n in (8, 4)], F.one_hot(classes, 3).movedim(-1, 1)[:, 1:].float()
    plain = deep_supervision_loss(outputs, classes, tiny_plan, "3d_fullres", CE)
    for share in (0.0, 0.5, 1.0):
        settings = LossSettings(dice=0, distillation=share)
        found = deep_supervision_loss(outputs, classes, tiny_plan, "3d_fullres", settings, teacher)
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize(("n", "weights"), [(1, [1]), (2, [2 / 3, 1 / 3]), (3, [4 / 7, 2 / 7, 1 / 7])])
def test_deep_supervision_weights_halve(n: int, weights: list[float]) -> None:
    assert deep_supervision_weights(n) == pytest.approx(weights)


def test_outputs_of_all_sizes_are_weighted(tiny_plan: Plan) -> None:
    classes = torch.randint(0, 3, (2, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    outputs = [torch.randn(2, 3, n, n, n) for n in (8, 4)]
    weights = LossSettings(cross_entropy=2, dice=0.5)
    batch_dice = tiny_plan.configuration("3d_fullres").batch_dice
    fine = segmentation_loss(outputs[0], classes, weights, batch_dice=batch_dice)
    coarse = segmentation_loss(outputs[1], downsample_classes(classes, (4, 4, 4)), weights, batch_dice=batch_dice)
    found = deep_supervision_loss(outputs, classes, tiny_plan, "3d_fullres", weights)
    torch.testing.assert_close(found, (2 * fine + coarse) / 3)
    torch.testing.assert_close(deep_supervision_loss(outputs[0], classes, tiny_plan, "3d_fullres", weights), fine)


@pytest.mark.parametrize("shape", [(12, 24, 8), (12, 8, 4), (6, 6, 2), (3, 24, 1), (5, 7, 3)])
def test_classes_shrink_to_the_nearest_voxel_as_torch_does(shape: tuple[int, ...]) -> None:
    classes = torch.arange(2 * 12 * 24 * 8).reshape(2, 12, 24, 8)
    expected = F.interpolate(classes[:, None].float(), size=shape, mode="nearest-exact")[:, 0]
    assert torch.equal(downsample_classes(classes, shape), expected.long())


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_gradients_of_bf16_logits_are_finite(scale: float) -> None:
    logits, classes = example()
    low = (scale * logits).bfloat16().requires_grad_()
    loss = segmentation_loss(low, classes, BOTH, batch_dice=True)
    loss.backward()
    assert loss.dtype == torch.float32
    assert low.grad is not None
    assert torch.isfinite(low.grad).all()
    assert low.grad.abs().sum() > 0


@pytest.mark.parametrize("regions", [None, REGIONS])
def test_counts_of_hard_predictions(regions: Any) -> None:
    logits, classes = example(3 if regions else 4)
    classes[1] = 4
    values = regions or (1, 2, 3)
    labels = Labels(names={"background": 0, **dict(zip("abc", values, strict=True))}, ignore=4, region_order=(1, 2, 3))
    counts = pseudo_dice_counts(logits, classes, labels)
    members = regions or ((1,), (2,), (3,))
    for i, region in enumerate(members):
        hit = logits[:, i] > 0 if regions else logits.argmax(1) == region[0]
        truth = sum((classes == c) for c in region).bool()  # type: ignore[attr-defined]
        valid = classes != 4
        expected = [(hit & truth).sum(), (hit & ~truth & valid).sum(), (~hit & truth).sum()]
        assert counts[:, i].tolist() == [int(e) for e in expected]


def test_dice_of_millions_of_voxels_is_exact() -> None:
    """Voxels are added one by one: in float32 this Dice came out as 1.0095."""
    n, p = 3_000_000, 0.97
    probabilities = torch.tensor([1 - p, p])[None, :, None].expand(1, 2, n)
    ones = torch.ones(1, n, dtype=torch.long)
    overlap, total = class_sums(probabilities, ones)
    assert float((2 * overlap / total)[0, 1]) == pytest.approx(2 * p / (1 + p), abs=1e-5)


def test_top_k_is_the_mean_of_the_largest_entropies() -> None:
    logits, classes = example()
    largest = F.cross_entropy(logits, classes, reduction="none").flatten().sort(descending=True).values
    for share_of, n in ((0.1, 36), (1.0, 360), (1e-9, 1)):
        settings = LossSettings(cross_entropy=0, dice=0, top_k=2, top_k_share=share_of)
        found = segmentation_loss(logits, classes, settings, batch_dice=False)
        torch.testing.assert_close(found, 2 * largest[:n].mean())


def test_top_k_of_equal_values_shares_the_gradient_and_ignored_voxels_count_as_zero() -> None:
    settings = LossSettings(cross_entropy=0, dice=0, top_k=1, top_k_share=0.5)
    logits = torch.zeros(1, 2, 8, requires_grad=True)
    classes = torch.zeros(1, 8, dtype=torch.long)
    loss = segmentation_loss(logits, classes, settings, batch_dice=False)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.6931472)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 1], torch.full((8,), 0.5 / 8))
    classes[0, 2:] = 2
    few = segmentation_loss(logits, classes, settings, batch_dice=False, ignore_class=2)
    assert float(few.detach()) == pytest.approx(0.6931472 / 2)  # two of the four largest are annotated


def test_binary_cross_entropy_of_classes_equals_torchs_on_one_hot_targets() -> None:
    logits, classes = example()
    settings = LossSettings(cross_entropy=0, dice=0, bce=1)
    target = F.one_hot(classes, 4).movedim(-1, 1).float()
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(segmentation_loss(logits, classes, settings, batch_dice=False), each.mean())
    marked = classes.clone()
    marked[0] = 4
    found = segmentation_loss(logits, marked, settings, batch_dice=False, ignore_class=4)
    torch.testing.assert_close(found, each[1:].mean())
    weights = torch.tensor([0.1, 1, 2, 0.5])
    weighted = settings.model_copy(update={"class_weights": tuple(weights.tolist())})
    expected = (each.mean((0, 2, 3, 4)) * weights).sum() / weights.sum()
    torch.testing.assert_close(segmentation_loss(logits, classes, weighted, batch_dice=False), expected)


def test_every_voxel_belongs_to_the_nearest_component() -> None:
    mask = torch.zeros(4, 9)
    mask[0, 0] = mask[1, 1] = mask[3, 6] = 1  # the first two touch at a corner
    nearest, n = nearest_components(mask)
    assert n == 2 and nearest[0].tolist() == [0] * 5 + [1] * 4
    assert nearest_components(mask[None])[0].tolist() == nearest[None].tolist(), "3D too"


@pytest.mark.parametrize("regions", [None, REGIONS[:1]])
def test_component_dice_is_the_mean_over_all_lesions_of_the_batch(regions: Any) -> None:
    """Two lesions of 40 voxels and 1 in one sample, one in another, none in a third."""
    classes = torch.zeros(3, 10, 12, dtype=torch.long)
    classes[0, :, :4] = classes[0, 5, 10] = classes[1, 2:4, 2:4] = 1
    logits = torch.randn(3, 1 if regions else 2, 10, 12, generator=torch.Generator().manual_seed(0))
    p = (logits.sigmoid() if regions else logits.softmax(1))[:, -1]
    distant = (torch.arange(10)[:, None] - 5) ** 2 + (torch.arange(12) - 10) ** 2  # from the small one, squared
    second = distant < (torch.arange(12) - 3).clamp_min(0) ** 2
    assert not (distant == (torch.arange(12) - 3).clamp_min(0) ** 2).any(), "no voxel is equally near to both"
    parts = [
        (p[0], classes[0] * ~second, ~second),
        (p[0], classes[0] * second, second),
        (p[1], classes[1], second > -1),
    ]
    each = [(2 * (q * y).sum() + 1e-5) / ((q * where).sum() + y.sum() + 1e-5) for q, y, where in parts]
    only = LossSettings(cross_entropy=0, dice=0, component_dice=2)
    found = segmentation_loss(logits, classes, only, batch_dice=True, regions=regions)
    torch.testing.assert_close(found, -2 * torch.stack(each).mean())
    none = segmentation_loss(logits.requires_grad_(), torch.zeros_like(classes), only, batch_dice=True, regions=regions)
    assert none == 0
    none.backward()  # a batch without a lesion trains nothing, and does not end the run
    assert logits.grad is not None and not logits.grad.any()


def test_class_weights_weigh_voxels_as_torch_does_and_dice_by_class() -> None:
    logits, classes = example()
    weights = (0.1, 1.0, 3.0, 0.5)
    ce = segmentation_loss(logits, classes, LossSettings(dice=0, class_weights=weights), batch_dice=True)
    torch.testing.assert_close(ce, F.cross_entropy(logits, classes, torch.tensor(weights)))
    marked = classes.clone()
    marked[:, 1] = 4
    options: dict[str, Any] = {"batch_dice": True, "ignore_class": 4}
    ce = segmentation_loss(logits, marked, LossSettings(dice=0, class_weights=weights), **options)
    torch.testing.assert_close(ce, F.cross_entropy(logits, marked, torch.tensor(weights), ignore_index=4))
    one_at_a_time = [
        LossSettings(cross_entropy=0, class_weights=tuple(float(c == i) for i in range(4))) for c in (1, 2, 3)
    ]
    each = [segmentation_loss(logits, classes, one, batch_dice=False) for one in one_at_a_time]
    all_three = LossSettings(cross_entropy=0, class_weights=weights)
    expected = sum(w * d for w, d in zip(weights[1:], each, strict=True)) / sum(weights[1:])
    torch.testing.assert_close(segmentation_loss(logits, classes, all_three, batch_dice=False), expected)


def test_weights_of_regions() -> None:
    logits, classes = example(3)
    only = LossSettings(class_weights=(0.0, 2.0, 0.0))
    found = segmentation_loss(logits, classes, only, batch_dice=True, regions=REGIONS)
    alone_there = segmentation_loss(logits[:, 1:2], classes, BOTH, batch_dice=True, regions=REGIONS[1:2])
    torch.testing.assert_close(found, alone_there)


def test_a_wrong_number_of_class_weights_names_the_classes() -> None:
    labels = Labels(names={"background": 0, "liver": 1, "tumour": 2})
    check_weights(LossSettings(class_weights=(1, 1, 2)), labels)
    with pytest.raises(UserError, match=r"2 numbers, not 3.*background, liver, tumour"):
        check_weights(LossSettings(class_weights=(1, 1)), labels)
    with pytest.raises(UserError, match="none for the foreground"):
        check_weights(LossSettings(class_weights=(1, 0, 0)), labels)
    regions = Labels(names={"background": 0, "whole": (1, 2), "core": (2,)}, region_order=(1, 2))
    check_weights(LossSettings(class_weights=(1, 1)), regions)
    with pytest.raises(UserError, match=r"3 numbers, not 2.*whole, core"):
        check_weights(LossSettings(class_weights=(1, 1, 1)), regions)


def test_sums_by_class_on_a_gpu_are_those_of_a_scatter() -> None:
    """Its function runs anywhere; `class_sums` takes it where atomic additions are slow."""
    logits, classes = example()
    y = classes.flatten(1)
    values = [logits[:, 0].flatten(1).clone().requires_grad_() for _ in range(2)]
    expected = values[0].new_zeros(3, 4).scatter_add(1, y, values[0])
    found = SumByClass.apply(values[1], y, 4)
    torch.testing.assert_close(found.float(), expected)
    for sums in (expected, found):
        (sums * torch.arange(12.0).view(3, 4)).sum().backward()
    assert values[0].grad is not None and torch.equal(values[0].grad, values[1].grad)


TINY_NET = Network(
    features=(4, 8), strides=((1, 1), (2, 2)), kernels=((3, 3), (3, 3)), blocks=(1, 1), decoder_convolutions=(1,)
)
SETTINGS = LossSettings(top_k=1, top_k_share=0.2, bce=0.5, component_dice=0.5, class_weights=(0.5, 1, 2))
KINDS = list(product([False, True], [False, True], [None, ((1, 2), (2,), (1,))]))  # batch Dice, ignored, regions


def learned(ranks: Ranks) -> dict[str, Any]:
    """Losses of three steps and the last gradient of a tiny network, for each kind of loss; a batch of three."""
    found: dict[str, Any] = {}
    reduce = sum_over_ranks if ranks.world > 1 else alone
    for batch_dice, ignored, regions in KINDS:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        network: nn.Module = UNet(TINY_NET, 1, 3).double()
        if ranks.world > 1:
            network = nn.parallel.DistributedDataParallel(network)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        losses = []
        for _ in range(3):
            images = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)[rank_share(3, ranks)]
            classes = torch.randint(0, 3 + ignored, (3, 8, 8), generator=generator)[rank_share(3, ranks)]
            optimizer.zero_grad()
            loss = segmentation_loss(
                network(images), classes, SETTINGS, batch_dice=batch_dice, ignore_class=3 if ignored else None,
                regions=regions, reduce=reduce,
            )  # fmt: skip
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        found[str((batch_dice, ignored, regions))] = (torch.stack(losses), torch.cat(gradients))
    return found


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(learned(Ranks(rank, 2, rank)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_two_samples_and_one_have_the_loss_and_gradient_of_three(tmp_path: Path) -> None:
    start_fork_server()
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="forkserver")
    expected = learned(Ranks())
    for rank in (0, 1):
        for kind, (losses, gradient) in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(losses, expected[kind][0], rtol=1e-6, atol=0, msg=kind)
            assert float((gradient - expected[kind][1]).norm() / expected[kind][1].norm()) < 1e-6, kind
