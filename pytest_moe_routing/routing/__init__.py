"""The algebra of routing: recipes, routing methods and normal forms. Imports no torch."""

from pytest_moe_routing.routing.methods import METHODS, Method, RoutingMethodType
from pytest_moe_routing.routing.normal_form import normal_form, same
from pytest_moe_routing.routing.recipe import Recipe, recipe_of

__all__ = [
    "METHODS",
    "Method",
    "Recipe",
    "RoutingMethodType",
    "normal_form",
    "recipe_of",
    "same",
]
