"""The worked examples approach their references, and draw."""

import pytest

from examples import manifolds


@pytest.mark.parametrize("name", manifolds.EXAMPLES)
def test_an_example_approaches_its_reference(name, tmp_path):
    example, title, label = manifolds.EXAMPLES[name]
    curve = example(40)
    assert len(curve) == 40
    assert curve[-1] < 0.7 * curve[0]
    picture = manifolds.draw(tmp_path / f"{name}.png", curve, title, label)
    assert picture.stat().st_size > 1000
