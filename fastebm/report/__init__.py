"""`fastebm report`: a run, or runs of several seeds, as one HTML page that needs nothing but itself."""

from fastebm.report.page import write_report

__all__ = ["write_report"]
