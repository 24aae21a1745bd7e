"""Losses of PyTorch: the totals, weights and gradients that PyTorch's means have, from functions and from classes."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from mpiml.errors import ConfigError  # noqa: E402
from mpiml.nn.checked import OwnLoss, Sample  # noqa: E402
from mpiml.nn.outputs import Outputs  # noqa: E402


class Focal(torch.nn.Module):
    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, y: Any, labels: Any) -> Any:
        loss = F.cross_entropy(y, labels, reduction="none")
        loss = (1 - torch.exp(-loss)) ** 2 * loss
        return loss if self.reduction == "none" else loss.mean()


class Summing(torch.nn.Module):
    """Knows no reduction but the mean and the sum."""

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, y: Any, labels: Any) -> Any:
        loss = F.mse_loss(y, labels, reduction="none")
        return loss.mean() if self.reduction == "mean" else loss.sum()


class Trained(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = torch.nn.Parameter(torch.ones(()))


def dice(y: Any, labels: Any) -> Any:
    p = torch.softmax(y, 1)[:, 1]
    return 1 - 2 * (p * labels).sum() / (p.sum() + labels.sum() + 1)


def noisy(y: Any, labels: Any) -> Any:
    return F.mse_loss(y + torch.randn_like(y), labels)


def writing(y: Any, labels: Any) -> Any:
    labels[labels < 0] = 0
    return F.cross_entropy(y, labels)


def growing(y: Any, labels: Any) -> Any:
    """Changes from call to call."""
    COUNT.append(1)
    return F.cross_entropy(y, labels) * len(COUNT)


def contrastive(y: Any, labels: Any) -> Any:
    """How well each row is told from the other ones; it grows with the logarithm of their number."""
    self = torch.eye(len(y))
    likeness = F.normalize(y, dim=1) @ F.normalize(y, dim=1).T / 0.5 - 1e9 * self
    return -(likeness.log_softmax(1) * (1 - self)).sum() / (1 - self).sum()


COUNT: list[int] = []


@pytest.fixture(autouse=True)
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's."""
    module = ModuleType("losses_of_a_test")
    vars(module).update(
        {kind.__name__: kind for kind in (Focal, Summing, Trained, dice, noisy, writing, growing, contrastive)},
        summed=lambda y, labels: F.mse_loss(y, labels, reduction="sum"),
        numpys=lambda y, labels: COUNT.append(1) or (float(len(COUNT)), 1.0, np.zeros_like(y)),
        maker=lambda: torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        mean=F.cross_entropy,
        rows=lambda y, labels: F.mse_loss(y, labels, reduction="none").mean(dim=1),
        values=lambda y, labels: F.mse_loss(y, labels, reduction="none"),
        made=torch.nn.MSELoss(),
        adding=torch.nn.MSELoss(reduction="sum"),
        five=lambda y, labels: F.mse_loss(y, labels).repeat(5),
        pairs=lambda y, labels: torch.square(y - y.T),
        detached=lambda y, labels: y.detach().sum(),
        inplace=lambda y, labels: y.sub_(labels).square().mean(),
        broken=lambda y, labels: F.mse_loss(y, labels[:1, None, None].expand(4, 4, 4)),
    )
    monkeypatch.setitem(sys.modules, "losses_of_a_test", module)


def loss(
    name: str, y: np.ndarray, labels: np.ndarray, outputs: Outputs | None = None, weighted: bool = False
) -> OwnLoss:
    sample = Sample(np.zeros_like(y), np.zeros_like(labels), np.ones(len(y), y.dtype) if weighted else None, outputs)
    return OwnLoss(name if ":" in name else f"losses_of_a_test:{name}", sample)


def expected(function: Any, y: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The value of a function of tensors, and its gradient by the outputs."""
    source = torch.from_numpy(y.copy()).requires_grad_()
    value = function(source, torch.from_numpy(labels.copy()))
    (gradient,) = torch.autograd.grad(value, source)
    return value.item(), gradient.numpy()


def assert_mean(result: Any, weight: float, mean: tuple[float, np.ndarray]) -> None:
    assert result[1] == weight
    assert result[0] / weight == pytest.approx(mean[0], rel=1e-12)
    np.testing.assert_allclose(result[2] / weight, mean[1], rtol=1e-10, atol=1e-14)


RANDOM = np.random.default_rng(0)
Y, CLASS = RANDOM.standard_normal((7, 3)), RANDOM.integers(0, 3, 7)
VALUES, WEIGHTS = RANDOM.standard_normal((7, 3)), np.array([0, 1, 2.5, 1, 0, 3, 1])


@pytest.mark.parametrize(
    ("name", "labels", "weight", "function"),
    [
        ("torch.nn:CrossEntropyLoss", CLASS, 7, F.cross_entropy),
        ("torch.nn:MultiMarginLoss", CLASS, 7, F.multi_margin_loss),
        ("torch.nn:MSELoss", VALUES, 21, F.mse_loss),
        ("torch.nn:HuberLoss", VALUES, 21, F.huber_loss),
        ("torch.nn:BCEWithLogitsLoss", (VALUES > 0) * 1.0, 21, F.binary_cross_entropy_with_logits),
        ("torch.nn:MultiLabelSoftMarginLoss", (VALUES > 0) * 1.0, 7, F.multilabel_soft_margin_loss),
        ("Focal", CLASS, 7, Focal()),
        ("mean", CLASS, 7, F.cross_entropy),
        ("rows", VALUES, 7, F.mse_loss),
        ("values", VALUES, 21, F.mse_loss),
        ("made", VALUES, 7, F.mse_loss),
    ],
)
def test_the_mean_is_that_of_pytorch(name: str, labels: np.ndarray, weight: float, function: Any) -> None:
    assert_mean(loss(name, Y, labels)(Y, labels), weight, expected(function, Y, labels))


@pytest.mark.parametrize("name", ["Summing", "adding", "summed"])
def test_a_sum_is_a_sum_over_rows(name: str) -> None:
    total, weight, dy = loss(name, Y, VALUES)(Y, VALUES)
    by_torch = expected(lambda y, labels: F.mse_loss(y, labels, reduction="sum"), Y, VALUES)
    assert (total, weight) == (pytest.approx(by_torch[0]), 7)
    np.testing.assert_allclose(dy, by_torch[1])
    with pytest.raises(ConfigError, match="rows have weights, but it sums over rows"):
        loss(name, Y, VALUES, weighted=True)


def test_a_loss_that_compares_rows_is_no_sum() -> None:
    y, labels = Y[:3, :2], CLASS[:3]
    assert_mean(loss("contrastive", y, labels)(y, labels), 3, expected(contrastive, y, labels))


def test_a_function_may_make_the_loss() -> None:
    function = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert_mean(loss("maker", Y, CLASS)(Y, CLASS), 7, expected(function, Y, CLASS))


def test_a_function_that_fails_on_labels_that_do_not_count_is_refused() -> None:
    sample = Sample(np.zeros_like(Y), np.zeros_like(CLASS), ignored=255)
    with pytest.raises(ConfigError, match=r"labels of 255 as -1, by --ignore 255, and fails: IndexError: .* leave out"):
        OwnLoss("losses_of_a_test:mean", sample)
    OwnLoss("losses_of_a_test:writing", sample)


def test_classes_go_after_the_rows_and_labels_of_minus_one_do_not_count() -> None:
    last, labels = RANDOM.standard_normal((4, 5, 2, 3)), RANDOM.integers(-1, 3, (4, 1, 5, 2))
    mean = expected(lambda y, labels: F.cross_entropy(y.movedim(-1, 1), labels[:, 0], ignore_index=-1), last, labels)
    outputs = Outputs.of((5, 2, 3), (1, 5, 2), 3)
    result = loss("torch.nn:CrossEntropyLoss", last, labels, outputs)(last, labels)
    assert_mean(result, np.count_nonzero(labels >= 0), mean)


def test_a_function_gets_outputs_as_the_model_gives_them_and_labels_as_the_data_do() -> None:
    first, labels = RANDOM.standard_normal((4, 2, 5)), RANDOM.integers(0, 2, (4, 5))
    result = loss("dice", first, labels, Outputs.of((2, 5), (5,), 2, True))(first, labels)
    assert_mean(result, 4, expected(dice, first, labels))


@pytest.mark.parametrize(("name", "labels"), [("torch.nn:CrossEntropyLoss", CLASS), ("rows", VALUES)])
def test_weights_multiply_the_values_of_rows(name: str, labels: np.ndarray) -> None:
    result = loss(name, Y, labels, weighted=True)(Y, labels, WEIGHTS)
    of_rows = [loss(name, Y, labels)(Y[row : row + 1], labels[row : row + 1]) for row in range(7)]
    assert result[:2] == (pytest.approx(sum(w * one[0] for w, one in zip(WEIGHTS, of_rows, strict=True))), 8.5)
    np.testing.assert_allclose(result[2], np.concatenate([one[2] for one in of_rows]) * WEIGHTS[:, None])


def test_a_single_number_counts_as_much_as_its_rows_weigh() -> None:
    result = loss("mean", Y, CLASS, weighted=True)(Y, CLASS, WEIGHTS)
    assert_mean(result, 8.5, expected(F.cross_entropy, Y, CLASS))


@pytest.mark.filterwarnings("error")
def test_values_and_outputs_stand_beside_each_other() -> None:
    y, labels = Y[:, :1], VALUES[:, 0]
    expected_ = expected(F.mse_loss, y, labels[:, None])
    assert_mean(loss("torch.nn:MSELoss", y, labels)(y, labels), 7, expected_)
    assert_mean(loss("made", labels, y)(labels, y), 7, expected(F.mse_loss, labels, y[:, 0]))


def test_flat_outputs_stand_beside_labels_with_axes_in_losses_of_pytorch() -> None:
    y, labels = RANDOM.standard_normal((7, 4)), RANDOM.standard_normal((7, 2, 2))
    result = loss("torch.nn:SmoothL1Loss", y, labels)(y, labels)
    assert_mean(result, 28, expected(F.smooth_l1_loss, y, labels.reshape(7, 4)))


def test_arguments_are_not_written_and_memory_does_not_matter() -> None:
    y, labels = Y.astype(np.float32), np.where(CLASS == 2, -1, CLASS)
    before = labels.copy()
    whole = loss("writing", y, labels)(y, labels)
    np.testing.assert_array_equal(labels, before)
    shifted = np.empty(22, np.float32)[1:].reshape(7, 3)
    shifted[:] = y
    shifted.flags.writeable = labels.flags.writeable = False
    again = loss("writing", y, labels)(shifted, labels)
    assert whole[:2] == again[:2]
    assert whole[2].tobytes() == again[2].tobytes()
    assert whole[2].dtype == np.float32


def test_generators_that_a_loss_draws_from_are_known() -> None:
    assert loss("noisy", Y, VALUES).draws == {"PyTorch"}
    assert loss("made", Y, VALUES).draws == frozenset()


@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        ("five", VALUES, "returns shape (5,) for outputs of shape (7, 3) and labels of (7, 3); a number or one a row"),
        ("pairs", VALUES[:, :1], "returns shape (7, 7)"),
        ("detached", VALUES, "returns torch.float64 without a gradient by the outputs"),
        ("inplace", VALUES, "leaf Variable that requires grad is being used in an in-place operation, for outputs"),
        ("broken", VALUES, "RuntimeError: "),
        ("Trained", VALUES, "has parameters, but a loss is not trained; move them into the model"),
        ("torch.nn:MSELoss", CLASS, "--metric r2 or exact_match makes them values"),
        ("torch.nn:CTCLoss", CLASS, "missing 2 required positional arguments"),
        ("torch.nn:CTCLoss", CLASS, "; it gets these two: name a function (outputs, labels) of yours that calls it"),
        ("growing", CLASS, "returns something else when it is called again"),
        ("numpys", CLASS, "returns something else when it is called again"),
        ("torch.nn:Linear", CLASS, "missing 2 required positional arguments: 'in_features' and 'out_features'; name a"),
        ("torch.nn:NoSuchLoss", CLASS, "has no attribute 'NoSuchLoss'"),
    ],
)
def test_what_is_no_loss_is_refused_in_one_line(name: str, labels: np.ndarray, words: str) -> None:
    y = Y[:, :1] if name == "pairs" else Y
    with pytest.raises(ConfigError) as error:
        loss(name, y, labels)
    assert str(error.value).startswith("--loss ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
