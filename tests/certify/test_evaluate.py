"""`evaluate`: one pass over the data gives certificate, accuracies, figures and a page."""

import math
import pickle

import pytest
import torch
from torch import nn

import orthonet
from orthonet.certify import (
    Bound,
    LipschitzCertificate,
    Row,
    certified_accuracy,
    certified_curve,
    certify,
)
from orthonet.certify.report.figures import ticks


def classifier():
    model = nn.Linear(2, 2).requires_grad_(False).eval()
    model.weight.copy_(torch.eye(2))
    model.bias.zero_()
    return model


# distances to the decision boundary: 0.566, 0.141, 0.141 (wrong), 0.424
X = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.2, 0.8]])
Y = torch.tensor([0, 0, 0, 1])
LOADER = [(X[:3], Y[:3]), (X[3:], Y[3:])]
RADII = [0.5, 0.0, 0.1, 0.3]


def test_accuracies_are_those_of_the_distances():
    model, said = classifier(), []
    found = orthonet.evaluate(model, iter(LOADER), RADII, progress=lambda *a: said.append(a))
    assert found.samples == 4 and found.clean == 0.75 and found.broken == 0
    assert found.certified == {0.5: 0.25, 0.0: 0.75, 0.1: 0.75, 0.3: 0.5}
    assert found.attacked == found.certified  # the bound is exact, and the attack reaches it
    assert found.certificate.matches(model)
    assert list(found.certified.values()) == certified_accuracy(model, LOADER, RADII)
    assert [what for _, _, what in said].count("batches") == 2
    alone = orthonet.evaluate(model, LOADER, RADII, found.certificate, attack=False)
    assert alone.attacked == {} and alone.certified == found.certified
    assert alone.certificate is found.certificate


def test_table_lists_each_radius():
    lines = str(orthonet.evaluate(classifier(), LOADER, RADII)).splitlines()
    assert lines[1].split() == ["radius", "clean", "certified", "attacked"]
    assert lines[2].split() == ["0.5", "75.00%", "25.00%", "25.00%"]
    assert len(lines) == 2 + len(RADII) + 1  # with the average radius
    bare = orthonet.evaluate(classifier(), LOADER, RADII, attack=False)
    assert bare.table().splitlines()[1].split() == ["radius", "clean", "certified"]
    assert bare.table().endswith(f"average certified radius {bare.curve.area:.4g} (l2)")
    assert bare.to_dict()["at_radii"][2] == {"radius": 0.1, "certified": 0.75, "attacked": None}


def test_a_wrong_certificate_is_told():
    lie = LipschitzCertificate(Bound(0.5), (), (2,))  # its radii are twice the distances
    found = orthonet.evaluate(classifier(), LOADER, [0.3], lie, exact=True)
    assert found.broken == 0  # 0.283 is not beyond 0.3
    found = orthonet.evaluate(classifier(), LOADER, [0.2], lie, exact=True)
    assert found.broken == 1 and "1 CERTIFIED SAMPLES FELL" in found.table()


def test_binary_classifiers_count_by_sign():
    model = nn.Linear(2, 1).requires_grad_(False).eval()
    model.weight.copy_(torch.tensor([[1.0, 0.0]]))
    model.bias.zero_()
    x = torch.tensor([[0.5, 0.0], [-0.2, 0.0], [0.1, 0.0]])
    for labels in ([1, 0, 0], [1.0, -1.0, -1.0]):
        found = orthonet.evaluate(model, [(x, torch.tensor(labels))], [0.0, 0.1, 0.3])
        assert list(found.certified.values()) == [2 / 3, 2 / 3, 1 / 3]
        assert found.attacked == found.certified and found.broken == 0


def test_the_page_holds_table_figure_and_rows_and_loads_nothing(tmp_path):
    found = orthonet.evaluate(classifier(), LOADER, RADII)
    found.save(tmp_path / "report.html", title="a <b>")
    text = (tmp_path / "report.html").read_text("utf-8")
    for outside in ("src=", "href=", "url(", "@import", "<script", "<link", "<img", "http"):
        assert outside not in text
    assert "a &lt;b&gt;" in text and text.count("<svg") == 1
    assert text.count("<tr class=radius>") == len(RADII) + 1
    assert text.index("Accuracy</h2>") < text.index("Layers</h2>")
    assert all(row.method in text for row in found.certificate.rows)
    with pytest.raises(
        ValueError, match=r"Evaluation: path must end in \.html, got path='x\.json'"
    ):
        found.save("x.json")


def test_notebooks_show_table_and_figure():
    found = orthonet.evaluate(classifier(), LOADER, RADII)
    assert found._repr_html_().count("<svg") == 1
    assert found._repr_html_().count("<tr class=radius>") == len(RADII) + 1
    assert "25.00%" in found._repr_html_()
    assert found.certificate._repr_html_().count("<tr>") == 1 + len(found.certificate.rows)


class Axes:
    """What is called of matplotlib's axes, recorded."""

    def __init__(self):
        self.called = {}

    def __getattr__(self, name):
        return lambda *args, **options: self.called.update({name: args})


def test_plots_need_no_package_and_draw_into_axes_of_matplotlib(tmp_path):
    found, axes = orthonet.evaluate(classifier(), LOADER, RADII), Axes()
    plot = found.plot(axes)
    assert axes.called["plot"][0] == list(found.attacked)
    plot.save(tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text("utf-8")
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "<style>" in text
    assert "\n" not in repr(plot) and "save" in repr(plot)
    constants = found.certificate.plot(axes)
    assert list(axes.called["barh"][1]) == [row.constant for row in found.certificate.rows]
    assert constants.svg.count("<rect") == len(found.certificate.rows)
    with pytest.raises(ValueError, match=r"Plot: path must end in \.svg, got path='a\.png'"):
        plot.save("a.png")


def test_of_many_operations_the_farthest_from_1_are_drawn():
    constants = [100.0 if i in (7, 30) else 1.0 for i in range(80)]
    rows = tuple(
        Row(str(i), "relu", (1,), c, 1.0, "", "upper", 0.0) for i, c in enumerate(constants)
    )
    svg = LipschitzCertificate(Bound(1.0), rows, (1,)).plot().svg
    assert svg.count("<rect") == 24 and svg.count(">100<") == 2
    assert "logarithmic" in svg and "56 nearest to 1 left out" in svg


@pytest.mark.parametrize("limit", [1.0, 1.05, 0.21, 7.3, 1e-12, 3e30])
def test_ticks_are_few_and_round(limit):
    marks = ticks(limit)
    assert 3 <= len(marks) <= 7 and marks[0] == 0.0 and marks[-1] <= limit * (1 + 1e-9)
    digits = marks[1] / 10.0 ** math.floor(math.log10(marks[1]))
    assert min(abs(digits - f) for f in (1.0, 2.0, 2.5, 5.0, 10.0)) < 1e-9  # rounding of one power


def test_guessed_attributes_of_a_certificate_are_there_or_explained():
    found = certify(classifier(), X[:1])
    assert found.lipschitz == found.constant.value
    for name in ("bound", "value", "lipschitz_constant", "upper", "estimate", "report", "evaluate"):
        with pytest.raises(AttributeError, match=f"LipschitzCertificate: it has no {name}. .*"):
            getattr(found, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = found.nonsense
    assert pickle.loads(pickle.dumps(found)).lipschitz == found.lipschitz


def test_batches_without_samples_change_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(5, 4)
    y = model(x).argmax(1)
    whole, empty = (x, y), (x[:0], y[:0])
    want = orthonet.evaluate(model, [whole], [0.1], attack=False)
    for loader in ([empty, whole], [whole, empty]):
        found = orthonet.evaluate(model, loader, [0.1], steps=2)
        assert torch.equal(found.curve.radii, want.curve.radii) and found.samples == 5
        assert certified_curve(model, loader).samples == 5
    certificate = want.certificate
    for radii in (certificate.radius(model, x[:0]), certificate.local_radius(model, x[:0])):
        assert radii.shape == (0,) and radii.dtype == torch.float64
