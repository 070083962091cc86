"""What the application registers with the engine, see `gigamorph.engine.applications`."""

import functools

from . import recipes
from .layouts import gmic, mammo_clip, mammoscreen, rsna_2023

LAYOUTS = {"mammoscreen": mammoscreen, "rsna-2023": rsna_2023, "mammo-clip": mammo_clip, "gmic": gmic}
RECIPES = {name: functools.partial(recipes.get_recipe, name) for name in recipes.RECIPES}
