"""The algebra of routing. No torch but in `equivalence`, which must run recipes."""

from pytest_moe_routing.routing.classify import Classification, classify, get_routing_method_type
from pytest_moe_routing.routing.methods import METHODS, Method, RoutingMethodType
from pytest_moe_routing.routing.normal_form import normal_form, same
from pytest_moe_routing.routing.recipe import Recipe, recipe_of

__all__ = [
    "METHODS",
    "Classification",
    "Method",
    "Recipe",
    "RoutingMethodType",
    "classify",
    "get_routing_method_type",
    "normal_form",
    "recipe_of",
    "same",
]
