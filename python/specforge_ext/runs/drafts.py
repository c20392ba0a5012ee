"""The drafts of a recipe: their methods, and the features that they need together."""

from __future__ import annotations

from specforge_ext.loader import Union, unite
from specforge_ext.methods import METHODS, Method
from specforge_ext.records import TargetSpec
from specforge_ext.runs.recipe import Recipe


def method_of(recipe: Recipe) -> Method:
    """Of a recipe for one draft."""
    kind, config = recipe.method
    method: Method = METHODS.get(kind)(config)
    return method


def feature_union(recipe: Recipe, target: TargetSpec) -> Union:
    """What one stream has to hold for all drafts. ValueError if a layer is not of the target."""
    return unite({name: method_of(part).layout(target) for name, part in recipe.parts.items()})
