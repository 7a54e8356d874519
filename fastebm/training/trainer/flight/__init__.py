"""The flight recorder: what the last updates of a run were like, for the moment when the guard goes back."""

from fastebm.training.trainer.flight.diagnosis import Finding, diagnose, sentence
from fastebm.training.trainer.flight.files import (
    GAVE_UP,
    WENT_BACK,
    check_summary,
    read_record,
    read_summary,
    records,
    take_request,
    write_record,
)
from fastebm.training.trainer.flight.record import ChainRecord, FlightRecord
from fastebm.training.trainer.flight.recorder import FlightRecorder

__all__ = [
    "GAVE_UP",
    "WENT_BACK",
    "ChainRecord",
    "Finding",
    "FlightRecord",
    "FlightRecorder",
    "check_summary",
    "diagnose",
    "read_record",
    "read_summary",
    "records",
    "sentence",
    "take_request",
    "write_record",
]
