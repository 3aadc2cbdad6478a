"""The base class of layers and models."""

from typing import Any

from mindspore import nn


class Layer(nn.Cell):
    """A Cell whose call is its `construct`, and whose parts are plain attributes.

    `nn.Cell` looks at a dozen switches (graph mode, gradients, hooks, mixed precision) in each call and searches four
    dictionaries for each part: 2 ms in a step of 24 layers, longer than most of their kernels. Inference needs none of
    it. What does not run here: hooks, graph mode and `set_grad`; derive from `nn.Cell` for those, they mix freely.
    """

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "construct" in vars(cls) and "__call__" not in vars(cls):
            cls.__call__ = vars(cls)["construct"]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._cells:  # MindSpore's dictionary of parts, where `cells_and_names` finds them
            self.__dict__[name] = self._cells[name]

    def __delattr__(self, name: str) -> None:
        if name in self._cells:
            del self.__dict__[name]
        super().__delattr__(name)
