"""`Layer` is a Cell in all that the package uses of one, and calls `construct` directly."""

from typing import Any

import mindspore as ms
import pytest
from mindspore import Tensor, nn

from vllm_ms_models.layers.layer import Layer


class Scale(Layer):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def construct(self, x: Any) -> Any:
        return x * self.factor


class Negated(Scale):
    def construct(self, x: Any) -> Any:
        return -super().construct(x)


class Inherits(Negated):
    pass


class Plain(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scale(5)

    def construct(self, x: Any) -> Any:
        return self.inner(x)


class Block(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.first = Scale(2)
        self.plain = Plain()
        self.rest = nn.CellList([Negated(3), Inherits(7)])
        self.parameter = ms.Parameter(Tensor([1.0]), name="parameter")

    def construct(self, x: Any, *, offset: int = 0) -> Any:
        x = self.plain(self.first(x))
        for layer in self.rest:
            x = layer(x)
        return x + offset


def test_a_call_is_construct_of_the_class_itself() -> None:
    assert Block()(1) == 2 * 5 * 3 * 7
    assert Block()(1, offset=1) == 2 * 5 * 3 * 7 + 1


def test_cells_within_plain_cells_and_the_other_way_round_are_found() -> None:
    block = Block()
    names = [name for name, _ in block.cells_and_names()]
    assert names == ["", "first", "plain", "plain.inner", "rest", "rest.0", "rest.1"]
    block.set_train(True)
    assert all(cell.training for _, cell in block.cells_and_names())
    assert [parameter.name for parameter in block.get_parameters()] == ["parameter"]


def test_a_part_can_be_replaced_and_removed() -> None:
    block = Block()
    block.first = Scale(11)
    assert block(1) == 11 * 5 * 3 * 7 and block.name_cells()["first"] is block.first
    block.first = None  # type: ignore[assignment]
    assert block.first is None
    del block.plain
    assert "plain" not in block.name_cells()
    with pytest.raises(AttributeError):
        _ = block.plain
