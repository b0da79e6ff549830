"""Puts apportion's building blocks on the search path of every Hydra app in the environment.

Hydra runs this module at the start of every app, so it imports nothing but Hydra. Only ``conf/slots`` is exposed
(callbacks, units, score, budget, rule, effect), and it comes last: a user's own file of the same name wins, and a
config that is missing from the user's app stays missing.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class ApportionSearchPathPlugin(SearchPathPlugin):
    """Appends ``pkg://apportion.conf.slots``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends the slots unless they are there: Hydra 1.4 may load a plugin by entry point and by namespace."""
        if all(item.provider != "apportion" for item in search_path.get_path()):
            search_path.append(provider="apportion", path="pkg://apportion.conf.slots")
