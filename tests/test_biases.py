"""Whether a layer has biases, as the code of its quantization method tells."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.probe import biases


@pytest.fixture(autouse=True)
def version(monkeypatch):
    monkeypatch.setattr(biases, "names", lambda: SimpleNamespace(version="1.0"))


def add_weights(module, size):
    module.register_parameter("w13_weight", size)


def add_biases(size, *, module):
    module.register_parameter("w13_bias", size)


class Bare:
    def create_weights(self, layer, size, **more):
        layer.size = size
        layer.register_parameter("w13_weight", size)
        if hasattr(layer, "w13_scale"):
            delattr(layer, "w13_scale")
        add_weights(layer, size)
        self._finish(layer)

    def _finish(self, layer):
        setattr(layer, "is_made", True)  # noqa: B010


class Direct:
    def create_weights(self, moe_layer, size):
        moe_layer.register_parameter("w13_bias", size)


class Assigns:
    def create_weights(self, layer, size):
        layer.w13_bias = size


class ByFunction:
    def create_weights(self, layer, size):
        add_biases(size, module=layer)


class ByOwnMethod(Bare):
    def _finish(self, layer):
        add_biases(1, module=layer)


class ByBase(Direct):
    def create_weights(self, layer, size):
        super().create_weights(layer, size)


class BareByBase(Bare):
    def create_weights(self, layer, size):
        super().create_weights(layer=layer, size=size)


class InLoop:
    def create_weights(self, layer, size):
        for name in ("w13", "w2"):
            layer.register_parameter(f"{name}_bias", size)


class ToUnknown:
    def create_weights(self, layer, size):
        size.add_to(layer)


class Renamed:
    def create_weights(self, layer, size):
        other = layer
        other.register_parameter("w" + "13_bias", size)


class Private:
    def create_weights(self, layer, size):
        layer._parameters.update(size)


class Passes(Direct):
    def create_weights(self, *arguments):
        super().create_weights(*arguments)


class PassesNamed(Direct):
    def create_weights(self, **more):
        super().create_weights(**more)


class Nothing:
    pass


@pytest.mark.parametrize("method", [Direct, Assigns, ByFunction, ByOwnMethod, ByBase])
def test_biases_are_found_wherever_the_layer_goes(method):
    assert biases.gives_biases(method)


@pytest.mark.parametrize("method", [Bare, BareByBase])
def test_a_layer_whose_every_parameter_is_read_has_none(method):
    assert not biases.gives_biases(method)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (InLoop, "uses layer.register_parameter"),
        (ToUnknown, "gives the layer to size.add_to"),
        (Renamed, "has the layer in 'other = layer'"),
        (Private, "uses layer._parameters"),
        (Passes, "gives the layer to create_weights"),
        (PassesNamed, "gives the layer to create_weights"),
    ],
)
def test_what_cannot_be_read_is_not_judged(method, why):
    with pytest.raises(Unsupported) as error:
        biases.gives_biases(method)
    assert str(error.value) == (
        f"not judged: create_weights of {method.__name__} of vLLM 1.0 {why}, so it is not known "
        "whether a layer has biases"
    )


def test_a_method_without_the_function_is_not_judged():
    with pytest.raises(Unsupported, match=r"Nothing of vLLM 1\.0 has no create_weights, so it is"):
        biases.gives_biases(Nothing)
