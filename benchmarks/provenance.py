"""Machine, versions and commit, for the scripts here that are not yet commands of `gigamorph bench`."""

from gigamorph.engine.bench.machine import provenance

__all__ = ["provenance"]
