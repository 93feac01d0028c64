import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.objectives import score
from eetrain.objectives.linear_ce import shift_labels
from eetrain.testing.tiny import tiny_model
from eetrain.training.metrics import CalibrationError, ExitMetrics


def test_calibration_error_is_that_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 7, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(7, (500,), generator=generator)
    confidence, prediction = logits.softmax(-1).max(-1)
    ours = CalibrationError()
    for part in (slice(0, 13), slice(13, 500)):
        ours.update(confidence[part], prediction[part] == labels[part])
    theirs = MulticlassCalibrationError(num_classes=7, n_bins=15, norm="l1")
    assert ours.compute().item() == pytest.approx(theirs(logits, labels).item(), abs=1e-6)


def test_calibration_error_on_the_edges_of_bins():
    # 15ths are not exact in binary; powers of two are, with 16 bins.
    confidence = torch.tensor([0.0, 0.25, 0.25, 0.5, 0.75, 1.0, 1.0])
    correct = torch.tensor([1, 1, 0, 1, 0, 1, 0])
    ours = CalibrationError(16)
    ours.update(confidence, correct)
    theirs = BinaryCalibrationError(n_bins=16, norm="l1")(confidence, correct)
    assert ours.compute().item() == pytest.approx(theirs.item(), abs=1e-7)
    expected = (abs(1 - 0) + abs(1 - 0.5) + abs(1 - 0.5) + abs(0 - 0.75) + abs(1 - 2)) / 7
    assert ours.compute().item() == pytest.approx(expected, abs=1e-7)


@pytest.fixture(scope="module")
def scored():
    model = MultiExitModel(tiny_model(), ExitConfig(layers=[1, 3])).eval()
    generator = torch.Generator().manual_seed(1)
    batches = []
    for rows in (2, 5):
        ids = torch.randint(3, 61, (rows, 9), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
        with torch.no_grad():
            batches.append((model(ids), labels))
    return model, batches


def test_metrics_are_those_of_the_full_logits(scored):
    model, batches = scored
    metrics = ExitMetrics(model.exit_layers, full_depth=True)
    for output, labels in batches:
        statistics, layers = score(output, labels)
        metrics.update(statistics, layers, shift_labels(labels))
    values = metrics.compute()

    targets = torch.cat([labels[:, 1:].flatten() for _, labels in batches])
    valid = targets != -100

    def logits(layer):
        return torch.cat([model.logits(o, layer)[:, :-1].flatten(0, 1) for o, _ in batches])[valid]

    full = logits(None).argmax(-1)
    names = set()
    for layer, name in ((1, "exit_1"), (3, "exit_3"), (None, "full")):
        of_layer = logits(layer)
        expected = {
            "nll": F.cross_entropy(of_layer, targets[valid]).item(),
            "accuracy": (of_layer.argmax(-1) == targets[valid]).double().mean().item(),
            "ece": MulticlassCalibrationError(num_classes=61, n_bins=15, norm="l1")(of_layer, targets[valid]).item(),
        }
        if layer is not None:
            expected["agreement"] = (of_layer.argmax(-1) == full).double().mean().item()
        for quantity, value in expected.items():
            names.add(f"{quantity}/{name}")
            assert values[f"{quantity}/{name}"].item() == pytest.approx(value, abs=1e-6), (quantity, name)
    assert set(values) == names
    assert 0 < values["agreement/exit_1"] < 1


def test_compute_starts_again(scored):
    model, batches = scored
    metrics = ExitMetrics(model.exit_layers, full_depth=True)
    results = []
    for output, labels in (batches[0], batches[1], batches[0]):
        statistics, layers = score(output, labels)
        metrics.update(statistics, layers, shift_labels(labels))
        results.append({name: value.item() for name, value in metrics.compute().items()})
    assert results[0] == results[2] != results[1]


def test_without_the_full_depth_nothing_is_compared_to_it():
    names = set(ExitMetrics((2,), full_depth=False).metrics)
    assert names == {"nll/exit_2", "accuracy/exit_2", "ece/exit_2"}
