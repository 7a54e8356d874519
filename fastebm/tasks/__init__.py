"""What trained energies are used for."""

from fastebm.tasks import restore

__all__ = ["restore"]
