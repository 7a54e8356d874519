"""The command `fastebm build`."""

from __future__ import annotations

from dataclasses import dataclass

from fastebm.cli.arguments import print_error


@dataclass(frozen=True)
class Build:
    """Compile the fused operators in place, where the package was installed without them."""

    verbose: bool = False
    """show the output of the compiler"""

    def __call__(self) -> int:
        from fastebm.build_extension import build

        try:
            written = build(verbose=self.verbose)
        except RuntimeError as error:
            print_error(error)
            return 1
        for path in written:
            print(f"built {path}")
        return 0
